# SPDX-License-Identifier: Apache-2.0
"""Python threads in which torch runs every op on one core, for lists of ops too small to be split one by one."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch


@functools.lru_cache(maxsize=4)
def single_threaded_pool(pid: int, workers: int) -> ThreadPoolExecutor:
    """A lasting pool of `workers` such threads; `pid` makes a forked child, which inherits no threads, build its own.

    torch keeps the number of threads per calling thread, and a value that new threads start from. A worker therefore
    asks first (which fixes its start), then chooses one for itself, and the caller sets the start value back.
    """
    before = torch.get_num_threads()
    everyone = threading.Barrier(workers)

    def choose_one_thread() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        everyone.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="meft_ds_ops")
    for job in [pool.submit(choose_one_thread) for _ in range(workers)]:
        job.result()
    torch.set_num_threads(before)
    return pool
