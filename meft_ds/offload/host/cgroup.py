# SPDX-License-Identifier: Apache-2.0
"""Limits that the operating system sets to a group of processes (cgroup version 2), such as those of a container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MEMBERSHIP = Path("/proc/self/cgroup")  # lines of id:controllers:path; version 2 is the one without controllers
ROOT = Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Return how many bytes this process may still allocate, or None where no cgroup limits its memory."""
    free = []
    for folder in _folders():
        limit, used = (_words(folder / name) for name in ("memory.max", "memory.current"))
        if limit and used and limit != ["max"]:
            stat = _words(folder / "memory.stat")
            # pages of files that nobody used lately are given back before the limit is reached
            reclaimable = int(stat[stat.index("inactive_file") + 1]) if "inactive_file" in stat else 0
            free.append(int(limit[0]) - int(used[0]) + reclaimable)
    return min(free, default=None)


def cpu_quota() -> float | None:
    """Return how many CPUs' worth of time this process may use, or None where no cgroup limits it."""
    quotas = [_words(folder / "cpu.max") for folder in _folders()]
    return min((int(quota[0]) / int(quota[1]) for quota in quotas if quota and quota[0] != "max"), default=None)


def _folders() -> Iterator[Path]:
    """Yield the folder of this process's cgroup and those above it: a limit holds for everything below it.

    In a container the path may be the host's, which does not exist here. The root is then the container's own cgroup.
    """
    for line in _lines(MEMBERSHIP):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            inside = PurePosixPath(path.lstrip("/"))
            yield from (ROOT / part for part in (inside, *inside.parents))


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # no such limit, or no cgroups
        return []
