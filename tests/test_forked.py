# SPDX-License-Identifier: Apache-2.0
"""The forge tells how ranks end, and a run that goes wrong fails its own test and no other."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.forked import Forge
from tests.ranks import SHM


def rank_of(folder: Path, at_least: int) -> int:
    print("a word")
    rank = int(os.environ["RANK"])
    return rank if rank >= at_least else sys.exit(3)


def sleeps(folder: Path) -> None:
    time.sleep(60)


def leaves(folder: Path) -> None:
    (SHM / f"meft-ds-{os.getuid()}-{os.getpid()}-1-{'0' * 16}").touch()


def test_each_rank_has_its_result_its_exit_code_and_its_log(forge: Forge, tmp_path: Path) -> None:
    assert forge.results(rank_of, tmp_path, world=3, at_least=0) == [0, 1, 2]
    first, second = forge.run(rank_of, tmp_path, at_least=1)
    assert (first.code, first.result, first.log) == (3, None, "a word\n")
    assert (second.code, second.result, second.log) == (0, 1, "a word\n")
    with pytest.raises(AssertionError, match="a word"):
        forge.results(rank_of, tmp_path, at_least=1)


def test_a_test_that_fails_beside_its_ranks_ends_them_and_the_next_run_is_its_own(forge: Forge, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), forge.running(sleeps, tmp_path) as ranks:
        raise ZeroDivisionError
    assert [rank.code for rank in ranks.ended] == [-9, -9]
    assert [rank.code for rank in forge.run(sleeps, tmp_path, timeout=0.2)] == [-9, -9]
    assert forge.results(rank_of, tmp_path, at_least=0) == [0, 1]


def test_a_rank_that_leaves_something_in_shared_memory_fails_its_run(forge: Forge, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="meft-ds-"), forge.running(leaves, tmp_path, world=1) as ranks:
        pass
    for path in SHM.glob(f"meft-ds-{os.getuid()}-{ranks.pids[0]}-*"):
        path.unlink()
