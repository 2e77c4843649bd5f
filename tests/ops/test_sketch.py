# SPDX-License-Identifier: Apache-2.0
"""Sketches, combinations and the subspace update on both host paths, against dense products and against torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from meft_ds import ops
from meft_ds.ops import torch_sketch
from meft_ds.ops.adam import AdamHyper

from .gather_lists import Projector, projector

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}
LIMIT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
UPDATE = dict(alpha=0.1, decay=0.9, key=-5, step=3)


@st.composite
def projectors(draw: st.DrawFn) -> Projector:
    m, d = draw(st.sampled_from([1, 5, 16, 31, 65, 300])), draw(st.sampled_from([1, 3, 16, 37, 130]))
    empty = draw(st.integers(0, min(2, d - 1)))
    k = draw(st.integers(1, min(5, d - empty)))
    return projector(m, d, k, draw(st.integers(0, 2**31)), draw(st.sampled_from([torch.int16, torch.int32])), empty)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Within a few units of `actual`'s dtype of the sum of the terms' magnitudes."""
    error = (actual.double() - expected).abs()
    assert bool((error <= 4 * EPS[actual.dtype] * magnitude + 1e-7).all()), float(error.max())


def as_bits(t: Tensor) -> Tensor:
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


@LIMIT
@given(projectors(), st.sampled_from([1, 7, 16, 33, 70]), st.sampled_from(FLOATS), st.sampled_from([None, *FLOATS]))
def test_sketch_is_the_dense_product_in_both_views(
    path: str, p: Projector, T: int, dtype: torch.dtype, out_dtype: torch.dtype | None
) -> None:
    for (index, value), dense in ((p.columns, p.dense), (p.rows, p.dense.t())):
        x = random(T, dense.shape[0], dtype=dtype)
        out = ops.sketch(x, index, value, out_dtype)
        assert out.dtype == (out_dtype or dtype)
        assert_near(out, x.double() @ dense.double(), x.double().abs() @ dense.double().abs())


@LIMIT
@given(projectors(), st.sampled_from([1, 9, 130, 300]), st.sampled_from(FLOATS))
def test_combine_is_the_dense_product_in_both_views(path: str, p: Projector, width: int, dtype: torch.dtype) -> None:
    for (index, value), dense in ((p.columns, p.dense.t()), (p.rows, p.dense)):
        z = random(dense.shape[1], width, dtype=dtype)
        out = ops.combine(z, index, value)
        assert out.dtype == torch.float32
        assert_near(out, dense.double() @ z.double(), dense.double().abs() @ z.double().abs())


@LIMIT
@given(projectors())
def test_row_view_is_the_adjoint_of_the_column_view(path: str, p: Projector) -> None:
    m, d = p.dense.shape
    x, y = random(20, m), random(20, d, seed=1)
    forward = (ops.sketch(x, *p.columns).double() * y).sum()
    assert float(forward) == pytest.approx(float((x * ops.sketch(y, *p.rows).double()).sum()), rel=1e-4, abs=1e-3)


