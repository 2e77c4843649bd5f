# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from meft_ds.offload.ranks import Ranks, owned_range, reduce_rows_to_owners
from tests.forked import Forge
from tests.offload.arena_ranks import ranks_here


def reduced(folder: Path) -> None:
    """What a rank gets of rows that all ranks share is the sum of its part, in the order of ranks."""
    ranks = ranks_here()
    for case in range(30):
        n, w = 1 + case * 3, 4
        shares = []
        for rank in range(ranks.world):
            g = torch.Generator().manual_seed(1000 * case + rank)
            k = int(torch.randint(0, n + 1, (1,), generator=g)) if case % 7 else 0
            ids = torch.randperm(n, generator=g)[:k].sort().values
            shares.append((ids, torch.randn(k, w, generator=g)))
        expected = torch.zeros(n, w)
        touched = torch.zeros(n, dtype=torch.bool)
        for ids, rows in shares:  # rank order: the order the result must have been added in
            expected[ids] += rows
            touched[ids] = True
        ids, rows = reduce_rows_to_owners(*shares[ranks.rank], n, ranks)
        lo, hi = owned_range(n, ranks)
        own = torch.arange(n)[touched]
        own = own[(own >= lo) & (own < hi)]
        assert torch.equal(ids, own), (case, ids, own)
        assert torch.equal(rows, expected[own])


@given(n=st.integers(0, 1000), world=st.integers(1, 9))
def test_slices_cover_everything_once_and_differ_by_at_most_one(n: int, world: int) -> None:
    slices = [owned_range(n, Ranks(rank=k, world=world)) for k in range(world)]
    assert slices[0][0] == 0 and slices[-1][1] == n
    assert all(a[1] == b[0] for a, b in zip(slices, slices[1:], strict=False))
    sizes = [hi - lo for lo, hi in slices]
    assert max(sizes) - min(sizes) <= 1


def test_rows_reduced_over_three_ranks_equal_the_sum_in_rank_order_bit_for_bit(forge: Forge, tmp_path: Path) -> None:
    forge.results(reduced, tmp_path, world=3)
