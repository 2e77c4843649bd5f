# SPDX-License-Identifier: Apache-2.0
"""Grouping pairs (token, expert) by expert, so that a few batched GEMMs do the work of many small ones.

A pair is the flat index t * E + i. Pairs are sorted by (chunk of tokens, expert). Every expert's run is padded to one
of few sizes, and experts of equal size sit side by side, so that one batched GEMM serves all of them: no expert's rows
are copied per tile, and an expert's row gradient is one product, not a sum of parts. Chunks of tokens bound the
workspace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Bank",
    "Block",
    "GroupPlan",
    "Groups",
    "SortedPairs",
    "group_chunk",
    "make_banks",
    "plan_groups",
    "sort_pairs",
]

# Bytes of one workspace of gathered inputs or gathered rows: bounds peak memory.
_CHUNK_BYTES = 256 << 20
# On the CPU a block's inputs should still be in the second-level cache when its GEMMs read them (measured at
# 2 MiB per core: 512 KiB to 8 MiB are equal within noise, 256 KiB and, in fp32, 32 MiB 20 % slower).
_CPU_BLOCK_BYTES = 2 << 20


class Block(NamedTuple):
    """Groups ``groups`` of equal padded size, which own the rows ``rows``: viewed as [n, size, ...]."""

    groups: slice
    rows: slice
    n: int
    size: int


@dataclass(eq=False)
class Groups:
    """Padded runs of one chunk of tokens. Arrays have one entry per padded row.

    token: the row's token. pair: its pair. valid: False for padding, whose token and pair are any real ones.
    slot: for every pair of the chunk its row, or ``rows`` when it has none.
    order: which of the bank's groups come in which order, on the device; None = as they are in the bank.
    """

    rows: int
    token_lo: int
    token_hi: int
    token: Tensor
    pair: Tensor
    valid: Tensor
    slot: Tensor
    order: Tensor | None
    blocks: list[Block]


@dataclass(eq=False)
class SortedPairs:
    """Pairs sorted by (chunk, expert). ``counts`` int64 [C, N] on the host; pairs of padding tokens end their chunk."""

    order: Tensor
    counts: Tensor
    per_token: int
    n_tokens: int
    chunk_tokens: int

    @property
    def chunks(self) -> int:
        return self.counts.shape[0]


@dataclass(eq=False)
class Bank:
    """Rows that one pass works on. experts: host int64 [G]; table: host int64 [G, m], row ids or -1."""

    experts: Tensor
    table: Tensor


@dataclass(eq=False)
class GroupPlan:
    """The grouped computation of one micro-batch: for every bank of rows the groups of every chunk of tokens."""

    banks: list[tuple[Bank, list[Groups]]]


def chunk_length(n_tokens: int, per_token: int, row_bytes: int) -> int:
    """Return the tokens of one chunk, when every pair of it takes ``row_bytes`` of workspace."""
    return max(1, min(n_tokens, _CHUNK_BYTES // (row_bytes * per_token)))


def count_pairs(experts: Tensor, tokens: Tensor | None, n_experts: int, chunk_tokens: int) -> Tensor:
    """Count the pairs of every (chunk, expert): int64 [C, N], where ``experts`` [T, E] is."""
    key, chunks = _sort_key(experts, tokens, n_experts, chunk_tokens)
    return key.bincount(minlength=chunks * (n_experts + 1)).view(chunks, n_experts + 1)[:, :-1]


def sort_pairs(experts: Tensor, tokens: Tensor | None, counts: Tensor, chunk_tokens: int) -> SortedPairs:
    """Sort the pairs of ``experts`` [T, E]; ``counts`` is ``count_pairs`` of them, on the host."""
    T, E = experts.shape
    key, _chunks = _sort_key(experts, tokens, counts.shape[1], chunk_tokens)
    return SortedPairs(key.sort(stable=True).indices, counts, E, T, chunk_tokens)


def group_chunk(pairs: SortedPairs, chunk: int, experts: Tensor, row_bytes: int) -> tuple[Groups, Tensor]:
    """Return the groups of the experts ``experts`` (host int64 [G]) with pairs in a chunk, and their order.

    The order is a host int64 [<= G]; ``Groups.order`` is that on the device.
    """
    device = pairs.order.device
    lo = chunk * pairs.chunk_tokens
    hi = min(lo + pairs.chunk_tokens, pairs.n_tokens)
    run = pairs.counts[chunk]
    count = run[experts]
    size = _padded(count)
    order = size.sort(stable=True).indices[int((count == 0).sum()) :]
    count, size = count[order], size[order]
    start = (run.cumsum(0) - run)[experts[order]] + lo * pairs.per_token
    rows = int(size.sum())
    n_pairs = (hi - lo) * pairs.per_token
    packed = torch.stack([order, start, count, size.cumsum(0) - size, size]).to(device, non_blocking=True)
    group = torch.repeat_interleave(packed[4], output_size=rows)
    runs = packed[1:4].index_select(1, group)
    row = torch.arange(rows, device=device)
    local = row - runs[2]
    valid = local < runs[1]
    # Padding takes the run's first pair: a real index, whose product is masked out.
    pair = pairs.order.index_select(0, torch.where(valid, runs[0] + local, runs[0]))
    slot = torch.full((n_pairs + 1,), rows, device=device)
    slot.scatter_(0, torch.where(valid, pair - lo * pairs.per_token, n_pairs), row)
    groups = Groups(
        rows=rows,
        token_lo=lo,
        token_hi=hi,
        token=pair.div(pairs.per_token, rounding_mode="floor"),
        pair=pair,
        valid=valid,
        slot=slot[:-1],
        order=packed[0],
        blocks=_blocks(size.tolist(), row_bytes, device),
    )
    return groups, order


def plan_groups(pairs: SortedPairs, banks: list[Bank], row_bytes: int) -> GroupPlan:
    """Return the groups of every bank and chunk. ``row_bytes``: bytes of one row's input."""
    planned = []
    for bank in banks:
        chunks = []
        for chunk in range(pairs.chunks):
            groups, order = group_chunk(pairs, chunk, bank.experts, row_bytes)
            if pairs.chunks == 1:
                # The bank itself takes the order of the only chunk: its rows are then used where they lie.
                bank = Bank(bank.experts[order], bank.table[order])
                groups.order = None
            if groups.rows:
                chunks.append(groups)
        planned.append((bank, chunks))
    return GroupPlan(planned)


