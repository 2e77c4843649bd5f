# SPDX-License-Identifier: Apache-2.0
"""The bias, the fit and the transport of moments against their dense definitions."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from meft_ds import ops
from meft_ds.ops.adam import AdamHyper
from meft_ds.ops.projector import Projector, compress, expand, overlap
from meft_ds.subspace import fit as fitting
from meft_ds.subspace.fit import bias_of, fit, relative_bias, transport

CPU = torch.device("cpu")


def pair(m: int, n: int, d1: int, d2: int, k: int, seed: int = 0) -> tuple[Projector, Projector]:
    return Projector.draw(m, d1, k, 2 * seed, CPU), Projector.draw(n, d2, k, 2 * seed + 1, CPU)


def gradient(m: int, n: int, noise: float = 0.2, rank: int = 4, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    signal = torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)
    return signal / rank**0.5 + noise * torch.randn(m, n, generator=g)


def dense_bias(g: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return (p @ p.T @ g @ q @ q.T - g).norm() / g.norm()


def same_bits(a: Projector, b: Projector) -> bool:
    return torch.equal(a.row_index, b.row_index) and torch.equal(a.row_value, b.row_value)


# The bias


@given(
    m=st.integers(2, 40), n=st.integers(2, 40), d1=st.integers(1, 30), d2=st.integers(1, 30), k=st.integers(1, 4),
    scale=st.sampled_from([1e-20, 1e-6, 1.0, 1e12]),
)  # fmt: skip
def test_the_bias_formula_is_the_dense_one(m: int, n: int, d1: int, d2: int, k: int, scale: float) -> None:
    p, q = Projector.draw(m, d1, min(k, d1), 0, CPU), Projector.draw(n, d2, min(k, d2), 1, CPU)
    g = gradient(m, n) * scale
    dense = float(dense_bias(g.double(), p.dense().double(), q.dense().double()))
    formula = relative_bias(compress(g, p, q), g.double().norm() ** 2, overlap(p, p), overlap(q, q))
    assert formula == pytest.approx(dense, abs=2e-3)  # 1 - 1 in float32: a residual below 1e-6 of ||G||^2 is lost
    assert bias_of(g, p, q) == pytest.approx(dense, abs=2e-3)


def test_the_bias_of_a_gradient_inside_the_subspace_is_zero_and_never_negative() -> None:
    p, q = Projector.draw(8, 8, 1, 0, CPU), Projector.draw(8, 8, 1, 1, CPU)  # signed permutations
    assert bias_of(gradient(8, 8), p, q) < 1e-3


def test_a_zero_gradient_has_bias_zero() -> None:
    p, q = pair(12, 10, 6, 5, 2)
    zero = torch.zeros(12, 10)
    assert bias_of(zero, p, q) == relative_bias(compress(zero, p, q), 0.0, overlap(p, p), overlap(q, q)) == 0.0
    assert fit(zero, p, q).bias == 0.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_has_bias_nan_and_leaves_the_pair_alone(bad: float) -> None:
    p, q = pair(12, 10, 6, 5, 2)
    g = gradient(12, 10)
    g[3, 4] = bad
    assert math.isnan(bias_of(g, p, q))
    assert math.isnan(relative_bias(compress(g, p, q), g.double().norm() ** 2, overlap(p, p), overlap(q, q)))
    result = fit(g, p, q)
    assert result.p is p and result.q is q
    assert result.steps == 0 and math.isnan(result.start) and math.isnan(result.bias)


# The fit


@pytest.mark.parametrize("shape", [(24, 18, 10, 8, 3), (17, 31, 17, 5, 2), (9, 40, 4, 30, 1)])
def test_gradients_of_the_squared_bias_equal_autograds(shape: tuple[int, int, int, int, int]) -> None:
    m, n, d1, d2, _ = shape
    p, q = pair(*shape)
    g = gradient(m, n) * 3e-5
    sparse = fitting._Bias(g, float(g.double().norm()), p, q, ops.sketch(g, *q.columns, torch.float32))
    p_values, q_values = (x.row_value.double().requires_grad_() for x in (p, q))
    p_dense = torch.zeros(m, d1, dtype=torch.float64).scatter(1, p.positions, p_values)
    q_dense = torch.zeros(n, d2, dtype=torch.float64).scatter(1, q.positions, q_values)
    dense_bias(g.double(), p_dense, q_dense).square().backward()
    torch.testing.assert_close(sparse.gradient_p(), p_values.grad, atol=1e-6, rtol=1e-4, check_dtype=False)
    torch.testing.assert_close(sparse.gradient_q(), q_values.grad, atol=1e-6, rtol=1e-4, check_dtype=False)


def test_steps_follow_the_gradient_through_the_normalisation() -> None:
    p, _ = pair(24, 24, 10, 10, 3)
    values, towards = p.row_value.float().requires_grad_(), torch.randn(24, 3)
    (p.normalised(values) * towards).sum().backward()
    learned = fitting._Values(p)
    learned.step(towards, 0.1, 1)
    torch.testing.assert_close(learned.mean, (1 - fitting._BETAS[0]) * values.grad, atol=2e-4, rtol=2e-3)


@given(lr=st.sampled_from([1e-3, 0.1, 1.0, 30.0]), steps=st.integers(0, 6), seed=st.integers(0, 5), fix_q=st.booleans())
def test_a_fit_is_never_worse_than_its_start(lr: float, steps: int, seed: int, fix_q: bool) -> None:
    p, q = pair(24, 18, 10, 8, 3, seed)
    g = gradient(24, 18, noise=2.0, seed=seed)
    result = fit(g, p, q, steps=steps, lr=lr, fix_q=fix_q)
    assert result.steps == steps and not result.timed_out
    assert result.start == bias_of(g, p, q)
    assert result.bias == bias_of(g, result.p, result.q) <= result.start
    assert torch.equal(result.p.row_index, p.row_index) and torch.equal(result.q.row_index, q.row_index)
    assert not fix_q or result.q is q


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fit_learns_a_low_rank_gradient_and_what_it_learnt_holds_on_other_noise(dtype: torch.dtype) -> None:
    p, q = pair(96, 64, 32, 32, 4)
    generator = torch.Generator().manual_seed(9)
    seen = gradient(96, 64)
    unseen = seen + 0.2 * torch.randn(96, 64, generator=generator)
    result = fit(seen.to(dtype), p, q)
    assert result.start > 0.9 and result.bias < 0.4
    assert bias_of(unseen, result.p, result.q) < 0.5
    assert result.bias == pytest.approx(
        float(dense_bias(seen.to(dtype).float(), result.p.dense(), result.q.dense())), abs=1e-4
    )


def test_a_fit_does_not_depend_on_the_size_of_the_gradient() -> None:
    p, q = pair(24, 18, 10, 8, 3)
    g = gradient(24, 18)
    one, small = fit(g, p, q, steps=10), fit(g * 2.0**-30, p, q, steps=10)
    assert small.bias == pytest.approx(one.bias, abs=1e-5)


@pytest.mark.parametrize("fix_q", [False, True])
def test_the_same_inputs_give_the_same_bits(fix_q: bool) -> None:
    p, q = pair(48, 36, 20, 16, 4)
    one, two = (fit(gradient(48, 36), p, q, steps=12, fix_q=fix_q) for _ in range(2))
    assert same_bits(one.p, two.p) and same_bits(one.q, two.q) and one.bias == two.bias


def test_with_q_fixed_only_p_learns() -> None:
    p, q = pair(48, 36, 20, 16, 4)
    result = fit(gradient(48, 36), p, q, fix_q=True)
    assert result.q is q and result.bias < result.start


def test_a_deadline_ends_the_fit_between_steps_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = pair(24, 18, 10, 8, 3)
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    result = fit(gradient(24, 18), p, q, steps=10, deadline=3.0)
    assert result.timed_out and result.steps == 3
    assert result.bias < result.start


def test_a_deadline_in_the_past_leaves_the_pair_alone() -> None:
    p, q = pair(24, 18, 10, 8, 3)
    result = fit(gradient(24, 18), p, q, deadline=time.monotonic())
    assert result.timed_out and result.steps == 0 and result.p is p and result.q is q


def test_a_fit_reports_no_deadline_that_it_met() -> None:
    p, q = pair(24, 18, 10, 8, 3)
    assert not fit(gradient(24, 18), p, q, steps=2, deadline=time.monotonic() + 1000).timed_out


# The transport of moments


def moments(p: Projector, q: Projector, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Adam's, after 20 gradients of the same distribution."""
    m, v = torch.zeros(p.dim, q.dim), torch.zeros(p.dim, q.dim)
    for t in range(20):
        s = compress(gradient(p.m, q.m, noise=1.0, seed=100 * seed + t), p, q)
        m.lerp_(s, 0.1)
        v.lerp_(s * s, 0.05)
    return m, v


