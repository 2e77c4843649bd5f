# SPDX-License-Identifier: Apache-2.0
"""Host memory: what is free (cgroup limits included), and the check before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from meft_ds.offload.host import cgroup

SHM_DIR = Path("/dev/shm")


def free_host_bytes() -> int:
    """Return how many bytes this process may still allocate: what the machine and every cgroup above us leave."""
    of_group = cgroup.free_bytes()
    return max(0, _meminfo_available() if of_group is None else min(_meminfo_available(), of_group))


def free_shared_bytes(directory: Path = SHM_DIR) -> int:
    """Return the bytes free in the shared-memory file system (often 64 MiB in a container); 0 if it is missing."""
    try:
        stat = os.statvfs(directory)
    except OSError:  # one rank must not raise while the others wait for its number
        return 0
    return stat.f_bavail * stat.f_frsize


def check_host_memory(needed: int, free: int, *, limit_gb: float | str, detail: str, knobs: Sequence[str]) -> None:
    """Stop before anything is allocated when the plan does not fit.

    Args:
        needed: bytes that this node is about to hold for the offloaded state.
        free: bytes free on this node now.
        limit_gb: the user's own limit (`meft_offload.host_memory_gb`), in GiB, or "auto": none.
        detail: what makes up `needed`, for the message.
        knobs: settings that make the methods in use take less.

    Raises:
        ValueError: with both numbers and the keys to turn.
    """
    turn = ", ".join([*knobs, 'set "moments_dtype": "bf16" (halves the moments)'])
    turn += ', or train fewer base tensors ("train")'
    if not isinstance(limit_gb, str) and needed > limit_gb * 2**30:
        but = f"meft_offload.host_memory_gb allows {in_units(limit_gb * 2**30)}. Raise host_memory_gb,"
    elif needed > free:
        but = f"only {in_units(free)} are free on this node (container limits included). Free memory, or"
    else:
        return
    raise ValueError(f"meft_offload needs {in_units(needed)} of host memory ({detail}) but {but} {turn}.")


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
    """Return the message for shared memory that was free a moment ago and cannot be taken."""
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


_ON_DEVICE = 0.05  # share of the accelerator's memory that moments may take by themselves


def state_on_device(choice: str, device: torch.device, nbytes: int) -> bool:
    """Tell whether state of `nbytes` per rank lives on the accelerator; `choice`: "auto", "cpu" or "accelerator"."""
    if choice != "auto" or device.type == "cpu":
        return choice == "accelerator"
    total = torch.get_device_module(device).get_device_properties(device).total_memory
    return bool(nbytes <= _ON_DEVICE * total)


def in_units(nbytes: float) -> str:
    """Return "1.50 GiB", "3.2 MiB", "12.0 KiB" or "7 bytes": the largest unit of which there is at least one."""
    for unit, size, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if nbytes >= size:
            return f"{nbytes / size:.{digits}f} {unit}"
    return f"{nbytes:.0f} bytes"
