# SPDX-License-Identifier: Apache-2.0
"""AdamW on the host against torch.optim.AdamW and against float64 oracles, on both paths."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meft_ds import ops
from meft_ds.ops import adam
from meft_ds.ops.adam import AdamHyper

from .oracles import HYPER, Case, adamw, assert_same_state, cases, lazy

some = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def hyper(**numbers: float) -> AdamHyper:
    return dataclasses.replace(HYPER, **numbers)


@some
@given(case=cases(), scale=st.sampled_from([1.0, 0.125, 3.0]), step=st.sampled_from([1, 2, 1000]))
def test_adamw_equals_oracle(path: str, case: Case, scale: float, step: int) -> None:
    expected, grad = case.copy(), case.dense_grad()
    before = grad.clone()
    ops.adamw_(*case.state, grad, HYPER, step=step, grad_scale=scale, replica=case.replica)
    adamw(*expected.state, grad, step, scale)
    assert_same_state(case, expected)
    assert torch.equal(grad, before)
    if case.replica is not None:
        assert torch.equal(case.replica, case.p.to(case.replica.dtype))


@some
@given(case=cases(), scale=st.sampled_from([1.0, 0.125]))
def test_rows_equal_adamw_over_zero_filled_gradient(path: str, case: Case, scale: float) -> None:
    expected = case.copy()
    ops.adamw_rows_(*case.state, case.ids, case.grad, HYPER, step=3, grad_scale=scale, replica=case.replica)
    adamw(*expected.state, case.dense_grad(), 3, scale)
    assert_same_state(case, expected)
    if case.replica is not None:
        assert torch.equal(case.replica, case.p.to(case.replica.dtype))


@some
@given(case=cases(), scale=st.sampled_from([1.0, 0.125]))
def test_lazy_rows_equal_a_loop_over_rows(path: str, case: Case, scale: float) -> None:
    expected = case.copy()
    ops.adamw_lazy_rows_(
        *case.state, case.row_steps, case.row_decay, case.ids, case.grad, HYPER, decay_log=-0.02, grad_scale=scale,
        replica=case.replica,
    )  # fmt: skip
    lazy(expected, -0.02, scale)
    assert_same_state(case, expected)
    asleep = torch.ones(case.p.shape[0], dtype=torch.bool)
    asleep[case.ids] = False
    assert torch.equal(case.p[asleep], expected.p[asleep])
    if case.replica is not None:
        assert torch.equal(case.replica[case.ids], case.p[case.ids].to(case.replica.dtype))
        assert not case.replica[asleep].any()


@some
@given(case=cases(), scale=st.sampled_from([1.0, 0.125, 3.0]), step=st.sampled_from([1, 2, 1000]), data=st.data())
def test_adamw_by_direction_equals_oracle(path: str, case: Case, scale: float, step: int, data: st.DataObject) -> None:
    """What runs where the state lies on an accelerator, and on a host without a compiler: a chunk at a time."""
    expected, grad = case.copy(), case.dense_grad()
    before, chunk = grad.clone(), adam._HOST_CHUNK
    adam._HOST_CHUNK = data.draw(st.sampled_from([1 << 22, 1000, 7 * case.p.numel() // 16 + 1]))
    try:
        adam.adamw_by_direction(*case.state, grad, HYPER, step=step, grad_scale=scale)
    finally:
        adam._HOST_CHUNK = chunk
    adamw(*expected.state, grad, step, scale)
    assert_same_state(case, expected)
    assert torch.equal(grad, before)


def test_adamw_of_nothing_does_nothing(path: str) -> None:
    """A rank that owns no element of a vector shorter than the ranks are many."""
    ops.adamw_(*(torch.zeros(0) for _ in range(4)), HYPER, step=1, replica=torch.zeros(0))


@pytest.mark.parametrize("shape", [(1,), (17,), (3, 5, 7), (2, 70000)])
def test_adamw_equals_torch_optimizer_over_50_steps(path: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    # Weights of a usual size: at |p| > 2 the rounding of torch's own 50 steps alone passes 1e-6.
    reference = torch.nn.Parameter(torch.randn(shape) * 0.1)
    p = reference.detach().clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    optimizer = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, foreach=False)
    for step in range(1, 51):
        lr = 1e-2 / step
        optimizer.param_groups[0]["lr"] = lr
        reference.grad = torch.randn(shape)
        optimizer.step()
        ops.adamw_(p, m, v, reference.grad, hyper(lr=lr, beta2=0.999), step=step)
    torch.testing.assert_close(p, reference.detach(), rtol=1e-6, atol=1e-6)


def test_dense_rows_equal_torch_optimizer_over_50_steps(path: str) -> None:
    torch.manual_seed(0)
    reference = torch.nn.Parameter(torch.randn(40, 24))
    p = reference.detach().clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    optimizer = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, foreach=False)
    for step in range(1, 51):
        ids = torch.randperm(40)[: step % 8].sort().values
        grad = torch.randn(ids.numel(), 24)
        reference.grad = torch.zeros(40, 24).index_copy(0, ids, grad)
        optimizer.step()
        ops.adamw_rows_(p, m, v, ids, grad, hyper(beta2=0.999), step=step)
    torch.testing.assert_close(p, reference.detach(), rtol=1e-6, atol=1e-6)


def test_lazy_decay_catches_up_with_rows_that_never_slept(path: str) -> None:
    """With zero gradients only weight decay acts, so a row that slept through changing lrs ends where others do."""
    p = torch.ones(2, 8)
    m, v, steps = torch.zeros_like(p), torch.zeros_like(p), torch.zeros(2, dtype=torch.int32)
    row_decay, decay_log = torch.zeros(2, dtype=torch.float64), 0.0
    expected = 1.0
    for number in range(20):
        lr = 0.05 / (1 + number)
        ids = torch.tensor([0, 1]) if number in (0, 19) else torch.tensor([0])
        ops.adamw_lazy_rows_(
            p, m, v, steps, row_decay, ids, torch.zeros(ids.numel(), 8), hyper(lr=lr, beta2=0.99, weight_decay=0.5),
            decay_log=decay_log,
        )  # fmt: skip
        decay_log += math.log1p(-lr * 0.5)
        expected *= 1 - lr * 0.5
    torch.testing.assert_close(p, torch.full_like(p, expected), rtol=2e-6, atol=0)
    assert steps.tolist() == [20, 2]


def test_lazy_row_woken_late_takes_a_first_step_of_lr(path: str) -> None:
    p = torch.zeros(4, 3)
    m, v, steps = torch.zeros_like(p), torch.zeros_like(p), torch.zeros(4, dtype=torch.int32)
    row_decay = torch.zeros(4, dtype=torch.float64)
    numbers = hyper(beta2=0.999, weight_decay=0.0)
    for _ in range(30):
        ops.adamw_lazy_rows_(p, m, v, steps, row_decay, torch.tensor([0]), torch.ones(1, 3), numbers, decay_log=0.0)
    ops.adamw_lazy_rows_(p, m, v, steps, row_decay, torch.tensor([2]), torch.ones(1, 3), numbers, decay_log=0.0)
    torch.testing.assert_close(p[2], torch.full((3,), -1e-2), rtol=1e-5, atol=0)
    assert not p[1].any() and not p[3].any()


def test_both_paths_agree_on_large_rows_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large enough that several threads work, with rows split between them."""
    results = []
    for path in ("", "torch"):
        monkeypatch.setenv("MEFT_DS_OPS", path)
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                results.append(_large_case())
            finally:
                torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)
    for one, two in ((0, 1), (2, 3)):
        assert all(torch.equal(a, b) for a, b in zip(results[one], results[two], strict=True))


