# SPDX-License-Identifier: Apache-2.0
"""Projectors: what a draw promises, and that both views and the products through them mean the same matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from meft_ds import ops
from meft_ds.ops.projector import Projector, compress, expand, overlap, seed_of

CPU = torch.device("cpu")


@st.composite
def projectors(draw: st.DrawFn) -> Projector:
    m = draw(st.integers(1, 40))
    d = draw(st.integers(1, 30))
    k = draw(st.integers(1, min(d, 6)))
    p = Projector.draw(m, d, k, draw(st.integers(0, 2**63 - 1)), CPU)
    if draw(st.booleans()):
        p = p.with_values(torch.randn(m, k, generator=torch.Generator().manual_seed(0)))
    return p


def from_columns(p: Projector) -> Tensor:
    """[m, d] read off the column view; padding adds 0."""
    index, value = p.columns
    out = torch.zeros(p.dim, p.m)
    return out.scatter_add_(1, ops.positions(index), value.float()).T


@given(projectors())
def test_row_and_column_view_are_the_same_matrix(p: Projector) -> None:
    assert torch.equal(from_columns(p), p.dense())


@given(projectors())
def test_a_row_has_k_distinct_columns_one_in_each_stratum(p: Projector) -> None:
    at = p.positions
    for c in range(p.k):
        low, high = p.dim * c // p.k, p.dim * (c + 1) // p.k
        assert ((at[:, c] >= low) & (at[:, c] < high)).all()


@given(projectors())
def test_columns_have_length_one_unless_empty(p: Projector) -> None:
    length, count = p.dense().norm(dim=0), torch.bincount(p.positions.view(-1), minlength=p.dim)
    torch.testing.assert_close(length, (count > 0).float(), atol=1e-3, rtol=0)


@given(projectors())
def test_rows_are_dealt_evenly_over_the_columns_of_a_stratum(p: Projector) -> None:
    count = torch.bincount(p.positions.view(-1), minlength=p.dim)
    for c in range(p.k):
        share = count[p.dim * c // p.k : p.dim * (c + 1) // p.k]
        assert share.max() - share.min() <= 1
        if p.m >= len(share):
            assert share.min() >= 1


def test_columns_of_one_stratum_are_exactly_orthogonal() -> None:
    p = Projector.draw(64, 32, 4, 0, CPU)
    for c in range(4):
        block = overlap(p, p)[8 * c : 8 * c + 8, 8 * c : 8 * c + 8]
        assert torch.equal(block, block.diagonal().diag())


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_draw() -> None:
    one, same, other = (Projector.draw(50, 20, 4, seed, CPU) for seed in (7, 7, 8))
    assert torch.equal(one.row_index, same.row_index) and torch.equal(one.row_value, same.row_value)
    assert one.digest() == same.digest() != other.digest()


def test_the_digest_sees_a_single_value() -> None:
    p = Projector.draw(50, 20, 4, 0, CPU)
    values = p.row_value.float()
    values[3, 1] *= -1
    assert p.with_values(values).digest() != p.digest()


def test_seeds_separate_their_parts() -> None:
    assert seed_of(1, "layer", 2) == seed_of(1, "layer", 2)
    assert len({seed_of("a", "b"), seed_of("ab"), seed_of("a", "b", 0), seed_of("b", "a")}) == 4
    assert 0 <= seed_of("x") < 1 << 63


def test_random_signs_are_balanced() -> None:
    positive = (Projector.draw(4000, 500, 4, 0, CPU).row_value > 0).float().mean()
    assert 0.45 < positive < 0.55  # the published code's "binary" start is all negative


@pytest.mark.parametrize(
    ("m", "d", "rows", "columns"),
    [(20, 40_000, torch.int16, torch.int16), (40_000, 4, torch.int16, torch.int16)]
    + [(20, 70_000, torch.int32, torch.int16), (70_000, 4, torch.int16, torch.int32)],
)
def test_large_dimensions_use_all_16_bits_and_then_32(m: int, d: int, rows: torch.dtype, columns: torch.dtype) -> None:
    p, g = Projector.draw(m, d, 2, 0, CPU), torch.randn(m, 3)
    assert (p.row_index.dtype, p.columns[0].dtype) == (rows, columns)
    largest = max(int(p.positions.max()), int(ops.positions(p.columns[0]).max()))
    assert 32_767 < largest < max(m, d)
    torch.testing.assert_close(ops.combine(g, *p.columns), p.dense().T @ g, atol=1e-3, rtol=1e-4)
    back = torch.randn(2, d)
    torch.testing.assert_close(ops.sketch(back, *p.rows), back @ p.dense().T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compress_and_expand_match_dense_products(dtype: torch.dtype) -> None:
    p, q = Projector.draw(30, 13, 3, 1, CPU), Projector.draw(23, 11, 4, 2, CPU)
    g, s = torch.randn(30, 23).to(dtype), torch.randn(13, 11)
    torch.testing.assert_close(compress(g, p, q), p.dense().T @ g.float() @ q.dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expand(s, p, q), p.dense() @ s @ q.dense().T, atol=1e-5, rtol=1e-5)


@given(projectors(), projectors())
def test_expand_is_the_adjoint_of_compress(p: Projector, q: Projector) -> None:
    generator = torch.Generator().manual_seed(1)
    g, s = torch.randn(p.m, q.m, generator=generator), torch.randn(p.dim, q.dim, generator=generator)
    left, right = (compress(g, p, q) * s).sum(), (g * expand(s, p, q)).sum()
    torch.testing.assert_close(left, right, atol=1e-3, rtol=1e-4)


def test_gram_and_overlap_match_dense_products() -> None:
    p, q = Projector.draw(30, 13, 3, 1, CPU), Projector.draw(30, 17, 2, 2, CPU)
    torch.testing.assert_close(overlap(p, p), (p.dense().T @ p.dense()).double(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(overlap(p, q), (p.dense().T @ q.dense()).double(), atol=1e-6, rtol=1e-5)


def test_new_values_keep_positions_and_leave_the_old_projector_alone() -> None:
    p = Projector.draw(30, 13, 3, 1, CPU)
    before, columns = p.row_value.clone(), p.columns
    values = torch.randn(30, 3)
    other = p.with_values(values)
    assert torch.equal(other.row_index, p.row_index) and torch.equal(other.columns[0], columns[0])
    assert torch.equal(p.row_value, before)
    torch.testing.assert_close(from_columns(other), other.dense(), atol=0, rtol=0)
    torch.testing.assert_close(other.row_value.float(), p.normalised(values), atol=1e-3, rtol=1e-3)


def test_a_projector_costs_four_bytes_a_nonzero_in_each_view() -> None:
    assert Projector.draw(64, 32, 4, 0, CPU).nbytes() == 2 * 64 * 4 * 4  # no padding: 64 * 4 / 32 is whole


@pytest.mark.parametrize(("d", "k"), [(4, 5), (4, 0)])
def test_impossible_numbers_of_nonzeros_are_refused(d: int, k: int) -> None:
    with pytest.raises(ValueError, match="lower nonzeros"):
        Projector.draw(10, d, k, 0, CPU)
