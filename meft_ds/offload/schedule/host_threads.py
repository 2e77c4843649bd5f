# SPDX-License-Identifier: Apache-2.0
"""Choose how many threads each rank's host worker uses, and on which CPUs. It runs AdamW while the device computes."""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from meft_ds.offload.host.cgroup import cpu_quota
from meft_ds.offload.ranks import Ranks, owned_range

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HostThreads:
    """What one rank's worker uses. `cpus` is None where the rank has its allowed CPUs to itself: nothing is bound.

    `left` are CPUs of the rank that the worker leaves to others; empty where it leaves none or nothing is bound.
    """

    threads: int
    cpus: tuple[int, ...] | None
    left: tuple[int, ...] = ()


LAUNCHING = 2
"""CPUs for the threads that launch an accelerator's work: the program's, and autograd's."""


def host_threads(knob: int | Literal["auto"], ranks: Ranks, *, launches: bool = False) -> HostThreads:
    """Return the plan for this rank. Collective; call it on the main thread, because affinity belongs to a thread.

    `launches`: the rank drives an accelerator.
    """
    all_allowed = ranks.gather(allowed_cpus())
    quota = cpu_quota()
    omp = os.environ.get("OMP_NUM_THREADS")
    leave = LAUNCHING if launches else 0
    plan = choose(knob, all_allowed, ranks.rank, omp=omp, quota=quota, leave=leave)
    if knob == "auto" and _first_number(omp) == 1 and Ranks.everyone().rank == 0:
        free = choose(knob, all_allowed, ranks.rank, omp=None, quota=quota, leave=leave).threads
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
    leave: int = 0,
) -> HostThreads:
    """Return the plan for `rank`; reads nothing but its arguments.

    Ranks with equal allowed CPUs divide them. Other sets are the rank's own: a launcher has bound it. An automatic
    number is the smallest of the rank's CPUs, its part of the quota (both less `leave`), and OMP_NUM_THREADS.

    Args:
        knob: "auto", or the number of threads (at least 1) whatever the other arguments say.
        all_allowed: sorted allowed CPUs of each rank of this node.
        omp: OMP_NUM_THREADS as the environment has it.
        quota: CPUs' worth of time that this node's ranks may use together, because they share a cgroup.
        leave: CPUs that other threads of the rank need.
    """
    allowed = all_allowed[rank]
    sharers = [k for k, other in enumerate(all_allowed) if other == allowed]
    lo, hi = owned_range(len(allowed), Ranks(rank=sharers.index(rank), world=len(sharers)))
    cpus = allowed[lo : max(hi, lo + 1)]  # with more ranks than CPUs a slice may be empty: several then use one CPU

    if knob == "auto":
        bounds = [max(1, len(cpus) - leave)]
        if quota is not None:
            bounds.append(max(1, math.ceil(quota / len(all_allowed)) - leave))
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
    if len(sharers) == 1:
        return HostThreads(threads=threads, cpus=None)
    split = max(len(cpus) - leave, min(threads, len(cpus)))
    return HostThreads(threads=threads, cpus=cpus[:split], left=cpus[split:])


def _first_number(omp: str | None) -> int | None:
    """Return 4 of "4" and of "4,2" (one number per nesting level), None of what is not a positive int."""
    first = (omp or "").split(",")[0].strip()
    return (int(first) or None) if first.isdecimal() else None


def allowed_cpus() -> tuple[int, ...]:
    """Return the CPUs, sorted, that the calling thread may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


_entering = threading.Lock()


def enter(plan: HostThreads) -> None:
    """Give the calling thread its number of torch threads and its CPUs. The worker calls it once, before all else.

    torch keeps a number per thread, and one start value for the process. A thread takes the start value when it first
    asks for its number, even if it has set one before; `set_num_threads` writes both. So the worker asks before it
    sets, and a short-lived thread sets the start value back. The main thread and later threads then see no change. A
    thread that first asks during this call (a fraction of a millisecond) may still get the worker's number.
    """
    with _entering:  # otherwise a second worker could take the first one's number for the start value
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