def permuted(p: Projector, to: Tensor, sign: Tensor) -> Projector:
    """Column c goes to column to[c], times sign[c]."""
    at = to[p.positions]
    order = at.argsort(1)
    value = p.row_value * sign[p.positions].half()
    return Projector(at.gather(1, order).to(torch.int16), value.gather(1, order).contiguous(), p.dim)


def test_transport_onto_the_same_subspace_is_the_identity() -> None:
    p, q = pair(128, 96, 64, 32, 4)
    m, v = moments(p, q)
    same_m, same_v = transport(m, v, p, p, q, q)
    torch.testing.assert_close(same_m, m, atol=1e-5 * float(m.abs().max()), rtol=1e-5)
    torch.testing.assert_close(same_v, v, atol=1e-5 * float(v.abs().max()), rtol=1e-5)


def test_transport_onto_a_fitted_pair_itself_is_the_identity() -> None:
    p, q = pair(128, 96, 48, 32, 4)
    fitted = fit(gradient(128, 96), p, q, steps=30)
    m, v = moments(fitted.p, fitted.q)
    same_m, same_v = transport(m, v, fitted.p, fitted.p, fitted.q, fitted.q)
    assert float((same_m - m).norm() / m.norm()) < 1e-4
    assert float((same_v - v).norm() / v.norm()) < 1e-4


