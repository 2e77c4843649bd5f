# SPDX-License-Identifier: Apache-2.0
"""The bus on a device of its own: the plan counts the host memory that is taken, and times are the streams'."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forked import Forge


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["adapter", "subspace, state on the host", "adapter, selection on the device"])
def test_the_plan_counts_page_locked_memory_as_it_is_taken(cell: str, emulated_forge: Forge, tmp_path: Path) -> None:
    (found,) = emulated_forge.results("tests.emulated_accelerator.bus:memory", tmp_path, world=1, cell=cell)
    assert found["locked"] > 0
    assert found["planned"] == found["locked"] + found["other"]
    assert found["grown"] == found["unknown"], "only buffers whose size follows the batch come later"


@pytest.mark.slow
def test_a_slow_backward_makes_no_slow_copies(emulated_forge: Forge, tmp_path: Path) -> None:
    (found,) = emulated_forge.results("tests.emulated_accelerator.bus:times", tmp_path, world=1, slow="compute")
    assert found["compute_s"] > 0.3 > 4 * (found["down_s"] + found["up_s"])
    assert found["step_s"] < 1.5 * found["compute_s"] + 0.5


@pytest.mark.slow
def test_a_slow_way_up_makes_the_device_idle_in_the_forward(emulated_forge: Forge, tmp_path: Path) -> None:
    (found,) = emulated_forge.results("tests.emulated_accelerator.bus:times", tmp_path, world=1, slow="up")
    assert found["up_s"] >= 0.1 * found["units"]
    assert 0.1 < found["idle_s"] <= found["stall_s"] + 0.1
    assert found["compute_s"] + found["idle_s"] < found["step_s"] + 0.01