def make_banks(active: Tensor, starts: Tensor, capacity: int, slot_bytes: int) -> list[Bank]:
    """Cut the experts with active rows into banks of at most ``capacity`` distinct rows; nothing is left out.

    active: bool [N, m], starts: int64 [N + 1], both on the host. slot_bytes: workspace of a row, which bounds the slots
    (active or not) of a bank too. An expert with more than ``capacity`` active rows appears in several banks.
    """
    m = active.shape[1]
    table = torch.where(active, starts[:-1, None] + torch.arange(m, device="cpu"), -1)
    max_groups = max(1, _CHUNK_BYTES // (slot_bytes * m))
    banks: list[Bank] = []
    run: list[int] = []
    held = 0
    for expert, used in enumerate(active.sum(1).tolist()):
        if run and (held + used > capacity or len(run) == max_groups):
            banks.append(Bank(torch.tensor(run, device="cpu"), table[run]))
            run, held = [], 0
        if used > capacity:
            for part in active[expert].nonzero().view(-1).split(capacity):
                only = torch.full((1, m), -1, device="cpu")
                only[0, part] = table[expert, part]
                banks.append(Bank(torch.tensor([expert], device="cpu"), only))
        elif used:
            run.append(expert)
            held += used
    if run:
        banks.append(Bank(torch.tensor(run, device="cpu"), table[run]))
    return banks


def _sort_key(experts: Tensor, tokens: Tensor | None, n_experts: int, chunk_tokens: int) -> tuple[Tensor, int]:
    T = experts.shape[0]
    chunks = -(-T // chunk_tokens)
    key = experts if tokens is None else torch.where(tokens[:, None], experts, n_experts)
    if chunks > 1:
        chunk = torch.arange(T, device=experts.device).div(chunk_tokens, rounding_mode="floor")
        key = key + (chunk * (n_experts + 1))[:, None]
    return key.reshape(-1), chunks


def _padded(count: Tensor) -> Tensor:
    """Round up to 8 k, k in 1 ... 8, 10, 12, 14, 16, 20, 24 ...: few distinct sizes, at most 1/4 more."""
    eighths = (count + 7).div(8, rounding_mode="floor")
    step = torch.ones_like(eighths)
    for _ in range(40):
        wide = eighths > 8 * step
        if not bool(wide.any()):
            break
        step = torch.where(wide, step * 2, step)
    return (eighths + step - 1).div(step, rounding_mode="floor") * step * 8


def _blocks(sizes: list[int], row_bytes: int, device: torch.device) -> list[Block]:
    """Yield runs of equal sizes, cut where a block's inputs would outgrow the limit."""
    limit = _CPU_BLOCK_BYTES if device.type == "cpu" else _CHUNK_BYTES
    blocks: list[Block] = []
    first = row = 0
    while first < len(sizes):
        size = sizes[first]
        most = max(1, limit // (row_bytes * size))
        last = first + 1
        while last < len(sizes) and sizes[last] == size and last - first < most:
            last += 1
        rows = (last - first) * size
        blocks.append(Block(slice(first, last), slice(row, row + rows), last - first, size))
        first, row = last, row + rows
    return blocks
