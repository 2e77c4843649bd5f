# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meft_ds.offload.host import cgroup
from meft_ds.offload.host.cgroup import cpu_quota
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule import host_threads as threads
from meft_ds.offload.schedule.host_threads import HostThreads, allowed_cpus, choose, enter, host_threads

T = TypeVar("T")
EIGHT = tuple(range(8))
linux_only = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"),
    reason="threads are bound to CPUs with sched_setaffinity, which only Linux has",
)


def auto(
    all_allowed: Sequence[tuple[int, ...]], rank: int = 0, omp: str | None = None, quota: float | None = None
) -> HostThreads:
    return choose("auto", all_allowed, rank, omp=omp, quota=quota)


def in_thread(f: Callable[[], T]) -> T:
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(f()))
    thread.start()
    thread.join()
    return results[0]


def test_a_lone_rank_uses_every_cpu_and_keeps_its_affinity() -> None:
    assert auto([(2, 3, 5)]) == HostThreads(threads=3, cpus=None)


def test_ranks_with_equal_sets_divide_them_contiguously() -> None:
    assert auto([EIGHT] * 2, 0) == HostThreads(threads=4, cpus=(0, 1, 2, 3))
    assert auto([EIGHT] * 2, 1) == HostThreads(threads=4, cpus=(4, 5, 6, 7))


@given(cpus=st.sets(st.integers(0, 300), min_size=1, max_size=40), world=st.integers(2, 12))
def test_shares_are_never_empty_and_cover_all_once_with_sizes_that_differ_by_at_most_one(
    cpus: set[int], world: int
) -> None:
    allowed = tuple(sorted(cpus))
    plans = [auto([allowed] * world, rank) for rank in range(world)]
    shares = [plan.cpus or () for plan in plans]
    sizes = [len(share) for share in shares]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    assert [plan.threads for plan in plans] == sizes
    if world <= len(allowed):
        assert tuple(cpu for share in shares for cpu in share) == allowed
    else:
        assert {cpu for share in shares for cpu in share} == cpus


def test_more_ranks_than_cpus_get_one_cpu_each_spread_evenly() -> None:
    plans = [auto([(4, 6)] * 5, rank) for rank in range(5)]
    assert [plan.threads for plan in plans] == [1] * 5
    assert [plan.cpus for plan in plans] == [(4,), (4,), (4,), (6,), (6,)]


def test_ranks_that_a_launcher_bound_keep_their_own_cpus() -> None:
    bound = [(0, 1, 2), (3, 4)]
    assert auto(bound, 0) == HostThreads(threads=3, cpus=None)
    assert auto(bound, 1) == HostThreads(threads=2, cpus=None)


def test_only_the_ranks_with_equal_sets_share() -> None:
    mixed = [(0, 1), (2, 3), (0, 1), (1, 2)]
    assert [auto(mixed, rank).cpus for rank in range(4)] == [(0,), None, (1,), None]


@pytest.mark.parametrize(
    ("omp", "expected"),
    [("3", 3), (" 3 ", 3), ("4,2", 4), ("64", 8), ("garbage", 8), ("0", 8), ("-2", 8), ("", 8), (",2", 8), ("2.5", 8)],
)
def test_omp_num_threads_is_an_upper_bound_whose_first_number_counts_and_garbage_is_ignored(
    omp: str, expected: int
) -> None:
    assert auto([EIGHT], omp=omp).threads == expected


def test_the_quota_bounds_threads_not_cpus_and_rounds_up() -> None:
    assert [auto([EIGHT], quota=q).threads for q in (0.2, 1.0, 2.5, 100.0)] == [1, 1, 3, 8]
    assert auto([EIGHT], quota=2.0).cpus is None
    assert auto([EIGHT] * 2, quota=2.0).cpus == (0, 1, 2, 3)


def test_ranks_of_a_node_share_its_quota_even_if_they_are_bound() -> None:
    assert auto([EIGHT] * 2, quota=4.0).threads == 2
    assert auto([(0, 1, 2, 3), (4, 5, 6, 7)], quota=4.0).threads == 2
    assert auto([EIGHT] * 3, quota=1.0).threads == 1


