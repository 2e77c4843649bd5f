# SPDX-License-Identifier: Apache-2.0
"""Gradients that are to be forgotten: by `zero_grad`, where DeepSpeed's forgets, and after half a backward."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from meft_ds.offload.model import capture
from meft_ds.plugin.zero_grad import forgets
from tests.plugin.zero_grad_ranks import memory_runs_out
from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of, tiny_llama

BLOCKS: dict[str, dict[str, Any]] = {
    "subspace": {"subspace": {"nonzeros": 2, "fit_steps": 5}},  # the first window fits projectors
    "sparse_adapter": {"sparse_adapter": dict(ADAPTER)},
    "sparse_matrix": {"sparse_matrix": {"block_size": 8, "warmup_steps": 1, "density": 0.3}},  # the first one scores
}
CALLS: dict[str, Callable[[Any], None]] = {
    "engine": lambda engine: engine.zero_grad(),
    "optimizer": lambda engine: engine.optimizer.zero_grad(),
    "module": lambda engine: engine.module.zero_grad(),
}


def engine_for(method: str, *, mode: str = "exact", gas: int = 1, stage: int = 2) -> Any:
    block = {**BLOCKS[method], "schedule": {"mode": mode}}
    return make_engine(ds_config(block=block, gas=gas, zero_optimization={"stage": stage}), tiny_llama())


def backward(engine: Any, seed: int, factor: float = 1.0) -> None:
    engine.backward(factor * engine(**batch(seed)).loss)


def windows(engine: Any, numbers: range) -> None:
    for number in numbers:
        for micro in range(engine.gradient_accumulation_steps()):
            backward(engine, 10 * number + micro)
            engine.step()


def bad_first(engine: Any, forget: Callable[[], None] | None) -> None:
    """A window's first backward is bad."""
    if forget is not None:
        backward(engine, 99, 30.0)
        forget()
    windows(engine, range(3))


def bad_last(engine: Any, forget: Callable[[], None] | None) -> None:
    """So is its last, after whose payloads have left."""
    windows(engine, range(2))
    for _ in range(engine.gradient_accumulation_steps() - 1):
        if forget is None:
            engine.micro_steps += 1
        else:
            backward(engine, 98, 30.0)
            engine.step()
    if forget is not None:
        backward(engine, 99, 30.0)
        forget()
    backward(engine, 31)
    engine.step()
    windows(engine, range(4, 5))


def bad_half(engine: Any, forget: Callable[[], None] | None) -> None:
    """So is its first half, of two."""
    windows(engine, range(2))
    if forget is None:
        engine.micro_steps += 1
    else:
        backward(engine, 98, 30.0)
        engine.step()
        forget()
    backward(engine, 31)
    engine.step()
    windows(engine, range(4, 5))


def bad_before_a_forward(engine: Any, forget: Callable[[], None] | None) -> None:
    """The usual order of PyTorch: forward, zero_grad, backward."""
    if forget is not None:
        backward(engine, 99, 30.0)
    loss = engine(**batch(31)).loss
    if forget is not None:
        forget()
    engine.backward(loss)
    engine.step()
    windows(engine, range(2))


Program = Callable[[Any, Callable[[], None] | None], None]


def forgotten(method: str, program: Program, call: str, **settings: Any) -> bool:
    """Whether the run ends as if there had been no bad backward."""
    plain, engine = engine_for(method, **settings), engine_for(method, **settings)
    program(plain, None)
    program(engine, lambda: CALLS[call](engine))
    a, b = state_of(plain), state_of(engine)
    same = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    if same:
        assert all(entry.reliable for entry in engine.optimizer.pipeline._entries), "overlap is lost for good"
    return same


@pytest.mark.parametrize(
    ("method", "program"),
    [*((method, bad_first) for method in BLOCKS), ("sparse_adapter", bad_before_a_forward), ("subspace", bad_last)],
)
def test_zero_grad_forgets_what_the_window_has_collected(method: str, program: Program) -> None:
    assert forgotten(method, program, "engine")


@pytest.mark.parametrize(
    ("stage", "gas", "program", "call", "expected"),
    [
        (2, 2, bad_half, "engine", False),  # DeepSpeed keeps what it has accumulated
        (2, 2, bad_last, "optimizer", True),
        (0, 2, bad_half, "module", True),
        (3, 1, bad_last, "engine", False),
        (3, 2, bad_half, "optimizer", True),
    ],
)
def test_each_call_forgets_where_deepspeed_does(
    stage: int, gas: int, program: Program, call: str, expected: bool
) -> None:
    assert forgotten("subspace", program, call, stage=stage, gas=gas) == expected
    assert forgets(call, stage, closing=program is bad_last or gas == 1) == expected  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("call", CALLS)
def test_the_table_is_that_of_plain_deepspeed(stage: int, call: str) -> None:
    for gas, program in ((1, bad_first), (1, bad_last), (2, bad_half), (2, bad_last)):
        config = ds_config(block=None, gas=gas, zero_optimization={"stage": stage}, gradient_clipping=0.0)
        found = []
        for bad in (False, True):
            engine = make_engine(config, tiny_llama())
            program(engine, (lambda e=engine: CALLS[call](e)) if bad else None)
            # the moments of stage 3 are in slices; a loss tells what the weights are
            found.append(engine(**batch(0)).loss.item())
            engine.destroy()
        kept = found[0] != found[1]
        assert kept != forgets(call, stage, closing=program is bad_last or gas == 1), (gas, program)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("method", BLOCKS)
