# SPDX-License-Identifier: Apache-2.0
"""Row moves are exact; sums of squares are exact enough, honest about non-finite values, and do not see threads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meft_ds import ops

some = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float64])


def _values(n: int, w: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(n * w).reshape(n, w).remainder(2039).to(dtype)


@some
@given(
    n=st.integers(1, 50),
    w=st.sampled_from([1, 3, 16, 33, 3000]),
    k=st.integers(0, 80),
    dtype=dtypes,
    part=st.booleans(),
)
def test_gather_rows_is_indexing(path: str, n: int, w: int, k: int, dtype: torch.dtype, part: bool) -> None:
    wide = _values(n, 2 * w, dtype)
    src = wide[:, w:] if part else wide[:, :w].contiguous()
    out = torch.zeros(k, w + 2, dtype=dtype)[:, 1:-1] if part else torch.zeros(k, w, dtype=dtype)
    ids = torch.randint(0, n, (k,))
    ops.gather_rows(src, ids, out)
    assert torch.equal(out, src[ids])


@some
@given(n=st.integers(1, 50), w=st.sampled_from([1, 3, 16, 33, 3000]), dtype=dtypes, part=st.booleans(), data=st.data())
def test_scatter_rows_is_assignment(
    path: str, n: int, w: int, dtype: torch.dtype, part: bool, data: st.DataObject
) -> None:
    k = data.draw(st.integers(0, n))
    wide = torch.zeros(n, 2 * w, dtype=dtype)
    dst = wide[:, w:] if part else torch.zeros(n, w, dtype=dtype)
    ids, rows = torch.randperm(n)[:k], _values(k, w, dtype)
    expected = torch.zeros(n, w, dtype=dtype)
    expected[ids] = rows
    ops.scatter_rows_(dst, ids, rows)
    assert torch.equal(dst, expected)
    assert not wide[:, :w].any()


@some
@given(
    n=st.sampled_from([0, 1, 15, 16, 17, 16384, 16385, 300001]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1.0, 1e-3, 2.0**13]),
)
def test_sq_norm_equals_float64_sum(path: str, n: int, dtype: torch.dtype, scale: float) -> None:
    t = (torch.randn(n) * scale).to(dtype)
    assert ops.sq_norm(t) == pytest.approx(float(t.double().square().sum()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sq_norm_is_the_same_for_any_number_of_threads(path: str, dtype: torch.dtype) -> None:
    t = torch.randn(3_000_017).to(dtype)
    before = torch.get_num_threads()
    try:
        results = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.add(ops.sq_norm(t))
    finally:
        torch.set_num_threads(before)
    assert len(results) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at", [0, 17, 99_999])
def test_sq_norm_shows_non_finite_values(path: str, dtype: torch.dtype, at: int) -> None:
    t = torch.zeros(100_000, dtype=dtype)
    t[at] = math.inf
    assert ops.sq_norm(t) == math.inf
    t[at] = math.nan
    assert math.isnan(ops.sq_norm(t))


def test_sq_norm_does_not_overflow_where_fp32_would(path: str) -> None:
    assert ops.sq_norm(torch.full((4,), 1e30)) == pytest.approx(4e60, rel=1e-6)


def test_wrong_inputs_are_named(path: str) -> None:
    src, ids = torch.zeros(4, 3), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="^ids "):
        ops.gather_rows(src, torch.tensor([0, 4]), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="^ids "):
        ops.scatter_rows_(src, torch.tensor([-1, 0]), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="^out "):
        ops.gather_rows(src, ids, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="^out "):
        ops.gather_rows(src, ids, torch.zeros(2, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match="^src "):
        ops.gather_rows(torch.zeros(3, 4).t(), ids, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="^t "):
        ops.sq_norm(torch.zeros(3, dtype=torch.float64))