def test_both_sides_give_the_same_compressed_gradient(path: str) -> None:
    """(dY P)^T (X Q) of the activation side is P^T (dY^T X) Q of the weight side."""
    p, q = projector(65, 30, 4, 0), projector(48, 20, 3, 1)
    dy, x = random(200, 65), random(200, 48, seed=1)
    activation = ops.sketch(dy, *p.columns).t() @ ops.sketch(x, *q.columns)
    weight = ops.combine(ops.sketch(dy.t() @ x, *q.columns), *p.columns)
    torch.testing.assert_close(activation, weight, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_depend_neither_on_threads_nor_on_the_tokens_beside(path: str, dtype: torch.dtype) -> None:
    p, before = projector(300, 130, 4, 0), torch.get_num_threads()
    x, weight, s = random(1500, 300, dtype=dtype), random(1500, 300, dtype=dtype), random(130, 130)
    outputs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            moved = weight.repeat(3, 1)
            ops.subspace_apply_(moved, s, projector(4500, 130, 4, 1).rows, p.rows, **UPDATE)
            outputs.append((ops.sketch(x, *p.columns), ops.combine(x, *projector(1500, 130, 4, 2).columns), moved))
    finally:
        torch.set_num_threads(before)
    for others in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], others, strict=True))
    assert torch.equal(ops.sketch(x[3:8], *p.columns), outputs[0][0][3:8])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sketch_of_16_bit_values_has_the_same_bits_on_all_paths(path: str, dtype: torch.dtype) -> None:
    """A product of theirs with an fp16 factor is exact in fp32, so that only the order of the sum could matter."""
    p, x = projector(300, 130, 4, 0), random(70, 300, dtype=dtype)
    assert torch.equal(ops.sketch(x, *p.columns), torch_sketch.sketch(x, *p.columns, dtype))
    columns = projector(70, 9, 4, 0).columns
    assert torch.equal(ops.combine(x, *columns), torch_sketch.combine(x, *columns))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_planted_inf_shows_where_its_row_points_and_nowhere_else(path: str, bad: float) -> None:
    """Padding names position 0 with value 0: 0 * inf must not come of it."""
    p = projector(40, 30, 3, 0, empty=2)
    x = random(33, 40)
    x[5, 0] = bad
    out = ops.sketch(x, *p.columns)
    expected = torch.zeros(33, 30, dtype=torch.bool)
    expected[5] = p.dense[0] != 0
    assert torch.equal(~out.isfinite(), expected)
    assert torch.equal(~ops.combine(x.t().contiguous(), *p.columns).isfinite(), expected.t())


def test_an_inf_in_the_direction_reaches_its_rows_and_columns_and_no_others(path: str) -> None:
    p, q = projector(40, 30, 3, 0), projector(50, 20, 3, 1)
    s, weight = random(30, 20), random(40, 50, dtype=torch.bfloat16)
    s[0, 0] = math.inf
    ops.subspace_apply_(weight, s, p.rows, q.rows, **UPDATE)
    assert torch.equal(~weight.isfinite(), torch.outer(p.dense[:, 0], q.dense[:, 0]) != 0)


def test_empty_inputs_give_empty_or_zero_results(path: str) -> None:
    none = torch.empty(4, 0, dtype=torch.int16), torch.empty(4, 0, dtype=torch.float16)
    assert torch.equal(ops.sketch(torch.ones(3, 5), *none), torch.zeros(3, 4))
    assert torch.equal(ops.combine(torch.ones(3, 5), *none), torch.zeros(4, 5))
    assert ops.sketch(torch.ones(0, 40), *projector(40, 30, 3, 0).columns).shape == (0, 30)


def test_positions_above_32767_are_unsigned_in_16_bits(path: str) -> None:
    index = torch.tensor([[65535, 40000]]).to(torch.int16)
    x = torch.arange(2 * 65536.0).view(2, 65536)
    assert ops.sketch(x, index, torch.tensor([[1, 2]]).half()).tolist() == [[145535.0], [342143.0]]


@LIMIT
@given(st.sampled_from([(5, 7, 3, 2), (40, 128, 16, 4), (33, 515, 37, 3), (16, 700, 20, 4)]), st.sampled_from(FLOATS))
def test_subspace_update_is_the_dense_formula(
    path: str, shape: tuple[int, int, int, int], s_dtype: torch.dtype
) -> None:
    m, n, d, k = shape
    p, q = projector(m, d, k, 0), projector(n, d + 1, k, 1, torch.int32)
    s = random(d, d + 1, dtype=s_dtype)
    for dtype in FLOATS:
        weight, residual = random(m, n, dtype=dtype, seed=2), None
        change = p.dense.double() @ s.double() @ q.dense.double().t()
        magnitude = p.dense.double().abs() @ s.double().abs() @ q.dense.double().t().abs() + weight.double().abs()
        expected = 0.9 * weight.double() + 0.1 * change
        ops.subspace_apply_(weight, s, p.rows, q.rows, residual=residual, **UPDATE)
        assert_near(weight, expected, magnitude)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [128, 130, 700, 5])
