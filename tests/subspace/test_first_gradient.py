# SPDX-License-Identifier: Apache-2.0
"""Matrices that get their first gradient after the first window: they are fitted to it then, and nobody else pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meft_ds.offload import update_gates
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.pipeline import Pipeline
from meft_ds.subspace.matrix import Matrix
from tests.subspace.hand import CPU, differing, everything, inputs, pipeline_of, subspace_units

WIDTH = 12
ONCE = {"refit_interval": 0}


class Branching(nn.Module):
    """Two blocks of a layer that is always used and one, or experts in one tensor, that is only used if asked for."""

    def __init__(self, stacked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList()
        for _ in range(2):
            block = nn.Module()
            block.always, block.sometimes = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            block.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 3) if stacked else None
            self.layers.append(block)

    def forward(self, x: Tensor, used: str = "") -> Tensor:
        for block, use in zip(self.layers, used.ljust(2, "-"), strict=True):
            if use == "x":  # the forward ends before this block
                break
            x = x + torch.tanh(block.always(x))
            if use == "y":
                x = x + torch.tanh(block.sometimes(x))
            elif use.isdigit():
                x = x + torch.tanh(F.linear(x, block.experts[int(use)]))
        return x


def overlapping(serial: Pipeline, model: nn.Module) -> Pipeline:
    pipeline = Pipeline(serial.units, Bus(CPU), serial.ranks, serial.settings, mode="exact", methods=serial.methods)
    update_gates.install(model, serial.units, pipeline)  # type: ignore[arg-type]
    pipeline.method = serial.method  # type: ignore[attr-defined]
    return pipeline


def window(pipeline: Pipeline, model: nn.Module, seed: int, used: str, factor: float = 1.0, step: bool = True) -> Any:
    (model(inputs(seed), used).square().mean() * factor).backward()
    return pipeline.step() if step else None


def matrices(pipeline: Pipeline) -> dict[str, Matrix]:
    return {m.name: m for unit in subspace_units(pipeline) for m in unit.matrices}


def waiting(pipeline: Pipeline) -> list[str]:
    return [m.name for unit in subspace_units(pipeline) for m in unit.awaited]


def calibrating(pipeline: Pipeline) -> list[str]:
    return [entry.unit.name for entry in pipeline._entries if entry.calibrates]


@pytest.mark.parametrize("side", ["activation", "weight"])
@pytest.mark.parametrize("mode", ["serial", "exact"])
def test_a_matrix_without_a_gradient_in_the_first_window_is_fitted_in_the_first_one_that_has_one(
    side: str, mode: str
) -> None:
    model = Branching()
    pipeline = pipeline_of(model, gradient_side=side, **ONCE)
    pipeline = overlapping(pipeline, model) if mode == "exact" else pipeline
    window(pipeline, model, 0, "")
    late = ["layers.0.sometimes.weight", "layers.1.sometimes.weight"]
    assert sorted(waiting(pipeline)) == late
    before = {name: (m.left.projector, m.right.projector) for name, m in matrices(pipeline).items()}
    window(pipeline, model, 1, "")
    window(pipeline, model, 2, "-y")
    assert waiting(pipeline) == late[:1]
    window(pipeline, model, 3, "")
    window(pipeline, model, 4, "yy")
    window(pipeline, model, 5, "yy")
    assert waiting(pipeline) == []
    assert [matrices(pipeline)[name].bias["step"] for name in late] == [4, 2]
    for name, m in matrices(pipeline).items():
        assert m.fitted and m.bias["held_out"] < 0.95
        assert ((m.left.projector, m.right.projector) == before[name]) == (name not in late), name
    pipeline.close()


def test_a_first_window_without_any_gradient_is_no_fit() -> None:
    model = Branching()
    pipeline = pipeline_of(model, **ONCE)
    window(pipeline, model, 0, "yy", factor=0.0)
    assert len(waiting(pipeline)) == 4
    window(pipeline, model, 1, "yy")
    assert waiting(pipeline) == [] and all(m.fitted for m in matrices(pipeline).values())


def test_experts_without_tokens_in_the_first_window_are_fitted_when_they_get_some() -> None:
    model = Branching(stacked=True)
    pipeline = pipeline_of(model, **ONCE)
    window(pipeline, model, 0, "01")
    assert [name for name in waiting(pipeline) if "experts" in name] == [
        f"layers.{i}.experts.{e}" for i, e in ((0, 1), (0, 2), (1, 0), (1, 2))
    ]
    fitted = matrices(pipeline)["layers.0.experts.0"]
    projectors = fitted.left.projector, fitted.right.projector
    window(pipeline, model, 1, "20")
    assert [name for name in waiting(pipeline) if "experts" in name] == ["layers.0.experts.1", "layers.1.experts.2"]
    assert projectors == (fitted.left.projector, fitted.right.projector)


def test_the_first_micro_batch_with_a_gradient_is_what_is_fitted_to_and_the_window_sums_all_of_them() -> None:
    sums = []
    for factors in ((0.0, 1.0, 1.0), (1.0, 1.0)):
        model = Branching()
        pipeline = pipeline_of(model, **ONCE)
        window(pipeline, model, 0, "")
        for micro, factor in enumerate(factors, start=2 - len(factors)):
            window(pipeline, model, micro + 1, "y" if factor else "", factor, step=False)
        unit = next(u for u in subspace_units(pipeline) if u.layer == 0)
        m = matrices(pipeline)["layers.0.sometimes.weight"]
        assert "held_out" in m.bias
        sums.append((m.part(unit._acc).clone(), m.left.projector.digest()))
    assert sums[0][1] == sums[1][1]
    torch.testing.assert_close(sums[0][0], sums[1][0])


def test_moments_of_a_matrix_that_is_fitted_late_follow_and_those_of_others_stay() -> None:
    model = Branching()
    pipeline = pipeline_of(model, **ONCE)
    for seed in range(2):
        window(pipeline, model, seed, "")
    window(pipeline, model, 2, "y", step=False)
    unit = next(u for u in subspace_units(pipeline) if u.layer == 0)
    late, other = (matrices(pipeline)[f"layers.0.{name}.weight"] for name in ("sometimes", "always"))
    before = unit.exp_avg.clone()
    assert not late.part(before).any() and other.part(before).any()
    unit.keep_calibration()
    assert torch.equal(unit.exp_avg, before) and late.fitted


def test_an_overflow_in_the_window_of_a_late_fit_leaves_everything_as_it_was() -> None:
    model = Branching()
    pipeline = pipeline_of(model, **ONCE)
    window(pipeline, model, 0, "")
    before = everything(pipeline, model)
    for factor in (float("inf"), float("nan")):
        assert window(pipeline, model, 1, "yy", factor).overflow
        assert differing(before, everything(pipeline, model)) == []
        assert len(waiting(pipeline)) == 2
    window(pipeline, model, 2, "yy")
    assert waiting(pipeline) == []


def test_parts_that_never_get_a_gradient_cost_nobody_a_calibration_and_change_nothing() -> None:
    states = []
    for unused in (True, False):
        model = Branching()
        if not unused:
            for block in model.layers:
                block.sometimes = None
        pipeline = pipeline_of(model, **ONCE)
        for seed in range(4):
            (model(inputs(seed)).square().mean()).backward()
            captured = [u.name for u in subspace_units(pipeline) if u.captured]
            assert seed == 0 or captured == []
            pipeline.step()
        states.append({name: p.detach().clone() for name, p in model.named_parameters() if "always" in name})
        assert pipeline.method._calibrator.checks == 1  # type: ignore[attr-defined]
    assert differing(*states) == []


def test_once_all_are_fitted_no_window_is_anything_but_ordinary() -> None:
    model = Branching()
    pipeline = pipeline_of(model, **ONCE)
    window(pipeline, model, 0, "y")
    model(inputs(1), "y")
    assert calibrating(pipeline) == [u.name for u in subspace_units(pipeline) if u.layer == 1], "only who waits"
    window(pipeline, model, 1, "yy")
    model(inputs(2), "yy")
    assert calibrating(pipeline) == []


def test_an_update_under_way_is_applied_with_the_projectors_that_it_was_made_with() -> None:
    """Another rank got a gradient, and this one's update of the part was never asked for."""
    model = Branching()
    pipeline = overlapping(pipeline_of(model, **ONCE), model)
    window(pipeline, model, 0, "")
    unit = next(u for u in subspace_units(pipeline) if u.layer == 1)
    seen: list[bool] = []
    (method,) = pipeline.methods
    end = method.end_calibration

    def watched() -> None:
        seen.append(pipeline._of[id(unit)].pending)
        end()

    x = model.layers[0].always(inputs(1))  # the second block's forward does not run
    x.square().mean().backward()
    assert pipeline._of[id(unit)].pending and pipeline._of[id(unit)].calibrates
    method.end_calibration = watched  # type: ignore[method-assign]
    pipeline.step()
    assert seen == [False]
    pipeline.close()


def test_a_forgotten_backward_leaves_no_trace_beside_a_part_whose_update_is_under_way() -> None:
    states = []
    for forgets in (False, True):
        model = Branching()
        pipeline = overlapping(pipeline_of(model, **ONCE), model)
        window(pipeline, model, 0, "")
        if forgets:
            window(pipeline, model, 5, "yx", step=False)
            assert [e.unit.layer for e in pipeline._entries if e.pending and e.calibrates] == [1]
            pipeline.drop()
        window(pipeline, model, 1, "yx")
        states.append(everything(pipeline, model))
        pipeline.close()
    assert differing(*states) == []
