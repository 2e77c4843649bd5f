# SPDX-License-Identifier: Apache-2.0
"""Engine, ZeRO stages, schedules and checkpoints of DeepSpeed without a block: the same with the plugin as without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

PROGRAM = Path(__file__).with_name("without_block_program.py")


def results(folder: Path, ranks: int, **env: str) -> list[dict[str, Any]]:
    outputs = run_ranks(PROGRAM, ranks, str(folder), env=env)
    lines = [next(line for line in out.splitlines() if line.startswith("RESULT ")) for out in outputs]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


@pytest.mark.long
@pytest.mark.compat
@pytest.mark.parametrize("ranks", [1, 2])
def test_without_the_block_all_that_deepspeed_does_is_what_it_does_without_the_plugin(
    tmp_path: Path, ranks: int
) -> None:
    with_plugin = results(tmp_path / "with", ranks)
    without = results(tmp_path / "without", ranks, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    for here, there in zip(with_plugin, without, strict=True):
        assert here.pop("armed") and not there.pop("armed")
        assert here.pop("loaded") == there.pop("loaded") == []
        assert here == there
        assert all(
            case["losses"][-2:] == case["after loading"][-2:] for name, case in here.items() if "schedule" in name
        )
