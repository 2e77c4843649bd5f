# SPDX-License-Identifier: Apache-2.0
"""Grouping pairs (token, expert) by expert into equal tiles, so that a few batched GEMMs do the work of many small ones.

A pair is the flat index t * E + i. Pairs are sorted by (chunk of tokens, expert); every expert's run is cut into tiles of
``size`` rows, the last one padded. All index arithmetic runs on the tensors' own device and without waiting for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Bank", "GroupPlan", "SortedPairs", "Tiles", "make_banks", "plan_groups", "sort_pairs"]

# Bytes of one workspace of gathered inputs. On an accelerator it bounds peak memory. On the CPU a block of rows that fits
# the second-level cache between its gather and its GEMMs was measured fastest.
_CHUNK_BYTES = 256 << 20
_CPU_BLOCK_BYTES = 1 << 20


class Block(NamedTuple):
    """A run of whole tiles: ``tiles`` slices arrays with a row per tile, ``rows`` those with a row per tile row."""

    tiles: slice
    rows: slice


@dataclass(eq=False)
class Tiles:
    """Tiles of one chunk of tokens. ``group`` [n] says whose rows a tile multiplies; the other arrays have n * size rows.

    token: token of each tile row (any token for padding). pair: its pair (any for padding). valid: False for padding.
    slot: for every pair of the chunk its tile row, or ``rows`` when it has none.
    first: host int64 [G + 1], first tile of every group; empty when only an upper bound of tiles is known.
    """

    size: int
    count: int
    token_lo: int
    token_hi: int
    group: Tensor
    token: Tensor
    pair: Tensor
    valid: Tensor
    slot: Tensor
    first: Tensor

    @property
    def rows(self) -> int:
        return self.count * self.size

    def blocks(self, row_bytes: int) -> Iterator[Block]:
        """Runs of tiles small enough for one workspace of rows of ``row_bytes``."""
        limit = _CPU_BLOCK_BYTES if self.token.device.type == "cpu" else _CHUNK_BYTES
        step = max(1, limit // (row_bytes * self.size))
        for lo in range(0, self.count, step):
            hi = min(lo + step, self.count)
            yield Block(slice(lo, hi), slice(lo * self.size, hi * self.size))


@dataclass(eq=False)
class SortedPairs:
    """Live pairs sorted by (chunk, expert). ``bounds`` [C * (N + 1) + 1]: where each run starts; run N of a chunk is dead."""

    order: Tensor
    bounds: Tensor
    per_token: int
    n_experts: int
    n_tokens: int
    chunk_tokens: int
    tile: int

    @property
    def chunks(self) -> int:
        return -(-self.n_tokens // self.chunk_tokens)

    def tokens_of(self, chunk: int) -> tuple[int, int]:
        return chunk * self.chunk_tokens, min((chunk + 1) * self.chunk_tokens, self.n_tokens)

    def counts(self) -> Tensor:
        """Live pairs of every (chunk, expert): int64 [C, N] on the device."""
        return self.bounds.diff().view(self.chunks, self.n_experts + 1)[:, :-1]

    def all_tiles(self, chunk: int) -> Tiles:
        """Tiles of all experts (group = expert) without asking the device how many there are: an upper bound."""
        at = chunk * (self.n_experts + 1)
        runs = self.bounds[at : at + self.n_experts + 1]
        counts = runs.diff()
        lo, hi = self.tokens_of(chunk)
        if counts.device.type == "cpu":
            n_tiles = int(_tiles_of(counts, self.tile).sum())
        else:
            n_tiles = (hi - lo) * self.per_token // self.tile + self.n_experts
        return self._tiles(chunk, runs[:-1], counts, n_tiles, counts.new_zeros(0))

    def tiles(self, chunk: int, starts: Tensor, counts: Tensor) -> Tiles:
        """Tiles of chosen groups, whose runs are ``starts`` and ``counts``, both int64 [G] on the host."""
        per_group = _tiles_of(counts, self.tile)
        first = torch.cat([per_group.new_zeros(1), per_group.cumsum(0)])
        runs = torch.stack([starts, counts]).to(self.order.device, non_blocking=True)
        return self._tiles(chunk, runs[0], runs[1], int(first[-1]), first)

    def _tiles(self, chunk: int, starts: Tensor, counts: Tensor, n_tiles: int, first: Tensor) -> Tiles:
        lo, hi = self.tokens_of(chunk)
        device = self.order.device
        ends = _tiles_of(counts, self.tile).cumsum(0)
        index = torch.arange(n_tiles, device=device)
        group = torch.searchsorted(ends, index, right=True).clamp_(max=max(counts.shape[0] - 1, 0))
        skipped = (index - (ends - _tiles_of(counts, self.tile))[group]) * self.tile
        row = torch.arange(self.tile, device=device)
        valid = (row < (counts[group] - skipped)[:, None]).view(-1)
        at = ((starts[group] + skipped)[:, None] + row).view(-1)
        # Padding points at the first pair of the chunk: a real index, whose product is masked out.
        pair = self.order[torch.where(valid, at, lo * self.per_token)]
        n_rows = n_tiles * self.tile
        n_pairs = (hi - lo) * self.per_token
        slot = torch.full((n_pairs + 1,), n_rows, device=device)
        slot.scatter_(0, torch.where(valid, pair - lo * self.per_token, n_pairs), torch.arange(n_rows, device=device))
        return Tiles(
            size=self.tile,
            count=n_tiles,
            token_lo=lo,
            token_hi=hi,
            group=group,
            token=pair.div(self.per_token, rounding_mode="floor"),
            pair=pair,
            valid=valid,
            slot=slot[:-1],
            first=first,
        )


def sort_pairs(experts: Tensor, live: Tensor | None, n_experts: int, row_bytes: int) -> SortedPairs:
    """Sorts the pairs of ``experts`` [T, E]; pairs with ``live`` [T, E] False come last in their chunk and get no tile."""
    T, E = experts.shape
    chunk_tokens = max(1, min(T, _CHUNK_BYTES // (row_bytes * E)))
    chunks = -(-T // chunk_tokens)
    key = experts if live is None else torch.where(live, experts, n_experts)
    if chunks > 1:
        chunk = torch.arange(T, device=experts.device).div(chunk_tokens, rounding_mode="floor")
        key = key + (chunk * (n_experts + 1))[:, None]
    ordered = key.reshape(-1).sort(stable=True)
    runs = torch.arange(chunks * (n_experts + 1) + 1, device=experts.device)
    bounds = torch.searchsorted(ordered.values, runs)
    return SortedPairs(
        order=ordered.indices,
        bounds=bounds,
        per_token=E,
        n_experts=n_experts,
        n_tokens=T,
        chunk_tokens=chunk_tokens,
        tile=_tile_size(chunk_tokens * E / n_experts),
    )


@dataclass(eq=False)
class Bank:
    """Rows that one pass works on. experts: host int64 [G]; table: host int64 [G * m], row ids or -1."""

    experts: Tensor
    table: Tensor


@dataclass(eq=False)
class GroupPlan:
    """The grouped computation of one micro-batch: for every bank of rows the tiles of every chunk of tokens."""

    banks: list[tuple[Bank, list[Tiles]]]


def plan_groups(pairs: SortedPairs, counts: Tensor, banks: list[Bank]) -> GroupPlan:
    """``counts``: ``pairs.counts()``, moved to the host; ``banks``: from ``make_banks``."""
    planned = []
    for bank in banks:
        chunks = []
        for chunk in range(pairs.chunks):
            starts = counts[chunk].cumsum(0) - counts[chunk] + chunk * pairs.chunk_tokens * pairs.per_token
            tiles = pairs.tiles(chunk, starts[bank.experts], counts[chunk][bank.experts])
            if tiles.count:
                chunks.append(tiles)
        planned.append((bank, chunks))
    return GroupPlan(planned)


def make_banks(active: Tensor, starts: Tensor, capacity: int, slot_bytes: int) -> list[Bank]:
    """Cuts the experts with active rows into banks of at most ``capacity`` distinct rows; nothing is left out.

    active: bool [N, m], starts: int64 [N + 1], both on the host. slot_bytes: bytes of a row's workspace, which bounds the
    slots (active or not) of a bank too. An expert with more than ``capacity`` active rows appears in several banks.
    """
    m = active.shape[1]
    rows = starts[:-1, None] + torch.arange(m)
    table = torch.where(active, rows, -1)
    max_groups = max(1, _CHUNK_BYTES // (slot_bytes * m))
    banks: list[Bank] = []
    run: list[int] = []
    held = 0
    used = active.sum(1).tolist()

    def close() -> None:
        nonlocal held
        if run:
            experts = torch.tensor(run)
            banks.append(Bank(experts, table[experts].view(-1)))
            run.clear()
        held = 0

    for expert in (e for e, n in enumerate(used) if n):
        if used[expert] > capacity:
            close()
            slots = active[expert].nonzero().view(-1)
            for part in slots.split(capacity):
                only = torch.full((m,), -1)
                only[part] = table[expert, part]
                banks.append(Bank(torch.tensor([expert]), only))
            continue
        if held + used[expert] > capacity or len(run) == max_groups:
            close()
        run.append(expert)
        held += used[expert]
    close()
    return banks


def _tiles_of(counts: Tensor, size: int) -> Tensor:
    return (counts + (size - 1)).div(size, rounding_mode="floor")


def _tile_size(mean_pairs: float) -> int:
    """Power of two near half the mean run: larger tiles waste padding, smaller ones repeat the rows' traffic."""
    size = 8
    while size < 64 and size < mean_pairs / 2:
        size *= 2
    return size
