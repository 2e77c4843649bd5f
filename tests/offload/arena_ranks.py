# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_arena.py do: functions that a forge runs on every rank, over the directory `<folder>/shm`."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from meft_ds.offload.host import page_locked, shared_memory
from meft_ds.offload.host.shared_memory import TensorSpec, allocate
from meft_ds.offload.ranks import Ranks


def ranks_here() -> Ranks:
    dist.init_process_group("gloo")
    return Ranks(rank=dist.get_rank(), world=dist.get_world_size(), group=dist.group.WORLD)


def share(folder: Path, *, strays: int = 0, blind: bool = False, sleeps: bool = False) -> None:
    """Two tensors that each rank writes and both read. `blind`: no rank can open another's nameless file."""
    ranks, directory = ranks_here(), folder / "shm"
    if blind:
        shared_memory._make_nameless = lambda d: (os.open(d, os.O_TMPFILE | os.O_RDWR), "/x")
    specs = {"a": TensorSpec((5, 3), torch.float32), "b": TensorSpec((7,), torch.bfloat16)}
    t = allocate(specs, ranks, directory=directory)
    assert len(list(directory.iterdir())) == strays, "the file must be gone as soon as everybody has mapped it"
    if ranks.rank == 0:
        t["a"].fill_(3.0)
    dist.barrier()
    assert t["a"].sum() == 45 and t["b"].sum() == 0
    dist.barrier()
    if ranks.rank == 1:
        t["b"].fill_(2.0)
    dist.barrier()
    assert t["b"].float().sum() == 14
    if sleeps:
        print("shared", flush=True)
        time.sleep(60)


def fails(folder: Path) -> str:
    """The first rank cannot make the file."""
    ranks = ranks_here()

    def make(directory: Path) -> None:
        raise RuntimeError("planted")

    shared_memory._make_nameless = make
    try:
        allocate({"a": TensorSpec((5, 3), torch.float32)}, ranks, directory=folder / "shm")
    except ValueError as fault:
        return str(fault)
    return ""


def lock(folder: Path, *, refused: bool) -> str:
    """Lock pages by stand-ins for CUDA's calls, one of which may refuse on the second rank; return its error."""
    ranks, directory, found = ranks_here(), folder / "shm", ""
    locked: dict[int, int] = {}
    seen: list[bytes] = []

    def mapped() -> list[str]:
        with open("/proc/self/maps") as maps:
            return [line for line in maps if str(directory) in line]

    def register(address: int, nbytes: int) -> int:
        if refused and ranks.rank == 1 and locked:
            return 2
        locked[address] = nbytes
        return 0

    def unregister(address: int) -> None:
        assert mapped()
        seen.append(ctypes.string_at(address, 1))  # a fault, were it unmapped
        del locked[address]

    page_locked._register, page_locked._unregister = register, unregister
    torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
    torch.cuda.synchronize = lambda device: None
    specs = {
        "a": TensorSpec((5, 3), torch.float32),
        "b": TensorSpec((5000,), torch.uint8, True),
        "c": TensorSpec((4,), torch.uint8, True),
    }
    try:
        t = allocate(specs, ranks, directory=directory)
    except ValueError as fault:
        found = str(fault)
    else:
        assert sorted(locked.values()) == [4, 5000] and mapped()
        t["b"].fill_(7), t["c"].fill_(7)
        part = t["c"][1:]
        t.clear()
        gc.collect()
        assert len(locked) == 2, "somebody still uses it"
        del part
        gc.collect()
        assert seen == [bytes([7])] * 2
    assert not locked and not mapped()
    return found
