# SPDX-License-Identifier: Apache-2.0
"""Exceptions and interrupts inside `step()`: before the first update is handed over the run can go on, after it
everything refuses until a checkpoint has been loaded, and nothing hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.stress.interrupts import CASES, Case, watchdog
from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of, tiny_llama

BLOCKS = {
    "subspace": {"subspace": {"nonzeros": 2, "projectors": "random"}},
    "sparse_adapter": {"sparse_adapter": dict(ADAPTER)},
    "sparse_matrix": {"sparse_matrix": {"block_size": 8, "warmup_steps": 0, "score": "random", "density": 0.3}},
}


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    with watchdog():
        yield


def engine_for(method: str = "subspace", *, mode: str = "exact", gas: int = 1, seed: int = 0, **extra: Any) -> Any:
    block = {**BLOCKS[method], "schedule": {"mode": mode}}
    return make_engine(ds_config(block=block, gas=gas, **extra), tiny_llama(seed))


def micro(engine: Any, seed: int) -> None:
    engine.backward(engine(**batch(seed)).loss)
    engine.step()


def same(one: Any, other: Any) -> bool:
    a, b = state_of(one), state_of(other)
    return one.global_steps == other.global_steps and all(torch.equal(a[k], b[k]) for k in a)


BAD: list[tuple[str, Any]] = [
    ("lr", None),
    ("lr", "1e-3"),
    ("lr", float("nan")),
    ("betas", (0.9, 0.99, 0.999)),
    ("betas", ("0.9", "0.99")),
    ("betas", (0.9, 1.0)),
    ("betas", None),
    ("eps", [1e-8]),
    ("weight_decay", None),
]


@pytest.mark.parametrize("mode", ["exact", "eager", "serial"])
def test_hyperparameters_are_read_before_anything_is_handed_over(tmp_path: Path, mode: str) -> None:
    """A mistake is named, the window is intact, and everything works after it."""
    plain, engine = engine_for(mode=mode), engine_for(mode=mode)
    for each in (plain, engine):
        for seed in range(3):
            micro(each, seed)
    group = engine.optimizer.param_groups[0]
    engine.backward(engine(**batch(3)).loss)
    for key, bad in BAD:
        before, group[key] = group[key], bad
        with pytest.raises(ValueError) as fault:
            engine.step()
        group[key] = before
        told = str(fault.value)
        assert f"parameter group 0: {key} must be" in told and repr(bad) in told and "param_groups[0]" in told
        engine.save_checkpoint(str(tmp_path))
    engine.step()
    micro(plain, 3)
    assert same(engine, plain)
    engine.load_checkpoint(str(tmp_path))
    engine.destroy()


@pytest.mark.parametrize("after", ["destroy", "load_checkpoint"])
def test_a_scheduler_that_sets_no_number_ends_in_an_error_that_hangs_nothing(tmp_path: Path, after: str) -> None:
    engine = engine_for("sparse_adapter")
    micro(engine, 0)
    engine.save_checkpoint(str(tmp_path))
    engine.optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="parameter group 0: lr must be a finite number >= 0, got None"):
        micro(engine, 1)
    if after == "destroy":
        engine.destroy()
        return
    engine.load_checkpoint(str(tmp_path))
    plain = engine_for("sparse_adapter")
    micro(plain, 0)
    for each in (engine, plain):
        micro(each, 1)
    assert same(engine, plain)


def second_update(engine: Any) -> Any:
    """Ctrl-C between two hand-overs."""
    real, calls = engine.optimizer.pipeline._update, []

    def update(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt("planted")
        real(*args)

    return patch.object(engine.optimizer.pipeline, "_update", update)


def counting(engine: Any) -> Any:
    """All updates are handed over, but DeepSpeed has not counted the step."""
    return patch.object(engine.optimizer, "_after_step", side_effect=KeyboardInterrupt("planted"))


@pytest.mark.parametrize(
    ("method", "place", "gas"),
    [("subspace", second_update, 2), ("sparse_adapter", counting, 1), ("sparse_matrix", second_update, 1)],
)
def test_after_the_first_hand_over_nothing_is_saved_and_a_load_recovers_in_the_same_engine(
    tmp_path: Path, method: str, place: Callable[[Any], Any], gas: int
) -> None:
    engine, fresh = engine_for(method, gas=gas), engine_for(method, gas=gas, seed=9)
    for seed in range(3 * gas):
        micro(engine, seed)
    engine.save_checkpoint(str(tmp_path))
    with place(engine), pytest.raises(KeyboardInterrupt):
        for seed in range(10, 10 + gas):
            micro(engine, seed)
    for ask in (
        lambda: engine.save_checkpoint(str(tmp_path / "torn")),
        lambda: engine.module.state_dict(),
        lambda: engine(**batch(0)),
    ):
        with pytest.raises(RuntimeError, match="KeyboardInterrupt: planted.*resume from the last checkpoint"):
            ask()
    assert not (tmp_path / "torn").exists()
    for each in (engine, fresh):
        each.load_checkpoint(str(tmp_path))
        for seed in range(20, 20 + 3 * gas):  # with windows that begin where those of a new engine do
            micro(each, seed)
    assert same(engine, fresh) and engine.global_steps == 6


def test_a_torn_engine_can_be_destroyed_and_its_model_be_used() -> None:
    engine = engine_for()
    micro(engine, 0)
    with second_update(engine), pytest.raises(KeyboardInterrupt):
        micro(engine, 1)
    model = engine.module
    engine.destroy()
    assert torch.isfinite(model(**batch(0)).loss) and all(p.clone() is not None for p in model.parameters())


def test_a_load_of_the_weights_alone_does_not_mend_torn_moments(tmp_path: Path) -> None:
    engine = engine_for()
    micro(engine, 0)
    engine.save_checkpoint(str(tmp_path))
    with second_update(engine), pytest.raises(KeyboardInterrupt):
        micro(engine, 1)
    engine.load_checkpoint(str(tmp_path), load_module_only=True)
    with pytest.raises(RuntimeError, match="resume from the last checkpoint"):
        engine.save_checkpoint(str(tmp_path / "torn"))
    engine.load_checkpoint(str(tmp_path))
    micro(engine, 1)


@pytest.mark.parametrize("mode", ["exact", "serial"])
def test_before_the_first_hand_over_the_window_is_forgotten_and_training_goes_on(tmp_path: Path, mode: str) -> None:
    plain, engine = engine_for(mode=mode), engine_for(mode=mode)
    for each in (plain, engine):
        micro(each, 0)
    with (
        patch.object(engine.optimizer.pipeline, "_agreed_sq_norm", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        micro(engine, 1)
    engine.save_checkpoint(str(tmp_path))
    assert same(engine, plain)
    with pytest.raises(RuntimeError, match="ended half way.*run forward and backward again"):
        engine.step()  # there is nothing to step by
    for each in (plain, engine):
        micro(each, 2)
    assert same(engine, plain)


@pytest.mark.parametrize("gas", [2, 3])
@pytest.mark.parametrize("at", [0, 1])
def test_windows_begin_anew_when_a_checkpoint_is_loaded(tmp_path: Path, gas: int, at: int) -> None:
    """Loaded amid a window, or after an interrupt in its step."""
    engine, fresh = engine_for(gas=gas), engine_for(gas=gas, seed=9)
    for seed in range(gas):
        micro(engine, seed)
    engine.save_checkpoint(str(tmp_path))
    for seed in range(10, 10 + at):
        micro(engine, seed)
    engine.backward(engine(**batch(19)).loss)
    for each in (engine, fresh):
        each.load_checkpoint(str(tmp_path))
        for seed in range(20, 20 + 2 * gas):
            micro(each, seed)
    assert same(engine, fresh) and engine.global_steps == 3


@pytest.mark.parametrize("seed", range(12))
def test_an_interrupt_anywhere_leaves_the_state_of_a_step_or_a_refusal(seed: int) -> None:
    Case(CASES[(7 * seed) % len(CASES)]).run(seed)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_many_interrupts(case: tuple[str, str, int]) -> None:
    drawn = Case(case)
    for seed in range(9):
        drawn.run(1000 + seed)