@pytest.mark.parametrize(
    ("knob", "omp", "rank", "told"),
    [
        ("auto", "1", 0, True),
        ("auto", "1", 1, False),
        ("auto", "2", 0, False),
        ("auto", "", 0, False),
        (1, "1", 0, False),
    ],
)
def test_a_launchers_omp_num_threads_is_warned_of_with_the_figure_and_the_knob(
    knob: Any, omp: str, rank: int, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setattr(threads, "allowed_cpus", lambda: EIGHT)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    monkeypatch.setattr(Ranks, "everyone", lambda: Ranks(rank=rank, world=2))
    threads._warn_once.cache_clear()
    for _ in range(2):
        host_threads(knob, Ranks(rank=0, world=1))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == told
    if told:
        assert "uses 1 thread because OMP_NUM_THREADS is 1" in lines[0] and "host_threads to 8" in lines[0]


def test_a_rank_that_has_one_cpu_is_not_told_of_omp_num_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(threads, "allowed_cpus", lambda: (3,))
    host_threads("auto", Ranks(rank=0, world=1))
    assert not caplog.records


def test_a_number_wins_over_every_bound_and_only_an_excess_over_the_cpus_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert choose(4, [EIGHT] * 2, 1, omp="1", quota=1.0) == HostThreads(threads=4, cpus=(4, 5, 6, 7))
    assert not caplog.records
    assert choose(5, [EIGHT] * 2, 1, omp=None, quota=None) == HostThreads(threads=5, cpus=(4, 5, 6, 7))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "host_threads is 5, but rank 1's share of this node is 4 CPU(s) (4,5,6,7)" in caplog.text


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (2, 1), (3, 1), (4, 2), (16, 14)])
def test_on_an_accelerator_two_cpus_stay_free_and_one_is_for_the_update(cpus: int, threads: int) -> None:
    everything = tuple(range(cpus))
    assert choose("auto", [everything], 0, omp=None, quota=None, leave=2).threads == threads
    assert choose("auto", [tuple(range(64))], 0, omp=None, quota=float(cpus), leave=2).threads == threads
    two = choose("auto", [tuple(range(2 * cpus))] * 2, 1, omp=None, quota=None, leave=2)
    own = tuple(range(cpus, 2 * cpus))
    assert two == HostThreads(threads=threads, cpus=own[:threads], left=own[threads:])


def test_what_a_number_or_a_bound_leaves_goes_to_the_launching_threads_up_to_two() -> None:
    def plan(knob: Any, **bounds: Any) -> HostThreads:
        return choose(knob, [EIGHT] * 2, 0, **{"omp": None, "quota": None, **bounds}, leave=2)

    assert plan(4) == HostThreads(threads=4, cpus=(0, 1, 2, 3))
    assert plan(3) == HostThreads(threads=3, cpus=(0, 1, 2), left=(3,))
    assert plan(1) == HostThreads(threads=1, cpus=(0, 1), left=(2, 3))
    assert plan("auto", omp="1") == HostThreads(threads=1, cpus=(0, 1), left=(2, 3))


