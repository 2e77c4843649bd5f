# SPDX-License-Identifier: Apache-2.0
"""When projectors are checked and change, and what becomes of S, weights and moments then."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meft_ds import ops
from meft_ds.ops.projector import compress, expand
from meft_ds.subspace import calibrate
from meft_ds.subspace.calibrate import first_draw
from meft_ds.subspace.config import SubspaceConfig
from meft_ds.subspace.fit import bias_of, fit, transport
from tests.subspace.hand import (
    CPU,
    HYPER,
    assert_s,
    backward,
    grads_of,
    inputs,
    model_of,
    pipeline_of,
    subspace_units,
)

RANDOM: dict[str, Any] = {"projectors": "random", "refit_interval": 0}


@pytest.mark.parametrize("side", ["activation", "weight"])
def test_steps_with_refits_are_the_bits_of_the_same_done_by_hand(side: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16, bias=False))
    settings = {"projectors": "learned", "fit_steps": 6, "refit_interval": 3, "refit_threshold": 0.1}
    config = SubspaceConfig(dim=0.5, nonzeros=2, gradient_side=side, seed=5, **settings)
    pipeline = pipeline_of(model, **config.model_dump(exclude_defaults=True))
    d, m, n = 6, 16, 12
    w = model[0].weight.detach().clone()
    p, q = first_draw(config, "0.weight.left", m, d, 0, CPU), first_draw(config, "0.right", n, d, 0, CPU)
    exp_avg, exp_avg_sq = torch.zeros(d, d), torch.zeros(d, d)
    switches = 0
    for step in range(8):
        x = inputs(step)
        model(x).sin().sum().backward()
        y = torch.nn.functional.linear(x, w).requires_grad_()
        y.sin().sum().backward()
        flat, dy = x.view(-1, n), y.grad.view(-1, m)
        if step % 3 == 0:
            half = len(flat) // 2
            if side == "activation":
                g, held = dy[:half].t() @ flat[:half], dy[half:].t() @ flat[half:]
                whole = g + held
            else:
                g = held = whole = dy.t() @ flat
            before = bias_of(held, p, q)
            if step == 0:
                drawn = p, q
            else:
                drawn = (
                    first_draw(config, "0.weight.left", m, d, step, CPU),
                    first_draw(config, "0.right", n, d, step, CPU),
                )
            found = fit(g, *drawn, steps=6, lr=config.fit_lr)
            if bias_of(held, found.p, found.q) < before:
                exp_avg, exp_avg_sq = transport(exp_avg, exp_avg_sq, p, found.p, q, found.q)
                p, q = found.p, found.q
                switches += 1
            s = compress(whole, p, q)
        elif side == "activation":
            s = ops.sketch(dy.contiguous(), *p.columns).t() @ ops.sketch(flat, *q.columns)
        else:
            s = compress(dy.t() @ flat, p, q)
        direction = torch.empty(d * d)
        ops.adam_direction_(exp_avg.view(-1), exp_avg_sq.view(-1), s.reshape(-1), direction, HYPER, step=step + 1)
        scale = math.sqrt(m * n) / d
        w = (1 - HYPER.lr * HYPER.weight_decay) * w - HYPER.lr * scale * expand(direction.view(d, d), p, q)
        pipeline.step()
        (unit,) = subspace_units(pipeline)
        (matrix,) = unit.matrices
        assert matrix.left.projector.digest() == p.digest() and matrix.right.projector.digest() == q.digest()
        torch.testing.assert_close(unit.exp_avg.view(d, d), exp_avg, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(unit.exp_avg_sq.view(d, d), exp_avg_sq, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(model[0].weight, w, atol=1e-6, rtol=1e-5)
        w = model[0].weight.detach().clone()  # what is left is rounding: do not let fits amplify it
        exp_avg, exp_avg_sq = unit.exp_avg.view(d, d).clone(), unit.exp_avg_sq.view(d, d).clone()
    assert switches >= 2


@pytest.mark.parametrize(
    ("before", "after", "switches"), [(0.5, 0.49, True), (0.5, 0.5, False), (0.5, 0.6, False), (0.29, 0.1, False)]
)
def test_projectors_switch_only_for_a_bias_that_is_too_high_and_becomes_lower(
    monkeypatch: pytest.MonkeyPatch, before: float, after: float, switches: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16))
    pipeline = pipeline_of(model, refit_interval=1, refit_threshold=0.3)
    backward(model, 0)
    pipeline.step()
    (unit,) = subspace_units(pipeline)
    (matrix,) = unit.matrices
    assert matrix.fitted
    old = {side.name: side.projector for side in unit.sides}
    moments = {k: t.clone() for k, t in unit.state_tensors().items()}
    monkeypatch.setattr(
        calibrate, "bias_of", lambda g, p, q: before if p is old["0.weight.left"] and q is old["0.right"] else after
    )
    backward(model, 1)
    changed = [side.projector is not old[side.name] for side in unit.sides]
    assert changed == [switches, switches]
    assert matrix.bias["before"] == before and matrix.bias["held_out"] == (after if switches else before)
    assert all(torch.equal(t, moments[k]) for k, t in unit.state_tensors().items()), "not before the verdict"
    keep = unit.keep_calibration
    seen = []
    monkeypatch.setattr(unit, "keep_calibration", lambda: (keep(), seen.append(unit.exp_avg.clone())))
    pipeline.step()
    assert torch.equal(seen[0], moments["exp_avg"]) != switches


@pytest.mark.parametrize("keeps", [(), ("q",), ("v",), ("q", "v")])
def test_s_of_siblings_is_of_the_projectors_in_use_whoever_keeps_or_changes_theirs(
    monkeypatch: pytest.MonkeyPatch, keeps: tuple[str, ...]
) -> None:
    """q and v share Q. Whatever one decides, the other's S and moments must be in the coordinates that remain."""
    model = model_of(blocks=1, experts=False)
    pipeline = pipeline_of(model, refit_interval=1, refit_threshold=0.05)
    backward(model, 0)
    pipeline.step()
    (unit,) = subspace_units(pipeline)
    for matrix in unit.matrices:
        matrix.fitted = True
    old = {id(side.projector) for side in unit.sides}
    kept = {id(m.left.projector) for m in unit.matrices if m.name.split(".")[-2].removesuffix("_proj") in keeps}
    # those that keep have a low bias, the others one that every fit improves
    monkeypatch.setattr(
        calibrate, "bias_of", lambda g, p, q: 0.01 if id(p) in kept and id(q) in old else 0.5 if id(p) in old else 0.4
    )
    grads = grads_of(model, 1)
    backward(model, 1)
    for matrix in unit.matrices:
        assert_s(unit, matrix, grads)
    assert any(id(side.projector) not in old for side in unit.sides)
    assert not pipeline.step().overflow


