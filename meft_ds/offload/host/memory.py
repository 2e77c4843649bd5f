# SPDX-License-Identifier: Apache-2.0
"""Host memory: what is free (cgroup limits included), and the check before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

_CGROUP_V2 = Path("/sys/fs/cgroup")
_CGROUP_V1 = Path("/sys/fs/cgroup/memory")
SHM_DIR = Path("/dev/shm")


def free_host_bytes() -> int:
    """Bytes this process may still allocate: the least of the machine's free memory and every cgroup limit above us."""
    limits = [_meminfo_available()]
    limits += [free for free in (_cgroup_v2_free(), _cgroup_v1_free()) if free is not None]
    return max(0, min(limits))


def free_shared_bytes(directory: Path = SHM_DIR) -> int:
    """Bytes free in the shared-memory file system, which containers often limit to 64 MiB; 0 where there is none."""
    try:
        stat = os.statvfs(directory)
    except OSError:  # one rank must not raise while the others wait for its number
        return 0
    return stat.f_bavail * stat.f_frsize


def check_host_memory(needed: int, free: int, *, limit_gb: float | None, detail: str, knobs: Sequence[str]) -> None:
    """Stop before allocating when the plan does not fit.

    Args:
        needed: bytes this node is about to hold for the offloaded state.
        free: bytes free on this node now.
        limit_gb: the user's own limit (`meft_offload.host_memory_gb`), in GiB, or None.
        detail: what makes up `needed`, for the message.
        knobs: what the methods in use can be told to take less by.

    Raises:
        ValueError: with both numbers and the keys to turn.
    """
    turn = ", ".join([*knobs, 'set "moments_dtype": "bf16" (halves the moments)'])
    turn += ', or train fewer base tensors ("train")'
    if limit_gb is not None and needed > limit_gb * 2**30:
        raise ValueError(
            f"meft_offload needs {in_units(needed)} of host memory ({detail}) but meft_offload.host_memory_gb allows "
            f"{in_units(limit_gb * 2**30)}. Raise host_memory_gb, {turn}."
        )
    if needed > free:
        raise ValueError(
            f"meft_offload needs {in_units(needed)} of host memory ({detail}) but only {in_units(free)} are free on "
            f"this node (container limits included). Free memory, or {turn}."
        )


def check_shared_memory(needed: int, free: int, *, knobs: Sequence[str]) -> None:
    """Stop when the node's shared store does not fit into /dev/shm.

    Raises:
        ValueError: with both numbers and what to do.
    """
    if needed > free:
        turn = "".join(f"{knob}, " for knob in knobs)
        raise ValueError(
            f"meft_offload shares one store of {in_units(needed)} between the ranks of this node, but {SHM_DIR} has "
            f"only {in_units(free)} free. Enlarge it (containers: --shm-size), {turn}or run one rank."
        )


def no_shared_memory(needed: int, directory: Path, error: OSError) -> str:
    """What to say when shared memory that was free a moment ago cannot be taken."""
    return (
        f"meft_offload could not take {in_units(needed)} of {directory}, which the ranks of this node share: "
        f"{error.strerror or error}; {in_units(free_shared_bytes(directory))} are free now. Enlarge it (containers: "
        "--shm-size), see who else fills it and what limits this process (ulimit -a), or run one rank."
    )


def _meminfo_available() -> int:
    with open("/proc/meminfo") as f:
        for line in f:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_v2_free() -> int | None:
    path = _own_cgroup("")
    if path is None:
        return None
    free: int | None = None
    own = _CGROUP_V2 / path.lstrip("/")
    # a limit may sit on any ancestor; inside a container the namespace root is the first that we can see
    for folder in (own, *own.parents):
        limit = _read_int(folder / "memory.max")
        used = _read_int(folder / "memory.current")
        if limit is not None and used is not None:
            here = limit - used + _stat_value(folder / "memory.stat", "inactive_file")
            free = here if free is None else min(free, here)
        if folder == _CGROUP_V2:
            break
    return free


def _cgroup_v1_free() -> int | None:
    path = _own_cgroup("memory")
    if path is None:
        return None
    for folder in (_CGROUP_V1 / path.lstrip("/"), _CGROUP_V1):
        limit = _read_int(folder / "memory.limit_in_bytes")
        used = _read_int(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            return limit - used + _stat_value(folder / "memory.stat", "total_inactive_file")
    return None


def _own_cgroup(controller: str) -> str | None:
    """Our path in the given v1 hierarchy, or in the v2 one for the empty name."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return None


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max": no limit here
        return None


def _stat_value(path: Path, key: str) -> int:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except OSError:
        pass
    return 0


_ON_DEVICE = 0.05  # share of the accelerator's memory that moments may take by themselves


def state_on_device(choice: str, device: torch.device, nbytes: int) -> bool:
    """Whether state of `nbytes` per rank lives on the accelerator; `choice`: "auto", "cpu" or "accelerator"."""
    if choice != "auto" or device.type == "cpu":
        return choice == "accelerator"
    total = torch.get_device_module(device).get_device_properties(device).total_memory
    return bool(nbytes <= _ON_DEVICE * total)


def in_units(nbytes: float) -> str:
    """ "1.50 GiB", "3.2 MiB", "12.0 KiB" or "7 bytes", the largest unit of which there is at least one."""
    for unit, size, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if nbytes >= size:
            return f"{nbytes / size:.{digits}f} {unit}"
    return f"{nbytes:.0f} bytes"
