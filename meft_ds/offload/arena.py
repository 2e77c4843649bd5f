# SPDX-License-Identifier: Apache-2.0
"""One block of host memory for the tensors of a store: private to one rank, or shared by the ranks of a node.

A shared block is a file in /dev/shm that only its user may open (mode 0600), named per run. It is unlinked as soon as
every rank has mapped it, so the kernel frees it when the last rank is gone, however that happens. Only a SIGKILL
between creation and that moment can leave a file behind; the next start removes such files.
"""

from __future__ import annotations

import mmap
import os
import secrets
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from meft_ds.offload.host_memory import SHM_DIR
from meft_ds.offload.partition import Ranks

_PREFIX = "meft-ds"
_ALIGN = 4096

Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]


def arena_bytes(specs: Specs) -> int:
    """Size of the block that holds `specs`, alignment included."""
    return sum(_padded(shape, dtype) for shape, dtype in specs.values())


def allocate(specs: Specs, ranks: Ranks, *, pinned: set[str], directory: Path = SHM_DIR) -> dict[str, Tensor]:
    """Zero-filled host tensors by name; the same memory on every rank of the node when there are several.

    Args:
        specs: {name: (shape, dtype)}; equal on all ranks.
        ranks: who shares. Collective when `ranks.world > 1`.
        pinned: names whose memory the accelerator copies from (page-locked on an accelerator, nothing on a CPU device).
        directory: where shared blocks live.
    """
    if ranks.world == 1:
        return {
            name: torch.zeros(shape, dtype=dtype, pin_memory=name in pinned) for name, (shape, dtype) in specs.items()
        }
    block = torch.frombuffer(_map_shared(arena_bytes(specs), ranks, directory), dtype=torch.uint8)
    tensors, offset = {}, 0
    for name, (shape, dtype) in specs.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        tensors[name] = block[offset : offset + nbytes].view(dtype).view(shape)
        offset += _padded(shape, dtype)
        if name in pinned:
            _register_pinned(tensors[name])
    return tensors


def remove_stale(directory: Path = SHM_DIR) -> list[str]:
    """Delete our own files whose creator is dead (killed before it could unlink); returns their names."""
    removed = []
    for path in directory.glob(f"{_PREFIX}-{os.getuid()}-*"):
        _, pid, started, _ = path.name.removeprefix(f"{_PREFIX}-").split("-", 3)
        if _start_time(int(pid)) == started:
            continue
        try:
            if path.lstat().st_uid == os.getuid():
                path.unlink()
                removed.append(path.name)
        except FileNotFoundError:  # another start was quicker
            pass
    return removed


def _padded(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGN) * _ALIGN


def _map_shared(nbytes: int, ranks: Ranks, directory: Path) -> mmap.mmap:
    name: list[str | None] = [None]
    if ranks.rank == 0:
        remove_stale(directory)
        me = os.getpid()
        made = f"{_PREFIX}-{os.getuid()}-{me}-{_start_time(me)}-{secrets.token_hex(8)}"
        name[0] = made
        fd = os.open(directory / made, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(fd, 0, nbytes)  # claim the pages now: a full file system would be a SIGBUS later
        except OSError:
            os.unlink(directory / made)
            raise
    dist.broadcast_object_list(name, src=dist.get_global_rank(ranks.group, 0) if ranks.group else 0, group=ranks.group)
    assert name[0] is not None
    path = directory / name[0]
    if ranks.rank != 0:
        fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, nbytes)
    os.close(fd)
    ranks.barrier()
    if ranks.rank == 0:
        path.unlink()
    ranks.barrier()
    return memory


def _register_pinned(t: Tensor) -> None:
    # Page-locking foreign memory is a CUDA runtime call that torch exposes only for its own allocations.
    if not torch.cuda.is_available():
        return
    error = torch.cuda.cudart().cudaHostRegister(t.data_ptr(), t.numel() * t.element_size(), 0)
    if int(error) != 0:
        raise RuntimeError(f"cudaHostRegister failed with error {int(error)} for {t.numel() * t.element_size()} bytes")


def _start_time(pid: int) -> str | None:
    """Start time of a live process, which tells a reused pid apart; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]