def test_host_threads_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "allowed_cpus", lambda: EIGHT)
    monkeypatch.setattr(threads, "cpu_quota", lambda: 6.5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert host_threads("auto", Ranks()) == HostThreads(threads=7, cpus=None)
    assert host_threads("auto", Ranks(), launches=True) == HostThreads(threads=5, cpus=None)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert host_threads("auto", Ranks()) == HostThreads(threads=2, cpus=None)


def test_without_affinity_calls_all_cpus_are_allowed_and_nothing_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert allowed_cpus() == (0, 1, 2)
    in_thread(lambda: enter(HostThreads(threads=1, cpus=(0,))))


def test_the_quota_is_the_smallest_of_the_cgroup_and_those_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    assert cpu_quota() is None
    (tmp_path / "membership").write_text("4:cpu,cpuacct:/job\n0::/job/rank\n")
    (tmp_path / "job" / "rank").mkdir(parents=True)
    (tmp_path / "job" / "rank" / "cpu.max").write_text("max 100000\n")
    assert cpu_quota() is None
    (tmp_path / "job" / "cpu.max").write_text("250000 100000\n")
    assert cpu_quota() == 2.5
    (tmp_path / "job" / "rank" / "cpu.max").write_text("50000 100000\n")
    assert cpu_quota() == 0.5
    (tmp_path / "membership").write_text("0::/docker/f00\n")  # a path of the host's, seen in a container
    (tmp_path / "cpu.max").write_text("300000 100000\n")
    assert cpu_quota() == 3.0


@linux_only
def test_enter_binds_the_calling_thread_and_its_kernels_threads_but_not_main() -> None:
    before = os.sched_getaffinity(0)
    cpu = max(before)

    def worker() -> tuple[set[int], list[set[int]]]:
        enter(HostThreads(threads=3, cpus=(cpu,)))
        known = set(os.listdir("/proc/self/task"))
        torch.ones(1 << 20).add_(1)
        team = set(os.listdir("/proc/self/task")) - known
        return os.sched_getaffinity(0), [os.sched_getaffinity(int(tid)) for tid in team]

    own, team = in_thread(worker)
    assert own == {cpu}
    assert team == [{cpu}] * 2
    assert os.sched_getaffinity(0) == before


@linux_only
def test_a_binding_that_the_system_refuses_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    nowhere = HostThreads(threads=1, cpus=(max(os.sched_getaffinity(0)) + 1000,))
    before = os.sched_getaffinity(0)

    def worker() -> set[int]:
        enter(nowhere)
        return os.sched_getaffinity(0)

    assert in_thread(worker) == before
    assert in_thread(worker) == before
    assert caplog.text.count("could not bind the host worker") == 1


def test_enter_leaves_the_thread_numbers_of_main_and_of_later_threads() -> None:
    main = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        release, entered = threading.Event(), threading.Event()
        seen: list[int] = []

        def worker() -> None:
            enter(HostThreads(threads=5, cpus=None))
            entered.set()
            release.wait()
            torch.ones(1 << 20).add_(1)
            seen.append(torch.get_num_threads())

        thread = threading.Thread(target=worker)
        thread.start()
        entered.wait()
        assert torch.get_num_threads() == 2
        assert in_thread(torch.get_num_threads) == 2
        torch.set_num_threads(3)  # and what main chooses later does not reach the worker
        release.set()
        thread.join()
        assert seen == [5]
        assert in_thread(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(main)


def test_workers_that_enter_together_leave_the_start_value() -> None:
    main = torch.get_num_threads()
    together = threading.Barrier(8)
    numbers: list[tuple[int, int]] = []

    def worker(number: int) -> None:
        together.wait()
        enter(HostThreads(threads=number, cpus=None))
        numbers.append((number, torch.get_num_threads()))

    workers = [threading.Thread(target=worker, args=(main + 1 + k,)) for k in range(8)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert sorted(numbers) == [(main + 1 + k, main + 1 + k) for k in range(8)]
    assert in_thread(torch.get_num_threads) == main == torch.get_num_threads()


FIRST_ASKED_AFTERWARDS = """
import sys, threading, torch
from meft_ds.offload.schedule.host_threads import HostThreads, enter

if sys.argv[1] == "set":
    torch.set_num_threads(2)  # sets, but does not ask: main takes the start value when it first asks, below
before = threading.Event()
early = threading.Thread(target=lambda: (before.wait(), print(torch.get_num_threads())))
early.start()
worker = threading.Thread(target=enter, args=(HostThreads(threads=5, cpus=None),))
worker.start()
worker.join()
before.set()
early.join()
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(("how", "expected"), [("set", "2"), ("untouched", "1")])
def test_threads_that_first_ask_after_enter_main_included_get_what_they_would_have(how: str, expected: str) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    env.pop("MKL_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", FIRST_ASKED_AFTERWARDS, how], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [expected] * 2


POOL_THREADS = """
import os, threading, torch
from meft_ds.offload.schedule.host_threads import HostThreads, enter

allowed = os.sched_getaffinity(0)
def worker():
    known = set(os.listdir("/proc/self/task"))
    enter(HostThreads(threads=5, cpus=(min(allowed),)))
    started = set(os.listdir("/proc/self/task")) - known
    print(all(os.sched_getaffinity(int(tid)) == allowed for tid in started))
thread = threading.Thread(target=worker)
thread.start()
thread.join()
"""


@linux_only
@pytest.mark.skipif(len(allowed_cpus()) < 2, reason="with one CPU a bound thread and an unbound one look the same")
def test_threads_that_torch_starts_for_the_whole_process_stay_unbound() -> None:
    done = subprocess.run([sys.executable, "-c", POOL_THREADS], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
