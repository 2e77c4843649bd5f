# SPDX-License-Identifier: Apache-2.0
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from meft_ds.offload.host.shared_memory import TensorSpec, allocate, arena_bytes, remove_stale
from meft_ds.offload.ranks import Ranks
from tests.forked import Forge
from tests.offload import arena_ranks


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    """Where ranks that run in `tmp_path` share memory."""
    (made := tmp_path / "shm").mkdir()
    return made


def test_one_rank_gets_private_zeroed_memory(tmp_path: Path) -> None:
    specs = {"a": TensorSpec((4, 2), torch.float32), "b": TensorSpec((3,), torch.bfloat16)}
    t = allocate(specs, Ranks(), directory=tmp_path)
    assert t["a"].shape == (4, 2) and t["b"].dtype == torch.bfloat16 and t["a"].sum() == 0
    assert list(tmp_path.iterdir()) == []
    assert arena_bytes(specs) == 2 * 4096


def test_ranks_share_one_block_and_leave_no_file(forge: Forge, tmp_path: Path, shm: Path) -> None:
    forge.results(arena_ranks.share, tmp_path)
    assert list(shm.iterdir()) == []


def plant_strays(shm: Path) -> set[Path]:
    """What anybody may leave in /dev/shm, under names like ours."""
    me, dead, token = os.getuid(), 2**31 - 1, "0" * 16
    (shm / f"meft-ds-{me}-x").touch()
    (shm / f"meft-ds-{me}-").touch()
    (shm / f"meft-ds-{me}-{dead}-1-abc").touch()
    (shm / f"meft-ds-{me}-\u0663-1-{token}").touch()
    (shm / f"meft-ds-{me}-{'9' * 30}-1-{token}").touch()
    (shm / f"meft-ds-{me}-{dead}-1-{token}").mkdir()
    (shm / f"meft-ds-{me}-{dead}-2-{token}").symlink_to(shm / f"meft-ds-{me}-x")
    (shm / f"meft-ds-{me}-{dead}-3-{token}").symlink_to(shm / "nowhere")
    os.mkfifo(shm / f"meft-ds-{me}-{dead}-4-{token}")
    os.close(os.open(bytes(shm / f"meft-ds-{me}-") + b"\xff", os.O_CREAT))
    return set(shm.iterdir())


def test_files_that_a_start_did_not_make_neither_stop_it_nor_are_removed(
    forge: Forge, tmp_path: Path, shm: Path
) -> None:
    strays = plant_strays(shm)
    assert len(strays) == 10 and remove_stale(shm) == []
    forge.results(arena_ranks.share, tmp_path, strays=10)
    assert set(shm.iterdir()) == strays
    assert remove_stale(shm / "nowhere") == []


def test_a_leftover_that_cannot_be_removed_stays_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / f"meft-ds-{os.getuid()}-{2**31 - 1}-1-{'0' * 16}"
    left.touch()

    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        assert remove_stale(tmp_path) == [] and left.exists()
    assert remove_stale(tmp_path) == [left.name] and not left.exists()


def test_whatever_the_first_rank_fails_on_is_told_to_every_rank(forge: Forge, tmp_path: Path, shm: Path) -> None:
    assert all("planted" in told for told in forge.results(arena_ranks.fails, tmp_path, timeout=60))


@pytest.mark.parametrize("refused", [False, True])
def test_shared_memory_is_unlocked_before_it_is_unmapped_and_a_rank_that_cannot_lock_it_fails_all(
    forge: Forge, tmp_path: Path, shm: Path, refused: bool
) -> None:
    """CUDA's calls are stood in for: a CPU has nothing to lock."""
    first, second = forge.results(arena_ranks.lock, tmp_path, refused=refused)
    assert first == second
    assert ("rank 1 could not page-lock" in first and "error 2" in first) if refused else first == ""


def test_sigkill_of_every_rank_leaves_no_file(forge: Forge, tmp_path: Path, shm: Path) -> None:
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    with forge.running(arena_ranks.share, tmp_path, timeout=30, sleeps=True) as ranks:
        while not all(log.exists() and "shared" in log.read_text() for log in logs):
            time.sleep(0.01)
        for pid in ranks.pids:
            os.kill(pid, signal.SIGKILL)
    assert max(rank.seconds for rank in ranks.ended) < 30
    assert list(shm.iterdir()) == []


def test_ranks_that_cannot_reach_a_nameless_file_share_a_named_one_and_leave_none(
    forge: Forge, tmp_path: Path, shm: Path
) -> None:
    forge.results(arena_ranks.share, tmp_path, blind=True)
    assert list(shm.iterdir()) == []


def test_file_of_a_start_killed_before_it_could_unlink_is_removed_by_the_next(tmp_path: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from meft_ds.offload.host import shared_memory
from meft_ds.offload.ranks import Ranks
def hang(*a, **k):
    print("made", flush=True)
    time.sleep(60)
Ranks.from_first = hang
shared_memory._map(4096, Ranks(rank=0, world=2), Path(sys.argv[1]), shared_memory._make_named)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "made\n"
        (left,) = tmp_path.iterdir()
        assert stat.S_IMODE(left.stat().st_mode) == 0o600
        assert remove_stale(tmp_path) == []  # its creator lives
        process.kill()
        process.wait(timeout=30)
    deadline = time.monotonic() + 10
    while not remove_stale(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left.exists()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / f"meft-ds-{os.getuid() + 1}-1-1-abc"
    foreign.touch()
    assert remove_stale(tmp_path) == [] and foreign.exists()
