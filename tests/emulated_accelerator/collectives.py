# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_ranks.py do."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


def begin(patience_s: float = 60) -> tuple[int, Any]:
    """The rank, and the device's module; the world's group is there."""
    from tests.emulated_accelerator import device, ranks

    ranks.patience = timedelta(seconds=patience_s)
    rank = int(os.environ["RANK"])
    device.module.set_device(rank)
    dist.init_process_group(ranks.BACKEND)
    return rank, device


def collectives(folder: Path) -> dict[str, Any]:
    """Every collective that DeepSpeed and we use."""
    rank, device = begin()
    here: dict[str, Any] = {"device": device.NAME}
    mine = torch.arange(4.0, **here) + 10 * rank
    total, longest, first = mine.clone(), mine.clone(), mine.clone()
    dist.all_reduce(total)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    dist.broadcast(first, 0)
    parts, both, half = [torch.empty_like(mine) for _ in range(2)], torch.empty(8, **here), torch.empty(2, **here)
    dist.all_gather(parts, mine)
    dist.all_gather_single(both, mine)
    dist.reduce_scatter_single(half, mine)
    sent, got = [2, 1][rank], [1, 2] if rank == 0 else [2, 1]
    rows = torch.empty(3, 2, **here)
    dist.all_to_all_single(rows, torch.full((3, 2), float(rank), **here), got, [1, 2] if rank == 0 else [2, 1])
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": rank, "sent": sent})
    told = [f"from {rank}"]
    dist.broadcast_object_list(told, 1)
    late = mine.clone()
    work = dist.all_reduce(late, group=dist.new_group([0, 1]), async_op=True)
    work.wait()
    dist.barrier()
    with pytest.raises(RuntimeError, match="device type cpu"):
        dist.all_reduce(torch.ones(2))
    numbers = torch.ones(2)
    dist.all_reduce(numbers, group=dist.new_group([0, 1], backend="gloo"))
    found = {"total": total, "longest": longest, "first": first, "gathered": torch.stack(parts), "both": both}
    found |= {"half": half, "rows": rows, "late": late, "numbers": numbers}
    return {name: t.tolist() for name, t in found.items()} | {"objects": objects, "told": told}


def waits(folder: Path) -> dict[str, Any]:
    """A collective behind slow work, and work behind a slow collective; the thread goes on meanwhile."""
    rank, device = begin()
    x, side = torch.ones(4, device=device.NAME), device.module.Stream()
    dist.all_reduce(x.clone())  # so that the group is connected
    device.module.synchronize()
    device.backend.enqueue(0, lambda: time.sleep(0.3), "sleep")
    x.mul_(2)
    began = time.monotonic()
    work = dist.all_reduce(x, async_op=True)
    with device.module.stream(side):
        early = x.clone()  # nothing makes this stream wait
    side.synchronize()
    work.wait()
    y = x + 1
    waited = time.monotonic() - began
    return {"early": early.tolist(), "y": y.tolist(), "waited": waited}


def in_order(folder: Path, *, wrong: bool, one_queue: bool) -> list[float]:
    """Two groups' collectives, which the second rank may queue in the other order."""
    rank, device = begin(patience_s=3)
    device.backend.set_one_queue(one_queue)
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    tensors = [torch.ones(2, device=device.NAME) for _ in groups]
    for group, t in zip(groups, tensors, strict=True):
        dist.all_reduce(t, group=group)  # so that they are connected
    device.module.synchronize()
    for k in (1, 0) if wrong and rank == 1 else (0, 1):
        dist.all_reduce(tensors[k], group=groups[k], async_op=True)
    device.module.synchronize()
    return [t.sum().item() for t in tensors]