def test_random_bits_are_the_oracles(path: str, dtype: torch.dtype, n: int) -> None:
    """With alpha = 0 the value to round is exact on every path: what differs then is random bits or rounding."""
    p, q = projector(37, 8, 2, 0), projector(n, 8, 2, 1)
    weight = (random(37, n) * random(37, n, seed=3).mul(6).exp()).clamp(-6e4, 6e4)
    weight[:4, 0] = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    weight[:2, 1] = torch.tensor([65504.0, torch.finfo(dtype).max])
    weight = weight.to(dtype)
    expected, kw = weight.clone(), dict(alpha=0.0, decay=0.9123, key=0xFEDCBA9876543210, step=41)
    torch_sketch.subspace_apply(expected, random(8, 8), p.rows, q.rows, residual=None, **kw)
    before = weight._version
    ops.subspace_apply_(weight, random(8, 8), p.rows, q.rows, **kw)
    assert torch.equal(as_bits(weight), as_bits(expected))
    assert weight._version > before


def test_philox_gives_its_published_words() -> None:
    halves = torch_sketch.random_halves(torch.arange(0, 128, 16), key=0, step=0).tolist()
    words = [low | high << 16 for low, high in zip(halves[::2], halves[1::2], strict=True)]
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased(path: str, dtype: torch.dtype) -> None:
    """A million values between two neighbours: the mean is the value, within 5 standard deviations."""
    p, q = projector(1000, 8, 2, 0), projector(1000, 8, 2, 1)
    for value, unit in ((1.0, 1.0), (-3.0, 2.0)):
        unit *= 2**-7 if dtype == torch.bfloat16 else 2**-10
        weight = torch.full((1000, 1000), value, dtype=dtype)
        decay = 1 + unit * 0.3 / abs(value)
        ops.subspace_apply_(weight, torch.zeros(8, 8), p.rows, q.rows, alpha=0.0, decay=decay, key=1, step=2)
        up = float((weight.double().abs() - abs(value)).mean()) / unit
        # The fraction that the kernel rounds is that of the fp32 value, in 2**-16 of a unit, cut off.
        share = abs(float(torch.tensor(value) * torch.tensor(decay))) - abs(value)
        assert abs(up - share / unit) < 5 * math.sqrt(0.3 * 0.7 / 1e6) + 2**-16
        assert set(weight.unique().abs().tolist()) == {abs(value), abs(value) + unit}


