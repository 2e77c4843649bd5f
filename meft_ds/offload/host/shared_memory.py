# SPDX-License-Identifier: Apache-2.0
"""One block of host memory for the tensors of a store: private to one rank, or shared by the ranks of a node.

A shared block is a file in /dev/shm that never had a name: ranks open it through the first rank's process, and the
kernel frees it when the last rank is gone, however that happens. Where that cannot be (a file system without such
files, ranks that do not see each other's processes) it is a file that only its user may open (mode 0600), named per
run and unlinked as soon as every rank has mapped it; a SIGKILL before that leaves it to the next start to remove.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from meft_ds.offload.host.memory import SHM_DIR, no_shared_memory
from meft_ds.offload.host.page_locked import lock, page_locked, pages
from meft_ds.offload.ranks import Ranks

_PREFIX = "meft-ds"
_OURS = re.compile(_PREFIX + r"-(?P<uid>\d{1,10})-(?P<pid>\d{1,10})-(?P<started>\d{1,20})-[0-9a-f]{16}", re.ASCII)


class TensorSpec(NamedTuple):
    """A host tensor to allocate; `pinned`: page-locked where there is CUDA, because an accelerator copies from it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pinned: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def padded(self) -> int:
        """Bytes that it takes in a block."""
        return pages(self.nbytes)


Specs = dict[str, TensorSpec]


def arena_bytes(specs: Specs) -> int:
    """Return the size of the block that holds `specs`, alignment included."""
    return sum(spec.padded for spec in specs.values())


def allocate(specs: Specs, ranks: Ranks, *, directory: Path = SHM_DIR) -> dict[str, Tensor]:
    """Return zero-filled host tensors by name; the same memory on every rank of the node when there are several.

    Args:
        specs: by name; equal on all ranks.
        ranks: who shares. Collective when `ranks.world > 1`.
        directory: where shared blocks live.

    Raises:
        ValueError: on every rank, when a shared block cannot be had or page-locked.
    """
    if ranks.world == 1:
        return {name: _private(spec) for name, spec in specs.items()}
    memory = _map_shared(arena_bytes(specs), ranks, directory)
    view = memoryview(memory)  # lives as long as the tensors do, and can be watched
    block = torch.frombuffer(view, dtype=torch.uint8)
    tensors, offset = {}, 0
    for name, spec in specs.items():
        tensors[name] = block[offset : offset + spec.nbytes].view(spec.dtype).view(spec.shape)
        offset += spec.padded
    if pinned := [tensors[name] for name, spec in specs.items() if spec.pinned]:
        _lock_pages(view, memory, pinned, ranks)
    return tensors


def remove_stale(directory: Path = SHM_DIR) -> list[str]:
    """Delete our own files whose creator is dead (killed before it could unlink); returns their names.

    Anybody may put anything into `directory`: what this package did not make is left alone, whatever its name is, and
    what cannot be deleted stays. Never raises OSError.
    """
    removed = []
    with contextlib.suppress(OSError):  # a folder that this user may not list
        for entry in list(os.scandir(directory)):
            made = _OURS.fullmatch(entry.name)
            if made is None or int(made["uid"]) != os.getuid() or _start_time(int(made["pid"])) == made["started"]:
                continue
            with contextlib.suppress(OSError):  # another start was quicker, or the folder's owner does not let us
                if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                    os.unlink(entry.path)
                    removed.append(entry.name)
    return removed


def _map_shared(nbytes: int, ranks: Ranks, directory: Path) -> mmap.mmap:
    if ranks.rank == 0:
        remove_stale(directory)
    memory = _map(nbytes, ranks, directory, _make_nameless)
    if memory is None:
        memory = _map(nbytes, ranks, directory, _make_named)
        ranks.barrier()  # it has no name any more
    if memory is None:
        raise ValueError(
            f"the ranks of this node cannot open the same file in {directory}; start them as one user, with one "
            f"{directory}"
        )
    return memory


def _map(nbytes: int, ranks: Ranks, directory: Path, make: Callable[[Path], tuple[int, str]]) -> mmap.mmap | None:
    """Let the first rank make a file and all map it; return None if some rank cannot open it. Collective.

    Raises:
        ValueError: on every rank, when there is no room or no rank may map so much.
    """
    fd, path, place, fault, memory = -1, "", None, "", None
    try:
        if ranks.rank == 0:
            try:
                fd, path = make(directory)
                place = _place(fd)
                os.posix_fallocate(fd, 0, nbytes)  # claim the pages now: a full file system would be a SIGBUS later
            except OSError as e:
                fault = no_shared_memory(nbytes, directory, e) if fd >= 0 or not _unsupported(e) else ""
            except Exception as e:  # the other ranks wait for what this one says
                fault = no_shared_memory(nbytes, directory, OSError(f"{type(e).__name__}: {e}"))
        path, place, fault = ranks.from_first(lambda: (path, place, fault))
        _raise_if(fault)
        if path and ranks.rank != 0:
            with contextlib.suppress(OSError):  # where process ids mean other processes it may be anything: do not wait
                fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY)
        opened = fd >= 0 and _place(fd) == place  # the same process id may be another process here
        if opened:
            try:
                memory = mmap.mmap(fd, nbytes)
            except (OSError, OverflowError, ValueError) as e:
                fault = no_shared_memory(nbytes, directory, OSError(str(e)))
        states = ranks.gather((opened, fault))
        _raise_if(next((fault for _, fault in states if fault), ""))
        return memory if all(there for there, _ in states) else None
    finally:
        if ranks.rank == 0 and path.startswith(f"{directory}/"):
            with contextlib.suppress(OSError):  # a clean-up of somebody's was quicker
                os.unlink(path)
        if fd >= 0:
            os.close(fd)


def _make_nameless(directory: Path) -> tuple[int, str]:
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    return fd, f"/proc/{os.getpid()}/fd/{fd}"


def _make_named(directory: Path) -> tuple[int, str]:
    me = os.getpid()
    path = directory / f"{_PREFIX}-{os.getuid()}-{me}-{_start_time(me)}-{secrets.token_hex(8)}"
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), str(path)


def _place(fd: int) -> tuple[int, int]:
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino


def _unsupported(e: OSError) -> bool:
    return e.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)


def _raise_if(fault: str) -> None:
    if fault:
        raise ValueError(fault)


def _private(spec: TensorSpec) -> Tensor:
    if not (spec.pinned and torch.cuda.is_available()):
        return torch.zeros(spec.shape, dtype=spec.dtype, device="cpu")
    return page_locked(spec.nbytes, torch.device("cuda")).view(spec.dtype).view(spec.shape)


def _lock_pages(view: memoryview, memory: mmap.mmap, tensors: list[Tensor], ranks: Ranks) -> None:
    """Page-lock tensors in `memory` until nobody refers to `view` any more. Collective.

    Raises:
        ValueError: on every rank, when it fails on one; nothing is page-locked then.
    """
    if not torch.cuda.is_available():
        return
    unlock, fault = lock(view, memory, tensors)
    faults = ranks.gather(fault and f"rank {ranks.rank} {fault}")
    if any(faults):
        unlock()
    _raise_if(next(filter(None, faults), ""))


def _start_time(pid: int) -> str | None:
    """Start time of a live process, which tells a reused pid apart; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()  # a process may give itself any name
    except OSError:
        return None
    return stat.rpartition(b")")[2].split()[19].decode()