def test_the_first_check_comes_before_the_first_update_and_others_after_every_interval() -> None:
    model = model_of(blocks=1, experts=False)
    pipeline = pipeline_of(model, refit_interval=3)
    (unit,) = subspace_units(pipeline)
    checked = []
    for step in range(8):
        checks = pipeline.method._calibrator.checks
        backward(model, step)
        checked.append(pipeline.method._calibrator.checks - checks)
        if step == 0:
            assert all(m.bias["held_out"] <= m.bias["before"] < 1.5 and m.bias["step"] == 0 for m in unit.matrices)
        pipeline.step()
    assert checked == [1, 0, 0, 1, 0, 0, 1, 0]


def test_interval_0_fits_once_and_random_projectors_are_never_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, wanted in (
        ({"refit_interval": 0}, [1, 0, 0, 0, 0]),
        ({"refit_interval": 0, "projectors": "random"}, [0] * 5),
        ({"refit_interval": 2, "projectors": "random"}, [0, 0, 1, 0, 1]),
    ):
        model = model_of(blocks=1, experts=False)
        pipeline = pipeline_of(model, **settings)
        (unit,) = subspace_units(pipeline)
        fits: list[int] = []
        monkeypatch.setattr(calibrate, "fit", lambda *a, _f=fits, **kw: (_f.append(1), fit(*a, **kw))[-1])
        checked, drawn = [], []
        for step in range(5):
            checks = pipeline.method._calibrator.checks
            backward(model, step)
            pipeline.step()
            checked.append(pipeline.method._calibrator.checks - checks)
            drawn.append(unit.sides[0].projector.row_index.clone())
        assert checked == wanted
        assert bool(fits) == ("projectors" not in settings)
        if wanted == [0, 0, 1, 0, 1]:
            moved = [not torch.equal(a, b) for a, b in zip(drawn, drawn[1:], strict=False)]
            assert moved == [False, True, False, True]


def test_units_with_different_numbers_of_updates_are_all_checked() -> None:
    """In eager mode an overflow skips single units, so their checks fall into different windows, or into one."""
    model = model_of(experts=False)
    pipeline = pipeline_of(model, refit_interval=4)
    grads = grads_of(model, 0)
    for entry in pipeline._entries:
        entry.steps = 4 * (1 + entry.unit.layer)
    backward(model, 0)
    for unit in subspace_units(pipeline):
        assert not unit.asked
        for matrix in unit.matrices:
            assert matrix.bias["step"] == 4 * (1 + unit.layer)
            assert_s(unit, matrix, grads)


def test_a_fit_stops_at_its_budget_of_seconds_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(blocks=1, experts=False)
    pipeline = pipeline_of(model, fit_seconds=0.0)
    (unit,) = subspace_units(pipeline)
    before = [side.projector for side in unit.sides]
    backward(model, 0)
    assert [side.projector for side in unit.sides] == before
    assert sum("subspace.fit_seconds = 0" in record.getMessage() for record in caplog.records) == 1
    assert not pipeline.step().overflow


def test_every_stack_of_blocks_and_what_runs_late_but_is_named_early_is_fitted_to_its_gradient() -> None:
    """An encoder and a decoder number their blocks alike, and backward goes through one after the other."""

    class Stacks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project_out = nn.Linear(12, 10)
            self.encoder = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])
            self.decoder = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for block in [*self.encoder, *self.decoder]:
                x = x + torch.tanh(block(x))
            return self.project_out(x)

    torch.manual_seed(0)
    model = Stacks()
    grads = grads_of(model, 0)
    pipeline = pipeline_of(model)
    backward(model, 0)
    for unit in subspace_units(pipeline):
        for matrix in unit.matrices:
            assert_s(unit, matrix, grads)
            assert 0 < matrix.bias["fit"] < 1, matrix.name
    assert not pipeline.step().overflow
    assert all(matrix.fitted for unit in subspace_units(pipeline) for matrix in unit.matrices)