def _large_case() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    n, w = 400, 3001
    p = torch.randn(n, w, generator=g)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    replica, rep32 = p.bfloat16(), torch.empty_like(p)
    steps, row_decay = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.float64)
    for number in range(3):
        ids = torch.randperm(n, generator=g)[:350].sort().values
        grad = torch.randn(350, w, generator=g)
        ops.adamw_lazy_rows_(p, m, v, steps, row_decay, ids, grad, HYPER, decay_log=-0.001 * number, replica=replica)
        ops.adamw_rows_(p, m, v, ids, grad.half(), HYPER, step=number + 1, replica=rep32)
        ops.adamw_(p, m, v, p.clone(), HYPER, step=number + 1)
    return [p, m, v, replica.float() * 0, rep32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replica_rounds_like_torch_over_the_whole_range(path: str, dtype: torch.dtype) -> None:
    """Every exponent, ties, subnormals and overflow; zero lr leaves p as it is, so the replica must be p.to(dtype)."""
    bits = torch.arange(0, 2**31 - 2**23, 4093, dtype=torch.int64).to(torch.int32)
    ties = torch.arange(0, 2**15 - 2**7, dtype=torch.int64).mul(2**16).add(2**15).to(torch.int32)
    half_ties = torch.arange(0x33000000, 0x47900000, 0x1000, dtype=torch.int64).to(torch.int32)
    p = torch.cat([bits, ties, half_ties]).view(torch.float32)
    p = torch.cat([p[p.isfinite()], -p[p.isfinite()]])
    before, zero, replica = p.clone(), torch.zeros_like(p), torch.empty_like(p, dtype=dtype)
    still = hyper(lr=0.0, beta2=0.9, weight_decay=0.0)
    ops.adamw_(p, zero, zero.clone(), zero.clone(), still, step=1, replica=replica)
    assert torch.equal(p, before)
    assert torch.equal(replica, before.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_read_exactly(path: str, dtype: torch.dtype) -> None:
    """beta1 = 0 makes the first moment the gradient itself: all 65,536 bit patterns that are finite."""
    grad = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    grad = grad[grad.isfinite()]
    p = torch.zeros(grad.shape)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    ops.adamw_(p, m, v, grad, hyper(lr=0.0, beta1=0.0, beta2=0.9, weight_decay=0.0), step=1)
    assert torch.equal(m, grad.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradient_stays_visible(path: str, dtype: torch.dtype, value: float) -> None:
    grad = torch.zeros(40, dtype=dtype)
    grad[17] = value
    p, m, v = torch.zeros(40), torch.zeros(40), torch.zeros(40)
    ops.adamw_(p, m, v, grad, HYPER, step=1)
    assert not m[17].isfinite() and m[:17].isfinite().all() and m[18:].isfinite().all()


def _good() -> dict[str, Any]:
    return dict(
        p=torch.zeros(4, 6), exp_avg=torch.zeros(4, 6), exp_avg_sq=torch.zeros(4, 6), ids=torch.tensor([1, 3]),
        grad=torch.zeros(2, 6), hyper=HYPER, step=1, replica=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("p", torch.zeros(4, 6, dtype=torch.float64)),
        ("p", torch.zeros(6, 4).t()),
        ("p", torch.zeros(24)),
        ("exp_avg", torch.zeros(4, 5)),
        ("exp_avg", torch.zeros(4, 6, dtype=torch.float16)),
        ("exp_avg_sq", torch.zeros(4, 6, dtype=torch.bfloat16)),
        ("ids", torch.tensor([1, 3], dtype=torch.int32)),
        ("ids", torch.tensor([1, 4])),
        ("ids", torch.tensor([-1, 3])),
        ("ids", torch.tensor([3, 1])),
        ("ids", torch.tensor([1, 1])),
        ("grad", torch.zeros(3, 6)),
        ("grad", torch.zeros(6, 2).t()),
        ("replica", torch.zeros(4, 5)),
        ("replica", torch.zeros(4, 6, dtype=torch.float64)),
        ("step", 0),
    ],
)
def test_wrong_inputs_are_named(path: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} "):
        ops.adamw_rows_(**{**_good(), name: value})


def test_betas_of_1_are_refused() -> None:
    with pytest.raises(ValueError, match="^beta1 must lie"):
        hyper(beta1=1.0)


def test_lazy_refuses_a_decay_that_would_flip_signs(path: str) -> None:
    good = _good()
    del good["step"]
    counters = dict(row_steps=torch.zeros(4, dtype=torch.int32), row_decay=torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="weight_decay"):
        ops.adamw_lazy_rows_(**{**good, **counters, "hyper": hyper(lr=1.0, weight_decay=1.0)}, decay_log=0.0)
    with pytest.raises(ValueError, match="row_steps"):
        ops.adamw_lazy_rows_(**{**good, **counters, "row_steps": torch.zeros(4)}, decay_log=0.0)