@pytest.mark.parametrize("mode", ["exact", "serial"])
@pytest.mark.parametrize("stage", range(4))
def test_every_method_forgets_in_every_stage(method: str, mode: str, stage: int) -> None:
    for gas, program in ((1, bad_first), (1, bad_last), (2, bad_half), (2, bad_last), (1, bad_before_a_forward)):
        assert forgotten(method, program, "optimizer", mode=mode, stage=stage, gas=gas) == (
            forgets("optimizer", stage, closing=program is not bad_half)
        ), (gas, program)


def test_the_ordinary_zero_grad_waits_for_nothing() -> None:
    """Updates of the step before are under way, and stay so."""
    engine = engine_for("sparse_adapter")
    windows(engine, range(2))
    engine.meft_flush()  # or an update of these would be the one that waits
    pipeline, go = engine.optimizer.pipeline, threading.Event()
    unit = next(unit for unit in pipeline.units if unit.wire == "rows")
    real = unit.host_step

    def slow(*args: Any, **kwargs: Any) -> None:
        assert go.wait(60)
        real(*args, **kwargs)

    with patch.object(unit, "host_step", slow), patch.object(pipeline, "_reopen", side_effect=AssertionError):
        windows(engine, range(2, 3))
        for call in CALLS.values():
            call(engine)
        assert any(entry.pending and not entry.updated for entry in pipeline._entries)
        go.set()
    pipeline.flush()


@pytest.mark.parametrize("whose", ["engine", "loss"])
@pytest.mark.parametrize("method", ["subspace", "sparse_adapter"])
def test_a_gradient_that_an_interrupt_left_with_its_parameter_counts_for_nothing(method: str, whose: str) -> None:
    """Autograd has put it there, and the hook that takes it away never ran."""
    engine, plain = engine_for(method), engine_for(method)
    for each in (engine, plain):
        windows(each, range(2))
    loss = engine(**batch(99)).loss
    with patch.object(capture._HandOver, "__call__", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            engine.backward(loss) if whose == "engine" else loss.backward()
    for each in (engine, plain):
        windows(each, range(2, 4))
    found, expected = state_of(engine), state_of(plain)
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


def test_eager_says_that_what_has_begun_cannot_be_forgotten_and_the_step_goes_on() -> None:
    engine, plain = engine_for("subspace", mode="eager"), engine_for("subspace", mode="eager")
    for each in (engine, plain):
        windows(each, range(6))
        backward(each, 60)
    assert engine.optimizer.pipeline.has_begun
    with pytest.raises(RuntimeError, match='can no longer be forgotten.*schedule.mode to "exact"'):
        engine.zero_grad()
    engine.step()
    engine.meft_flush()
    assert engine.global_steps == 7


def test_a_copy_of_the_model_forgets_its_own_gradients() -> None:
    engine = engine_for("subspace")
    twin = copy.deepcopy(engine.module.model.layers[0])
    twin.zero_grad()
    reduced = engine.module.zero_grad.__reduce__()
    assert pickle.dumps(reduced[0]) and reduced[1] == (engine.module,)
    whole = copy.deepcopy(engine.module)
    windows(engine, range(1))
    backward(engine, 5)
    p = next(whole.parameters())
    p.grad = torch.ones_like(p)
    whole.zero_grad()
    assert p.grad is None and engine.optimizer.pipeline._window.collected


# -- half a backward ---------------------------------------------------------------------------------------------------


def half_a_backward(engine: Any, seed: int) -> None:
    with memory_runs_out(engine):
        backward(engine, seed, 30.0)


def leftovers(engine: Any) -> list[str]:
    """State of a backward that is still there after it."""
    found = ["in_backward"] * engine.optimizer.pipeline._window.in_backward
    for unit in engine.optimizer.pipeline.units:
        found += ["captured"] * bool(getattr(unit, "captured", None))
        found += ["waiting"] * (hasattr(unit, "_waiting") and len(unit._waiting) != len(unit.params))
        found += ["forwards"] * (unit.wire == "rows" and len(unit.rows._open) > 0)
    adapters = [adapter for method in engine._meft_methods for adapter in getattr(method, "adapters", [])]
    return found + ["selections"] * any(len(adapter._replay) for adapter in adapters)


@pytest.mark.parametrize("method", BLOCKS)
@pytest.mark.parametrize(
    ("stage", "gas", "checkpoints"),
    [
        (2, 1, None),
        (3, 1, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 2, None), (2, 1, True)]),
    ],
)
@pytest.mark.parametrize("call", ["optimizer", pytest.param(None, marks=pytest.mark.slow)])
def test_nobody_trains_on_half_a_backward(
    method: str, stage: int, gas: int, checkpoints: bool | None, call: str | None
) -> None:
    engines = [engine_for(method, stage=stage, gas=gas) for _ in range(2)]
    for engine in engines:
        if checkpoints is not None:
            engine.module.gradient_checkpointing_enable({"use_reentrant": checkpoints})
        windows(engine, range(1))
    half_a_backward(engines[1], 99)
    if call is not None:
        CALLS[call](engines[1])
    assert not leftovers(engines[1])
    states = []
    for engine in engines:
        windows(engine, range(1, 3))
        states.append(state_of(engine))
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert all(entry.reliable for entry in engines[1].optimizer.pipeline._entries)


def test_a_backward_of_the_loss_itself_that_ends_half_way_is_forgotten_too() -> None:
    plain, engine = engine_for("subspace"), engine_for("subspace")
    for each in (plain, engine):
        windows(each, range(1))
    engine.optimizer.backward = None  # nobody calls it
    with patch.object(type(engine), "backward", lambda self, loss: loss.backward()):
        half_a_backward(engine, 99)
    with pytest.raises(RuntimeError, match="ended half way.*forward and backward again"):
        engine.step()
    for each in (plain, engine):
        windows(each, range(1, 3))
    a, b = state_of(plain), state_of(engine)
    assert all(torch.equal(a[k], b[k]) for k in a)