def test_permuted_columns_and_flipped_signs_permute_and_flip_the_moments() -> None:
    p, q = pair(128, 96, 64, 32, 4)
    m, v = moments(p, q)
    generator = torch.Generator().manual_seed(0)
    to = torch.randperm(64, generator=generator)
    sign = torch.randint(0, 2, (64,), generator=generator) * 2.0 - 1
    moved_m, moved_v = transport(m, v, p, permuted(p, to, sign), q, q)
    torch.testing.assert_close(moved_m[to], sign[:, None] * m, atol=1e-5 * float(m.abs().max()), rtol=1e-5)
    torch.testing.assert_close(moved_v[to], v, atol=1e-5 * float(v.abs().max()), rtol=1e-5)


def test_the_first_moment_is_exact_for_gradients_inside_the_old_subspace() -> None:
    p, q = pair(64, 48, 24, 16, 3)
    p_new, q_new = pair(64, 48, 20, 24, 4, seed=5)
    g = expand(torch.randn(24, 16), p, q)
    m, _ = transport(compress(g, p, q), torch.ones(24, 16), p, p_new, q, q_new)
    wanted = compress(g, p_new, q_new)
    assert float((m - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("d", [16, 32, 56, 64])
def test_a_fresh_draw_inflates_no_moment(d: int) -> None:
    p, q = pair(64, 64, d, d, 4)
    p_new, q_new = pair(64, 64, d, d, 4, seed=5)
    m, v = moments(p, q)
    moved_m, moved_v = transport(m, v, p, p_new, q, q_new)
    assert float(moved_m.norm() / m.norm()) < 1.3
    assert float(v.min()) <= float(moved_v.min()) and float(moved_v.max()) <= float(v.max())
    assert 0.8 < float(moved_v.mean() / v.mean()) < 1.25


@pytest.mark.parametrize("d", [16, 32, 56])
def test_steps_after_a_fresh_draw_are_no_longer_than_before(d: int) -> None:
    """A stationary stream: Adam's direction right after a switch, and for 30 steps more, against the new pair's own."""
    stream = [gradient(64, 64, noise=1.0, seed=t) for t in range(130)]
    p, q = pair(64, 64, d, d, 4)
    p_new, q_new = pair(64, 64, d, d, 4, seed=5)
    m, v, m_new, v_new = (torch.zeros(d, d) for _ in range(4))

    hyper = AdamHyper(lr=1.0, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)

    def direction(m: Tensor, v: Tensor, g: Tensor, p: Projector, q: Projector, step: int) -> Tensor:
        s, out = compress(g, p, q).view(-1), torch.empty(d * d)
        ops.adam_direction_(m.view(-1), v.view(-1), s, out, hyper, step=step)
        return expand(out.view(d, d), p, q).norm()

    for t in range(100):
        direction(m, v, stream[t], p, q, t + 1)
        direction(m_new, v_new, stream[t], p_new, q_new, t + 1)
    m, v = transport(m, v, p, p_new, q, q_new)
    for t in range(100, 130):
        moved = direction(m, v, stream[t], p_new, q_new, t + 1)
        steady = direction(m_new, v_new, stream[t], p_new, q_new, t + 1)
        assert 0.2 < float(moved / steady) < 1.2


@given(d=st.integers(2, 24), d_new=st.integers(2, 24), k=st.integers(1, 2), seed=st.integers(0, 9))
def test_the_second_moment_is_never_negative(d: int, d_new: int, k: int, seed: int) -> None:
    p, q = pair(20, 20, d, d, k, seed)
    p_new, q_new = pair(20, 20, d_new, d_new, k, seed + 50)
    v = torch.rand(d, d, generator=torch.Generator().manual_seed(seed)) * 1e-12
    m, moved = transport(v.sqrt(), v, p, p_new, q, q_new)
    assert m.isfinite().all() and moved.isfinite().all()
    assert (moved >= 0).all() and moved.max() <= v.max() * 1.0001


def test_empty_columns_break_nothing_and_stay_empty() -> None:
    p, q = Projector.draw(10, 64, 2, 0, CPU), Projector.draw(24, 12, 2, 1, CPU)
    p_new = Projector.draw(10, 64, 2, 2, CPU)
    m, v = moments(p, q)
    empty = p_new.dense().norm(dim=0) == 0
    assert empty.any() and (p.dense().norm(dim=0) == 0).any()
    moved_m, moved_v = transport(m, v, p, p_new, q, q)
    assert moved_m.isfinite().all() and moved_v.isfinite().all()
    assert not moved_m[empty].any() and not moved_v[empty].any()
    assert (moved_v[~empty] > 0).all()


def test_a_column_that_misses_the_old_subspace_takes_the_mean_square_of_all() -> None:
    low, high = torch.arange(8).to(torch.int16)[:, None] // 2, torch.ones(8, 1).half()
    top, bottom = high.clone(), high.clone()
    top[4:], bottom[:4] = 0, 0
    p_old, p_new = (
        Projector(low, top, 4).with_values(top.float()),
        Projector(low, bottom, 4).with_values(bottom.float()),
    )
    q = Projector.draw(6, 6, 1, 0, CPU)
    v = torch.rand(4, 6)
    m, moved = transport(torch.ones(4, 6), v, p_old, p_new, q, q)
    assert not m.any() and not moved[:2].any()
    torch.testing.assert_close(moved[2:], v.mean(0).expand(2, 6), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_keep_their_dtype(dtype: torch.dtype) -> None:
    p, q = pair(24, 18, 10, 8, 3)
    m, v = transport(torch.ones(10, 8, dtype=dtype), torch.ones(10, 8, dtype=dtype), p, p, q, q)
    assert m.dtype == v.dtype == dtype
