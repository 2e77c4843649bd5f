# SPDX-License-Identifier: Apache-2.0
"""Data parallel: one shared store, ranks that own 1/N each, and what is left after every kind of death."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import left_in_shared_memory, run_ranks, start_ranks

PROGRAM = Path(__file__).with_name("rank_program.py")


def go(world: int, action: str, folder: Path, *options: str) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    outputs = run_ranks(PROGRAM, world, action, str(folder), *options)
    return [json.loads(out.strip().splitlines()[-1]) for out in outputs]


@pytest.mark.parametrize(
    "options",
    [
        ("optimizer=dense", "selection=host", "gas=2"),
        pytest.param(("optimizer=lazy", "selection=device"), marks=pytest.mark.slow),
        pytest.param(("optimizer=lazy", "compress=8"), marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one_rank_with_twice_the_batch(tmp_path: Path, options: tuple[str, ...]) -> None:
    (one,) = go(1, "train", tmp_path / "one", *options)
    two = go(2, "train", tmp_path / "two", *options)
    assert two[0]["norm"] == two[1]["norm"] == pytest.approx(one["norm"], rel=1e-4)
    assert two[0]["digest"] == two[1]["digest"], "rows, routers and norms must be bit-identical on all ranks"
    a = torch.load(tmp_path / "one" / "state0.pt")
    b = torch.load(tmp_path / "two" / "state0.pt")
    for kind in ("rows", "routers", "norms"):
        for x, y in zip(a[kind], b[kind], strict=True):
            torch.testing.assert_close(y, x, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_ranks_are_bit_identical_from_run_to_run(tmp_path: Path) -> None:
    options = ("precision=bf16", "optimizer=lazy")
    assert (
        go(2, "train", tmp_path / "a", *options)[0]["digest"] == go(2, "train", tmp_path / "b", *options)[0]["digest"]
    )


@pytest.mark.compat
def test_resume_on_two_ranks_is_bit_identical_and_another_world_size_continues(tmp_path: Path) -> None:
    saved = go(2, "save", tmp_path, "optimizer=lazy")
    assert [r["digest"] for r in go(2, "resume", tmp_path, "optimizer=lazy")] == [r["digest"] for r in saved]
    (one,) = go(1, "resume", tmp_path, "optimizer=lazy")
    assert one["norm"] == pytest.approx(saved[0]["norm"], rel=1e-4)


def test_host_memory_per_node_does_not_grow_with_ranks(tmp_path: Path) -> None:
    (one,) = go(1, "train", tmp_path / "one", "precision=bf16")
    two = go(2, "train", tmp_path / "two", "precision=bf16")
    # page alignment of the tiny shared block, and the per-rank row tables, are all that may differ
    assert two[0]["host"] - one["host"] <= 4 * 4096 + 2 * 2 * 40 * 9


def test_an_exception_on_one_rank_ends_the_other_and_leaves_no_shared_memory(tmp_path: Path) -> None:
    processes = start_ranks(PROGRAM, 2, "raise", str(tmp_path))
    try:
        out = [p.communicate(timeout=60) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert all(p.returncode != 0 for p in processes)
    assert "planted" in out[1][1]
    assert not left_in_shared_memory(p.pid for p in processes)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_killing_one_rank_during_training_hangs_nobody_and_leaves_no_shared_memory(tmp_path: Path, signum: int) -> None:
    processes = start_ranks(PROGRAM, 2, "forever", str(tmp_path))
    try:
        _wait_for_step(processes[0], 1)
        processes[1].send_signal(signum)
        for p in processes:
            p.wait(timeout=60)
    finally:
        for p in processes:
            p.kill()
    assert not left_in_shared_memory(p.pid for p in processes)


def test_killing_one_rank_during_save_leaves_the_last_complete_checkpoint_loadable(tmp_path: Path) -> None:
    processes = start_ranks(PROGRAM, 2, "forever", str(tmp_path), "save=1")
    try:
        step = _wait_for_step(processes[0], 2)
        # the next save's folder appears before its files do: this is the middle of a save
        target = tmp_path / "ckpt" / f"global_step{step + 2}" / "meft"
        deadline = time.monotonic() + 60
        while not target.exists() and time.monotonic() < deadline:
            pass
        processes[1].kill()
        for p in processes:
            p.wait(timeout=60)
    finally:
        for p in processes:
            p.kill()
    resumed = go(2, "resume", tmp_path)
    assert resumed[0]["digest"] == resumed[1]["digest"]
    assert not left_in_shared_memory(p.pid for p in processes)


def _wait_for_step(process: Any, step: int) -> int:
    while True:
        line = process.stdout.readline()
        assert line, process.stderr.read()[-3000:]
        if line.strip().isdigit() and int(line) >= step:
            return int(line)
