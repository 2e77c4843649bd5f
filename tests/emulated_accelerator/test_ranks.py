# SPDX-License-Identifier: Apache-2.0
"""Process groups of the emulated device: what they compute, what they wait for, and how a hang is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forked import Forge

pytestmark = pytest.mark.slow
IN_ORDER = "tests.emulated_accelerator.collectives:in_order"


def test_collectives_compute_what_they_should(emulated_forge: Forge, tmp_path: Path) -> None:
    ranks = emulated_forge.results("tests.emulated_accelerator.collectives:collectives", tmp_path)
    total, both = [10.0, 12.0, 14.0, 16.0], [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]
    for rank, found in enumerate(ranks):
        assert found["total"] == found["late"] == total and found["numbers"] == [2.0, 2.0]
        assert found["longest"] == both[4:] and found["first"] == both[:4]
        assert sum(found["gathered"], []) == found["both"] == both
        assert found["half"] == total[2 * rank : 2 * rank + 2]
        assert found["rows"] == ([[0.0] * 2, [1.0] * 2, [1.0] * 2] if rank == 0 else [[0.0] * 2, [0.0] * 2, [1.0] * 2])
        assert found["objects"] == [{"rank": 0, "sent": 2}, {"rank": 1, "sent": 1}] and found["told"] == ["from 1"]


def test_a_collective_waits_for_the_current_stream_and_the_thread_for_nothing(
    emulated_forge: Forge, tmp_path: Path
) -> None:
    for found in emulated_forge.results("tests.emulated_accelerator.collectives:waits", tmp_path):
        assert found["y"] == [5.0] * 4 and found["early"] == [1.0] * 4 and found["waited"] < 0.2


@pytest.mark.parametrize(("wrong", "one_queue"), [(False, True), (True, False)])
def test_collectives_of_two_groups_end_in_one_order_or_on_queues_of_their_own(
    wrong: bool, one_queue: bool, emulated_forge: Forge, tmp_path: Path
) -> None:
    assert emulated_forge.results(IN_ORDER, tmp_path, wrong=wrong, one_queue=one_queue) == [[8.0, 8.0]] * 2


def test_another_order_on_one_queue_hangs_and_says_so(emulated_forge: Forge, tmp_path: Path) -> None:
    ended = emulated_forge.run(IN_ORDER, tmp_path, timeout=60, wrong=True, one_queue=True)
    assert [one.code for one in ended] == [1, 1]
    for one in ended:
        assert "allreduce of group" in one.log and "found no peer" in one.log
