# SPDX-License-Identifier: Apache-2.0
"""Two ranks, each with a GPU of its own: their collectives run on streams too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.gpu import runs
from tests.ranks import run_ranks

NAMES = [
    *("adapter", "subspace", "tiles", "dense", "adapter, spilling", "adapter, compressed"),
    *("adapter, eager", "subspace, eager", "tiles, eager"),
    *("adapter, stage 3", "subspace, stage 3", "tiles, stage 3"),
]


@pytest.mark.parametrize("names", [NAMES], ids=["all"])
@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_agree_with_each_other_with_serial_order_and_with_one_cpu(
    names: list[str], tmp_path: Path, on_cpu: Callable[[str], runs.Result]
) -> None:
    folders = {which: tmp_path / which for which in ("own", "twin")}
    for which, folder in folders.items():
        folder.mkdir()
        run_ranks(Path(runs.__file__), 2, str(folder), which, *names)
    for name in names:
        first, second = (runs.load(folders["own"], name, rank) for rank in range(2))
        # stage 3 gives whole weights to the first rank only
        for key, weight in second.weights.items():
            assert torch.equal(weight, first.weights[key]), (name, key)
        assert runs.differing(first, runs.load(folders["twin"], name)) == [], name
        runs.assert_close(
            runs.CASES[name], first, on_cpu(name), losses=False
        )  # each rank has the losses of its own part
