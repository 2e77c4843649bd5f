# SPDX-License-Identifier: Apache-2.0
"""What every method must do in training, over the table in tests/methods.py."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods import (
    GAS,
    Entry,
    assert_close,
    differing,
    engine_of,
    every_method,
    everything,
    parts,
    slow,
    steps,
    whole,
)
from tests.toy import batch

PRECISIONS = [pytest.param("fp32", marks=slow), "bf16", pytest.param("fp16", marks=slow)]
KINDS = ["reentrant", "nonreentrant"]


@every_method
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.compat
def test_it_learns_and_repeats_its_bits(entry: Entry, precision: str) -> None:
    def run() -> tuple[list[float], dict[str, Tensor]]:
        engine = engine_of(entry, precision=precision)
        return steps(engine, [k % 2 for k in range(12)]), everything(engine)

    (first, state), (second, again) = run(), run()
    assert first == second and differing(state, again) == []
    assert sum(first[-4:]) < sum(first[:4]) - 4 * entry.falls


@every_method
@pytest.mark.compat
def test_four_micro_batches_of_two_equal_one_of_eight(entry: Entry) -> None:
    cut = replace(entry, block=entry.in_parts or entry.block)

    def run(gas: int) -> dict[str, Tensor]:
        engine = engine_of(cut, gas=gas, micro=8 // gas)
        for step in range(entry.untrained + 4):
            for inputs in parts(step, 4) if gas == 4 else [whole(step, 4)]:
                engine.backward(engine(**inputs).loss)
                engine.step()
        return everything(engine)

    assert_close(run(1), run(4), entry)


@every_method
@pytest.mark.compat
def test_an_fp16_overflow_changes_nothing_but_the_scale(entry: Entry) -> None:
    """In any kind of window, in either micro-batch; then training goes on as if there had been none."""
    engine, twin = (engine_of(entry, precision="fp16") for _ in range(2))
    for step in range(entry.untrained + 3):
        engine.optimizer.loss_scaler.cur_scale = 512.0  # which the overflow halves
        before, skipped = everything(engine), engine.skipped_steps
        for micro in range(GAS):
            loss = engine(**batch(7 + micro)).loss
            engine.backward(loss * (math.inf if micro == step % 2 else 1.0))
            engine.step()
        assert engine.optimizer.overflow and not engine.was_step_applied() and engine.skipped_steps > skipped
        assert engine.optimizer.cur_scale == twin.optimizer.cur_scale == 256.0
        assert differing(before, everything(engine)) == []
        for each in (engine, twin):
            steps(each, [step])
            assert each.optimizer.cur_scale == 256.0
        assert differing(everything(engine), everything(twin)) == []
        assert differing(before, everything(engine)) != []
    assert engine.optimizer.applied_steps == 3


@every_method
@pytest.mark.parametrize(
    ("precision", "checkpointing", "windows"),
    [
        ("bf16", "none", 8),
        pytest.param("fp32", "none", 40, marks=slow),
        pytest.param("fp16", "none", 40, marks=slow),
        *(pytest.param("bf16", kind, 15, marks=slow) for kind in KINDS),
    ],
)
def test_exact_equals_serial_bit_for_bit(entry: Entry, precision: str, checkpointing: str, windows: int) -> None:
    """Each window of the late engine is another random schedule. Clipping is on, and bites."""
    found = []
    for mode, late in (("serial", None), ("exact", 7)):
        engine = engine_of(entry, mode=mode, late=late, precision=precision, checkpointing=checkpointing)
        losses, norms = [], []
        for step in range(entry.untrained + windows):
            losses += steps(engine, [step % 5])
            norms.append(float(engine.get_global_grad_norm() or 0.0))
        found.append((losses, norms, everything(engine)))
    (losses, norms, serial), (again, same, exact) = found
    assert losses == again and norms == same and differing(serial, exact) == []
    assert sum(norm > 0.5 for norm in norms) >= windows // 2
    assert all(entry.reliable for entry in engine.optimizer.pipeline._entries), "all payloads left during backward"


@every_method
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=slow), "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.compat
def test_gradient_checkpointing_changes_nothing(entry: Entry, kind: str, precision: str) -> None:
    assert_same(trained(entry, precision=precision, checkpointing=kind), trained(entry, precision=precision))


def trained(entry: Entry, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    engine = engine_of(entry, **options)
    return steps(engine, range(entry.untrained + 4)), everything(engine)


def assert_same(one: tuple[list[float], dict[str, Tensor]], other: tuple[list[float], dict[str, Tensor]]) -> None:
    assert one[0] == other[0] and differing(one[1], other[1]) == []


@every_method
@pytest.mark.parametrize("stage", [0, 1])
def test_zero_stages_0_to_2_are_the_same_thing(entry: Entry, stage: int) -> None:
    assert_same(trained(entry, zero_optimization={"stage": stage}), trained(entry))


@every_method
@pytest.mark.parametrize("what", ["eval", "no_sync"])
@pytest.mark.compat
def test_evaluation_between_steps_and_no_sync_change_nothing(entry: Entry, what: str) -> None:
    def run(what: str) -> dict[str, Tensor]:
        engine = engine_of(entry, precision="bf16")
        for step in range(entry.untrained + 3):
            for micro in range(GAS):
                loss = engine(**batch(10 * step + micro)).loss
                if what == "no_sync" and micro == 0:
                    with engine.no_sync():
                        engine.backward(loss if hasattr(type(engine), "scale") else loss / GAS)
                else:
                    engine.backward(loss)
                engine.step()
                if what == "eval":
                    engine.eval()
                    with torch.no_grad():
                        engine(**batch(1000 + micro, rows=7))
                    engine.train()
        return everything(engine)

    assert differing(run("plain"), run(what)) == []


@every_method
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=slow)])
def test_a_copied_model_is_its_own(entry: Entry, precision: str) -> None:
    """Copies made before training, inside a window and after it; neither they nor the engine see the other."""

    def run(copies: bool) -> dict[str, Tensor]:
        engine, twins = engine_of(entry, precision=precision), []
        for step in range(entry.untrained + 2):
            for micro in range(GAS):
                engine.backward(engine(**batch(10 * step + micro)).loss)
                if copies and (step, micro) in [(0, 0), (entry.untrained + 1, 0), (entry.untrained + 1, 1)]:
                    twins.append(copied(engine))
                engine.step()
        assert all(torch.equal(seen(twin), was) for twin, was in twins)
        return everything(engine)

    assert differing(run(False), run(True)) == []


def copied(engine: Any) -> tuple[Any, Tensor]:
    """A copy that a program has trained and changed, and its logits."""
    twin = copy.deepcopy(engine.module)
    assert list(twin.state_dict()) == list(engine.module.state_dict())
    assert torch.equal(seen(twin), was := seen(engine.module))
    twin(**batch(5)).loss.backward()
    assert any(p.grad is not None for p in twin.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.25)
    assert not torch.equal(seen(twin), was) and torch.equal(seen(engine.module), was)
    return twin, seen(twin)


def seen(model: Any) -> Tensor:
    """Logits in eval mode."""
    model.eval()
    with torch.no_grad():
        found = model(**batch(3)).logits.clone()
    model.train()
    return found


@every_method
@pytest.mark.parametrize("windows", [1, 4])
def test_a_destroyed_engine_leaves_an_ordinary_model_and_another_can_take_over(entry: Entry, windows: int) -> None:
    model = entry.model(0)
    model.model.layers[0].mlp.up_proj.requires_grad_(False)
    ours = [name for name, p in model.named_parameters() if p.requires_grad]
    engine = engine_of(entry, model=model)
    steps(engine, range(windows))
    engine.meft_flush()
    learned = seen(model)
    engine.destroy()
    hooks = hooks_of(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert [name for name, p in model.named_parameters() if p.requires_grad and "meft" not in name] == ours
    torch.testing.assert_close(seen(model), learned, rtol=1e-5, atol=1e-5)
    model(**batch(0)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None and "meft" not in name] == ours
    second = engine_of(entry, model=model)
    engine.destroy()  # once more, as when it is collected
    steps(second, range(entry.untrained + 2))
    second.meft_flush()
    assert second.optimizer.applied_steps == 2 and not torch.equal(seen(model), learned)
    second.destroy()
    if windows > entry.untrained:
        assert hooks_of(model) == hooks, "hooks pile up"


def hooks_of(model: Any) -> dict[str, int]:
    """How many hooks hang on each module and parameter."""
    found = {}
    for name, each in [*model.named_modules(), *model.named_parameters()]:
        count = sum(len(t) for key, t in vars(each).items() if "hooks" in key and t and not key.endswith("kwargs"))
        count += len(getattr(each, "_post_accumulate_grad_hooks", None) or {})
        found[name] = count
    return found
