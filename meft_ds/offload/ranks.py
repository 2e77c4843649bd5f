# SPDX-License-Identifier: Apache-2.0
"""Data-parallel ranks: who owns what, and every exchange of objects, numbers and sparse rows between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The data-parallel ranks.

    `group` works on device tensors, `host_group` on host tensors; both are None when there is only one rank, and
    `host_group` may be None where `group` does both. With several nodes `layout` lists each node's global ranks, `node`
    is this rank among those of its node, which share a store, and `across` among those of the same place on all nodes.
    """

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    host_group: dist.ProcessGroup | None = None
    layout: tuple[tuple[int, ...], ...] = ()
    node: Ranks | None = None
    across: Ranks | None = None

    @classmethod
    def everyone(cls) -> Ranks:
        """Return all processes of the run; this one alone where torch.distributed is not in use."""
        return cls(rank=dist.get_rank(), world=dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def here(self) -> Ranks:
        """The ranks of this node, which share memory."""
        return self if self.node is None else self.node

    @property
    def first(self) -> int:
        """Global rank of the first of these ranks, as torch.distributed wants a source."""
        return 0 if self.group is None else dist.get_global_rank(self.group, 0)

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` on the first rank only, and return on every rank what it returned there. Collective.

        The object is pickled on its way. A ValueError of `make` is raised on every rank.
        """
        if self.world == 1:
            return make()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = make()
            except ValueError as fault:
                told[1] = str(fault)  # raised below: the other ranks already wait in the broadcast
        dist.broadcast_object_list(told, src=self.first, group=self.group)
        if told[1] is not None:
            raise ValueError(told[1])
        made: T = told[0]
        return made

    def gather(self, item: T) -> list[T]:
        """Return every rank's `item` in the order of the ranks, on every rank. The items are pickled. Collective."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item, group=self.group)
        return items

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """Sum a few float64 numbers over ranks; every rank gets bit-identical results. Collective.

        `device` is where the numbers travel when the ranks have no group for the host.
        """
        if self.world == 1:
            return values
        control, group = self.for_numbers(device)
        t = torch.tensor(values, dtype=torch.float64, device=control)
        dist.all_reduce(t, group=group)
        return t.tolist()

    def for_numbers(self, device: torch.device) -> tuple[torch.device, dist.ProcessGroup | None]:
        """Return the device and the group for numbers that the host knows.

        With a host group they cost no wait for the device.
        """
        return (device, self.group) if self.host_group is None else (torch.device("cpu"), self.host_group)

    def barrier(self) -> None:
        """Return once every rank is here."""
        if self.world > 1:
            dist.barrier(self.group if self.host_group is None else self.host_group)

    def of_its_own(self, device: torch.device) -> Ranks:
        """Return the same ranks with groups of their own, for a thread whose collectives must not mix with others'.

        Collective over all processes of the run.
        """
        if self.world == 1:
            return self
        members = dist.get_process_group_ranks(self.group) if self.group is not None else None
        host_group = dist.new_group(members, backend="gloo")
        group = host_group if device.type == "cpu" else dist.new_group(members)
        return replace(self, group=group, host_group=host_group).on_nodes(self.layout, device)

    def on_nodes(self, layout: Sequence[Sequence[int]], device: torch.device) -> Ranks:
        """Return the same ranks with process groups within and across nodes. Collective over all processes of the run.

        `layout` lists the global ranks of each node, equally many.
        """
        if len(layout) < 2:
            return self
        me = dist.get_rank()
        parts = []
        for members in (layout, list(zip(*layout, strict=True))):
            mine = Ranks()
            for listed in members:
                # every process makes every group, its own or not
                host_group = dist.new_group(list(listed), backend="gloo")
                group = host_group if device.type == "cpu" else dist.new_group(list(listed))
                if me in listed and len(listed) > 1:
                    mine = Ranks(rank=list(listed).index(me), world=len(listed), group=group, host_group=host_group)
            parts.append(mine)
        return replace(self, layout=tuple(map(tuple, layout)), node=parts[0], across=parts[1])


@dataclass(frozen=True, kw_only=True)
class LaneRanks:
    """The data-parallel ranks as each lane's collectives use them."""

    down: Ranks
    host: Ranks
    up: Ranks
    made: bool = False  # the groups are these lanes' own

    @classmethod
    def shared(cls, ranks: Ranks) -> LaneRanks:
        """Use one group for all, for the serial order."""
        return cls(down=ranks, host=ranks, up=ranks)

    @classmethod
    def apart(cls, ranks: Ranks, device: torch.device) -> LaneRanks:
        """Give each lane groups of its own. Collective over all processes of the run."""
        down, host, up = (ranks.of_its_own(device) for _ in range(3))
        return cls(down=down, host=host, up=up, made=True)

    def close(self) -> None:
        """Destroy groups of their own, each of which has threads and connections."""
        if not (self.made and dist.is_initialized()):
            return
        parts = [part for lane in (self.down, self.host, self.up) for part in (lane, lane.node, lane.across)]
        groups = {id(g): g for part in parts if part is not None for g in (part.group, part.host_group)}
        for group in groups.values():
            if group is not None:
                dist.destroy_process_group(group)


def owned_range(n: int, ranks: Ranks) -> tuple[int, int]:
    """Return [lo, hi) of `n` items that this rank owns; sizes of the ranks' slices differ by at most one."""
    return boundary(n, ranks.rank, ranks.world), boundary(n, ranks.rank + 1, ranks.world)


def boundary(n: int, rank: int, world: int) -> int:
    """Return the first item of `rank`'s slice of `n` items."""
    return n * rank // world


def reduce_rows_to_owners(ids: Tensor, rows: Tensor, n: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Sum sparse rows over ranks and give each rank the rows it owns.

    Args:
        ids: int64 [k] on the host, sorted and unique within this rank, global row ids below `n`.
        rows: [k, w] on the device the process group works on.
        n: number of rows in all.

    Returns:
        (ids, rows): int64 [u] sorted global ids on the host that this rank owns, and float32 [u, w] sums. Contributions
        are added in rank order, so the result is the same on every run.
    """
    if ranks.world == 1:
        return ids, rows
    device, width = rows.device, rows.shape[1]
    bounds = torch.tensor([boundary(n, k, ranks.world) for k in range(ranks.world + 1)], device="cpu")
    cuts = torch.searchsorted(ids, bounds)
    control, control_group = ranks.for_numbers(device)
    sent = (cuts[1:] - cuts[:-1]).to(control)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=control_group)
    out_splits, in_splits = received.tolist(), sent.tolist()

    got_ids = torch.empty(sum(out_splits), dtype=torch.int64, device=control)
    dist.all_to_all_single(got_ids, ids.to(control), out_splits, in_splits, group=control_group)
    got_rows = torch.empty(sum(out_splits), width, dtype=rows.dtype, device=device)
    dist.all_to_all_single(got_rows, rows.contiguous(), out_splits, in_splits, group=ranks.group)

    return _summed(got_ids, got_rows, out_splits)


def sum_rows_across(ids: Tensor, rows: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Sum sparse rows over ranks, each of which gets all of them. Nodes exchange their rows so.

    Args and result as of `reduce_rows_to_owners`, contributions in the order of `ranks`; the same bits on every rank.
    """
    if ranks.world == 1:
        return ids, rows
    device = rows.device
    control, control_group = ranks.for_numbers(device)
    counts = [torch.zeros(1, dtype=torch.int64, device=control) for _ in range(ranks.world)]
    dist.all_gather(counts, torch.tensor([ids.numel()], device=control), group=control_group)
    splits = [int(count) for count in counts]
    longest = max(splits)  # not every backend gathers parts of different sizes
    padded_ids = torch.zeros(longest, dtype=torch.int64, device=control)
    padded_ids[: ids.numel()] = ids.to(control)
    padded_rows = torch.zeros(longest, rows.shape[1], dtype=rows.dtype, device=device)
    padded_rows[: rows.shape[0]] = rows
    all_ids = [torch.empty_like(padded_ids) for _ in splits]
    all_rows = [torch.empty_like(padded_rows) for _ in splits]
    dist.all_gather(all_ids, padded_ids, group=control_group)
    dist.all_gather(all_rows, padded_rows, group=ranks.group)
    got_ids = torch.cat([part[:count] for part, count in zip(all_ids, splits, strict=True)])
    got_rows = torch.cat([part[:count] for part, count in zip(all_rows, splits, strict=True)])
    return _summed(got_ids, got_rows, splits)


def _summed(ids: Tensor, rows: Tensor, splits: list[int]) -> tuple[Tensor, Tensor]:
    """Add up one row per id, float32, from the contributions of several ranks one after another."""
    union, where = torch.unique(ids, sorted=True, return_inverse=True)
    where = where.to(rows.device)
    total = torch.zeros(union.numel(), rows.shape[1], dtype=torch.float32, device=rows.device)
    start = 0
    for count in splits:
        # within one source rank ids are unique, so index_add_ meets no collision and stays deterministic
        total.index_add_(0, where[start : start + count], rows[start : start + count].float())
        start += count
    return union.cpu(), total