def test_rounding_differs_with_step_key_and_element_and_repeats_without(path: str) -> None:
    p, q = projector(300, 8, 2, 0), projector(300, 8, 2, 1)

    def rounded(key: int, step: int) -> Tensor:
        weight = torch.full((300, 300), 1.0, dtype=torch.bfloat16)
        ops.subspace_apply_(weight, torch.zeros(8, 8), p.rows, q.rows, alpha=0, decay=1 + 2**-8, key=key, step=step)
        return weight == 1

    first = rounded(1, 1)
    assert torch.equal(first, rounded(1, 1))
    others = [rounded(2, 1), rounded(1, 2), rounded(1 + 2**32, 1), first.roll(1), first.roll(128), first.roll(1, 0)]
    for other in others:  # the upper half of the bits is even: two draws agree in half of the elements
        assert abs(float((first == other).float().mean()) - 0.5) < 5 * 0.5 / 300


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_and_residual_together_are_the_float32_weight(path: str, dtype: torch.dtype) -> None:
    p, q = projector(37, 16, 3, 0), projector(205, 20, 3, 1)
    weight, residual = random(37, 205, dtype=dtype), random(37, 205, seed=4) * 1e-4
    exact = weight.float() + residual
    for step in range(1, 6):
        s = random(16, 20, seed=step)
        kw = dict(alpha=-1e-4, decay=0.999, key=0, step=step)
        ops.subspace_apply_(weight, s, p.rows, q.rows, residual=residual, **kw)
        ops.subspace_apply_(exact, s, p.rows, q.rows, **kw)
        assert torch.equal(weight.float() + residual, exact)
        assert torch.equal(weight, exact.to(dtype))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_direction_is_what_torch_adamw_moves_by(path: str, moments: torch.dtype, out_dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1037))
    adamw = torch.optim.AdamW([parameter], lr=1.0, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    m, v, out = torch.zeros(1037, dtype=moments), torch.zeros(1037, dtype=moments), torch.zeros(1037, dtype=out_dtype)
    hyper = AdamHyper(lr=7.0, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1)  # of which lr and decay do not count
    tolerance = max(1e-6, EPS[out_dtype], 0 if moments == torch.float32 else 2**-6)
    for step in range(1, 5):
        grad = random(1037, seed=step)
        parameter.data.zero_()
        parameter.grad = grad
        adamw.step()
        scaled = (grad * 4).to(torch.float32)
        ops.adam_direction_(m, v, scaled, out, hyper, step=step, grad_scale=0.25)
        torch.testing.assert_close(out.float(), -parameter.data, rtol=tolerance, atol=tolerance)


def test_wrong_inputs_are_refused(path: str) -> None:
    p, q = projector(10, 6, 2, 0), projector(12, 7, 2, 1)
    x, s, weight = torch.ones(3, 10), torch.ones(6, 7), torch.ones(10, 12)
    index, value = p.columns

    def refuse(what: str, op: object, *args: object, **kwargs: object) -> None:
        with pytest.raises(ValueError, match=what):
            op(*args, **kwargs)  # type: ignore[operator]

    refuse("x must be", ops.sketch, x.double(), index, value)
    refuse("x must be", ops.sketch, x.t(), index, value)
    refuse("index must be torch.int16", ops.sketch, x, index.long(), value)
    refuse("value must be torch.float16", ops.sketch, x, index, value.float())
    refuse("value must have shape", ops.sketch, x, index, value[:, :1])
    refuse("contiguous", ops.sketch, x, index.t().contiguous().t(), value)
    refuse("out_dtype", ops.sketch, x, index, value, torch.float64)
    refuse(r"index must lie in \[0, 3\)", ops.sketch, x[:, :3].contiguous(), index, value)
    refuse(r"index must lie in \[0, 3\)", ops.combine, x, index, value)
    refuse(r"index must lie in \[0, 10\)", ops.sketch, x, index.int() - 1, value)
    refuse("p_index must have shape", ops.subspace_apply_, weight, s, q.rows, p.rows, **UPDATE)
    refuse("q_index must lie", ops.subspace_apply_, weight, s[:, :3].contiguous(), p.rows, q.rows, **UPDATE)
    refuse("p_index must lie", ops.subspace_apply_, weight, s[:3], p.rows, q.rows, **UPDATE)
    refuse("residual must be", ops.subspace_apply_, weight, s, p.rows, q.rows, residual=weight.half(), **UPDATE)
    refuse("weight must be", ops.subspace_apply_, weight.t(), s, q.rows, p.rows, **UPDATE)
    assert torch.equal(weight, torch.ones(10, 12))
    m, hyper = torch.zeros(4), AdamHyper(lr=1.0, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0)
    refuse("step counts", ops.adam_direction_, m, m.clone(), m, m.clone(), hyper, step=0)
    refuse("exp_avg must", ops.adam_direction_, m.half(), m.half(), m, m.clone(), hyper, step=1)
    refuse("exp_avg_sq must", ops.adam_direction_, m, m.bfloat16(), m, m.clone(), hyper, step=1)
    refuse("out must", ops.adam_direction_, m, m.clone(), m, m.double(), hyper, step=1)
    refuse("grad must", ops.adam_direction_, m, m.clone(), m.view(2, 2), m.clone(), hyper, step=1)
