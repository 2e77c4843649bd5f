# SPDX-License-Identifier: Apache-2.0
"""Data parallel: one shared store, ranks that own 1/N each, and what is left after every kind of death.

The forge checks after every run that nothing is left in shared memory."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import Forge
from tests.plugin.adapter_ranks import forever, raises, resume, save, train


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "dense", "selection": "host", "gas": 2},
        pytest.param({"optimizer": "lazy", "selection": "device"}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "lazy", "compress": 8}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one_rank_with_twice_the_batch(forge: Forge, tmp_path: Path, settings: dict[str, Any]) -> None:
    (one,) = forge.results(train, tmp_path / "one", world=1, **settings)
    two = forge.results(train, tmp_path / "two", **settings)
    assert two[0]["norm"] == two[1]["norm"] == pytest.approx(one["norm"], rel=1e-4)
    assert two[0]["digest"] == two[1]["digest"], "rows, routers and norms must be bit-identical on all ranks"
    a = torch.load(tmp_path / "one" / "state0.pt")
    b = torch.load(tmp_path / "two" / "state0.pt")
    for kind in ("rows", "routers", "norms"):
        for x, y in zip(a[kind], b[kind], strict=True):
            torch.testing.assert_close(y, x, atol=1e-5, rtol=1e-4)


@pytest.mark.compat
def test_resume_on_two_ranks_is_bit_identical_and_another_world_size_continues(forge: Forge, tmp_path: Path) -> None:
    saved = forge.results(save, tmp_path, optimizer="lazy")
    resumed = forge.results(resume, tmp_path, optimizer="lazy")
    assert [rank["digest"] for rank in resumed] == [rank["digest"] for rank in saved]
    (one,) = forge.results(resume, tmp_path, world=1, optimizer="lazy")
    assert one["norm"] == pytest.approx(saved[0]["norm"], rel=1e-4)


def test_host_memory_per_node_does_not_grow_with_ranks(forge: Forge, tmp_path: Path) -> None:
    (one,) = forge.results(train, tmp_path / "one", world=1, precision="bf16")
    two = forge.results(train, tmp_path / "two", precision="bf16")
    # page alignment of the tiny shared block, and the per-rank row tables, are all that may differ
    assert two[0]["host"] - one["host"] <= 4 * 4096 + 2 * 2 * 40 * 9


def test_an_exception_on_one_rank_ends_the_other_and_leaves_no_shared_memory(forge: Forge, tmp_path: Path) -> None:
    ended = forge.run(raises, tmp_path, timeout=60)
    assert all(rank.code == 1 for rank in ended), "none was killed for it"
    assert "planted" in ended[1].log


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_killing_one_rank_during_training_hangs_nobody_and_leaves_no_shared_memory(
    forge: Forge, tmp_path: Path, signum: int
) -> None:
    with forge.running(forever, tmp_path, timeout=60) as ranks:
        _wait_for_step(tmp_path, 1)
        os.kill(ranks.pids[1], signum)
    kept, killed = ranks.ended
    assert killed.code == -signum and kept.code not in (0, -signal.SIGKILL)


def test_killing_one_rank_during_save_leaves_the_last_complete_checkpoint_loadable(
    forge: Forge, tmp_path: Path
) -> None:
    with forge.running(forever, tmp_path, timeout=60, saves=True) as ranks:
        step = _wait_for_step(tmp_path, 2)
        # the next save's folder appears before its files do: this is the middle of a save
        target = tmp_path / "ckpt" / f"global_step{step + 2}" / "meft"
        deadline = time.monotonic() + 30
        while not target.exists() and time.monotonic() < deadline:
            pass
        os.kill(ranks.pids[1], signal.SIGKILL)
    assert ranks.ended[0].code not in (0, -signal.SIGKILL)
    one, other = forge.results(resume, tmp_path)
    assert one["digest"] == other["digest"]


def _wait_for_step(folder: Path, step: int) -> int:
    """The newest step that the first rank has logged, once it has come to `step`."""
    deadline = time.monotonic() + 50
    while time.monotonic() < deadline:
        log = folder / "rank0.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        found = [int(line) for line in lines if line.strip().isdigit()]
        if found and found[-1] >= step:
            return found[-1]
        time.sleep(0.01)
    raise AssertionError("\n".join(lines))
