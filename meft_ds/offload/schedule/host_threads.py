# SPDX-License-Identifier: Apache-2.0
"""How many threads each rank's host worker (AdamW kernels while the device computes) uses, and on which CPUs."""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import torch

from meft_ds.offload.ranks import Ranks, owned_range

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HostThreads:
    """What one rank's worker uses. `cpus` is None when the rank has its allowed CPUs to itself: nothing to bind."""

    threads: int
    cpus: tuple[int, ...] | None


def host_threads(knob: int | Literal["auto"], ranks: Ranks) -> HostThreads:
    """The plan for this rank. Every rank must call it together, on its main thread: affinity belongs to a thread."""
    all_allowed = ranks.gather(allowed_cpus())
    quota = cpu_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    omp = os.environ.get("OMP_NUM_THREADS")
    plan = choose(knob, all_allowed, ranks.rank, omp=omp, quota=quota)
    if knob == "auto" and _first_number(omp) == 1 and Ranks.everyone().rank == 0:
        free = choose(knob, all_allowed, ranks.rank, omp=None, quota=quota).threads
        if free > 1:
            _warn_once(
                f"the host update uses 1 thread because OMP_NUM_THREADS is 1, as launchers set it by themselves; this "
                f"rank could use {free} CPUs: set meft_offload.schedule.host_threads to {free}"
            )
    return plan


def choose(
    knob: int | Literal["auto"],
    all_allowed: Sequence[tuple[int, ...]],
    rank: int,
    *,
    omp: str | None,
    quota: float | None,
) -> HostThreads:
    """The plan for `rank`; reads nothing but its arguments.

    Ranks with equal allowed CPUs divide them; other sets are taken as the rank's own, as a launcher that binds leaves
    them. An automatic number is the smallest of the rank's CPUs, its part of the quota, and OMP_NUM_THREADS.

    Args:
        knob: "auto", or the number of threads (at least 1) whatever the other arguments say.
        all_allowed: sorted allowed CPUs of each rank of this node.
        omp: OMP_NUM_THREADS as the environment has it.
        quota: CPUs' worth of time that this node's ranks may use together, as they share a cgroup.
    """
    allowed = all_allowed[rank]
    sharers = [k for k, other in enumerate(all_allowed) if other == allowed]
    lo, hi = owned_range(len(allowed), Ranks(rank=sharers.index(rank), world=len(sharers)))
    cpus = allowed[lo : max(hi, lo + 1)]  # with more ranks than CPUs a slice may be empty: several then use one CPU

    if knob == "auto":
        bounds = [len(cpus)]
        if quota is not None:
            bounds.append(max(1, math.ceil(quota / len(all_allowed))))
        if omp_bound := _first_number(omp):
            bounds.append(omp_bound)
        threads = min(bounds)
    else:
        threads = knob
        if threads > len(cpus):
            logger.warning(
                "host_threads is %d, but rank %d's share of this node is %d CPU(s) (%s): its threads will "
                'take turns. Use "auto" or at most %d',
                *(threads, rank, len(cpus), ",".join(map(str, cpus)), len(cpus)),
            )
    return HostThreads(threads=threads, cpus=cpus if len(sharers) > 1 else None)


def _first_number(omp: str | None) -> int | None:
    """4 of "4" and of "4,2" (one number per nesting level); None for what is not a positive int."""
    first = (omp or "").split(",")[0].strip()
    return (int(first) or None) if first.isdecimal() else None


def allowed_cpus() -> tuple[int, ...]:
    """CPUs, sorted, that the calling thread may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def cpu_quota(membership: Path, root: Path) -> float | None:
    """CPUs' worth of time this process's cgroup may use, or None for no limit.

    Args:
        membership: /proc/self/cgroup, lines of id:controllers:path; version 2 is the one without controllers.
        root: where cgroups are mounted; version 1 has a folder per controller there.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "cpu" if controllers else root
        inside = PurePosixPath(path.lstrip("/"))
        # A limit holds for everything below it. In a container the path may be the host's, which does not exist here;
        # the mount itself is then the container's own cgroup.
        for folder in (mount / inside, *(mount / parent for parent in inside.parents)):
            quotas.append(_quota_v1(folder) if controllers else _quota_v2(folder))
    return min((q for q in quotas if q is not None), default=None)


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except OSError:
        return None
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except OSError:
        return None
    return quota / period if quota > 0 else None


_entering = threading.Lock()


def enter(plan: HostThreads) -> None:
    """Give the calling thread its number of torch threads and its CPUs. Call it first on the worker, once.

    torch keeps a number per thread and one start value for the process, which a thread takes when it first asks, even
    if it has set a number before; `set_num_threads` writes both. So the worker asks before it sets, and a short-lived
    thread sets the start value back: main (which may not have asked yet) and later threads then see no change. A
    thread that asks first within this call, a fraction of a millisecond, may still get the worker's number.
    """
    with _entering:  # else a second worker could take the first one's number for the start value
        start = torch.get_num_threads()
        torch.set_num_threads(plan.threads)
        restorer = threading.Thread(target=torch.set_num_threads, args=(start,), name="meft_ds_restore")
        restorer.start()
        restorer.join()
    # Last: set_num_threads may start lasting threads of a pool that the whole process uses, and threads inherit the
    # CPUs of the one that starts them. The worker's own OpenMP team starts with its first kernel, so it is bound too.
    if plan.cpus is not None and hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, plan.cpus)  # on Linux 0 is the calling thread, not the process
        except OSError as error:
            _warn_once(f"could not bind the host worker to CPUs {plan.cpus} ({error}); it runs unbound")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
