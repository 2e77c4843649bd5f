# SPDX-License-Identifier: Apache-2.0
"""Signal handlers that save, and interrupts: refused where state is that of no step, and nothing is harmed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import meft_ds
from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of, tiny_llama

SUBSPACE = {"subspace": {"nonzeros": 2, "projectors": "random"}}  # updates that must not be applied twice


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def engine_for(seed: int = 0, block: Any = None, **extra: Any) -> Any:
    return make_engine(ds_config(block=block or SUBSPACE, **extra), tiny_llama(seed))


def steps(engine: Any, seeds: range) -> None:
    for seed in seeds:
        engine.backward(engine(**batch(seed)).loss)
        engine.step()


def same(one: Any, other: Any) -> bool:
    a, b = state_of(one), state_of(other)
    return all(torch.equal(a[k], b[k]) for k in a)


def once(where: Any, name: str, *, after: bool = True) -> Any:
    """A signal comes the first time that `where.name` has run (or is about to)."""
    real, sent = getattr(where, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs) if after else None
        if not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGUSR1)
        return result if after else real(*args, **kwargs)

    return patch.object(where, name, interrupted)


def unit_class(engine: Any) -> type:
    return next(type(unit) for unit in engine.optimizer.pipeline.units if unit.wire == "subspace")


def in_an_update(engine: Any, folder: Path) -> Any:
    return once(unit_class(engine), "apply")


def waiting_for_an_update(engine: Any, folder: Path) -> Any:
    return once(engine.optimizer.pipeline._progress, "wait_for")


def in_a_forward(engine: Any, folder: Path) -> Any:
    return once(engine.module.model.layers[0].mlp, "forward")


def in_a_backward(engine: Any, folder: Path) -> Any:
    return once(engine.optimizer.pipeline, "gradient")


def in_a_step(engine: Any, folder: Path) -> Any:
    return once(engine.optimizer.pipeline, "_send_the_rest")


@pytest.mark.parametrize("place", [in_an_update, waiting_for_an_update, in_a_forward, in_a_backward, in_a_step])
@pytest.mark.parametrize("save", ["save_checkpoint", "save_16bit_model"])
def test_a_handler_that_saves_amid_a_step_is_refused_and_the_run_is_as_if_it_had_not_been(
    tmp_path: Path, place: Callable[[Any, Path], Any], save: str
) -> None:
    plain, engine, said = engine_for(), engine_for(), []

    def handler(*_: Any) -> None:
        try:
            getattr(engine, save)(str(tmp_path))
        except RuntimeError as e:
            said.append(str(e))

    signal.signal(signal.SIGUSR1, handler)
    steps(plain, range(6))
    steps(engine, range(3))
    with place(engine, tmp_path):
        steps(engine, range(3, 6))
    (message,) = said
    assert f"{save} was called in the middle of a step" in message and "set a flag" in message
    assert not list(tmp_path.iterdir()) and same(engine, plain)
    engine.save_checkpoint(str(tmp_path))
    resumed = engine_for(seed=9)
    resumed.load_checkpoint(str(tmp_path))
    assert resumed.global_steps == 6 and same(resumed, plain)


def test_a_handler_that_only_wants_weights_amid_an_update_is_refused_too(tmp_path: Path) -> None:
    engine, said = engine_for(), []

    def handler(*_: Any) -> None:
        for ask in (engine.meft_flush, engine.module.state_dict):
            with pytest.raises(RuntimeError, match="while an update was being applied"):
                ask()
            said.append(ask)

    signal.signal(signal.SIGUSR1, handler)
    steps(engine, range(2))
    with in_an_update(engine, tmp_path):
        steps(engine, range(2, 4))
    plain = engine_for()
    steps(plain, range(4))
    assert len(said) == 2 and same(engine, plain)


def test_a_handler_that_saves_amid_a_save_is_refused_and_the_first_save_is_whole(tmp_path: Path) -> None:
    engine, said = engine_for(), []

    def handler(*_: Any) -> None:
        with pytest.raises(RuntimeError, match="in the middle of a save"):
            engine.save_checkpoint(str(tmp_path))
        said.append(1)

    signal.signal(signal.SIGUSR1, handler)
    steps(engine, range(3))
    with once(engine.optimizer, "counters"):
        engine.save_checkpoint(str(tmp_path))
    resumed = engine_for(seed=9)
    resumed.load_checkpoint(str(tmp_path))
    assert said and same(resumed, engine)


def test_saving_between_micro_batches_is_no_fault(tmp_path: Path) -> None:
    engine = engine_for(gas=2, block={"sparse_adapter": dict(ADAPTER)})
    steps(engine, range(5))
    engine.save_checkpoint(str(tmp_path))
    meft_ds.save_adapter(engine, tmp_path / "adapter")
    loss = engine(**batch(5)).loss
    engine.save_checkpoint(str(tmp_path))  # between a forward and its backward, too
    engine.backward(loss)
    engine.save_checkpoint(str(tmp_path))
    engine.step()


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("direct", [False, True], ids=["engine", "module"])
def test_what_ends_a_forward_does_not_stop_a_save(tmp_path: Path, fault: type[BaseException], direct: bool) -> None:
    engine, plain = engine_for(), engine_for()
    steps(engine, range(3))
    steps(plain, range(3))
    with patch.object(engine.module.model.layers[1].mlp, "forward", side_effect=fault("planted")), pytest.raises(fault):
        (engine.module if direct else engine)(**batch(3))
    engine.save_checkpoint(str(tmp_path))
    resumed = engine_for(seed=9)
    resumed.load_checkpoint(str(tmp_path))
    assert resumed.global_steps == 3 and same(resumed, plain)


def test_an_interrupt_amid_an_update_is_the_end_of_the_run_and_nothing_torn_is_saved(tmp_path: Path) -> None:
    engine = engine_for()
    steps(engine, range(3))
    real = unit_class(engine).apply

    def torn(unit: Any) -> None:
        real(unit)
        raise KeyboardInterrupt

    with patch.object(unit_class(engine), "apply", torn), pytest.raises(KeyboardInterrupt):
        engine(**batch(3))
    with pytest.raises(RuntimeError, match="KeyboardInterrupt.*resume from the last checkpoint"):
        engine.save_checkpoint(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_forward_is_seen_from_another_thread(tmp_path: Path) -> None:
    engine, said = engine_for(), []

    def save() -> None:
        with pytest.raises(RuntimeError, match="in the middle of a step"):
            engine.save_checkpoint(str(tmp_path))
        said.append(1)

    def forked(*_: Any) -> None:
        thread = threading.Thread(target=save)
        thread.start()
        thread.join()

    engine.module.model.layers[0].register_forward_hook(forked)
    engine(**batch(0))
    assert said
