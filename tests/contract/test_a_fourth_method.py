# SPDX-License-Identifier: Apache-2.0
"""Adding a method takes a folder, a line in the registry, a config field and a line in the tests' table.

The claims of the contract suite hold for tests/fourth_method as well, because it stands in that table.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.fourth_method import installed
from tests.methods import METHODS, engine_of, steps
from tests.toy import ds_config, make_engine

ROOM = Path(__file__).parents[1] / "fourth_method"
CONTRACTS = (
    "meft_ds.options",
    "meft_ds.offload.method",
    "meft_ds.offload.unit",
    "meft_ds.offload.flat_unit",
    "meft_ds.offload.master_unit",
    "meft_ds.offload.model.discover",
)
ENTRY = next(entry for entry in METHODS if "random_mask" in entry.block)


def test_its_room_uses_nothing_but_the_contracts() -> None:
    for path in (ROOM / "config.py", ROOM / "unit.py", ROOM / "method.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        ours = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and "meft_ds" in (n.module or "")]
        assert set(ours) <= set(CONTRACTS), path.name
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in ROOM.glob("*.py")) < 250


def test_the_block_the_log_and_the_statistics_know_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="meft_ds"):
        engine = engine_of(ENTRY)
    assert "random mask of" in caplog.text
    steps(engine, range(2))
    stats = engine.meft_stats()
    assert "random_mask" in stats and stats["bytes"]["mask"]["down"] > 0


@pytest.mark.parametrize(
    ("block", "stage", "told"),
    [
        ({"random_mask": {"fracton": 0.5}}, 2, "did you mean 'fraction'"),
        ({"random_mask": {"fraction": 0.0}}, 2, "meft_offload.random_mask.fraction: expected"),
        ({"random_mask": {}}, 3, "use ZeRO stage 0, 1 or 2"),
        ({"random_mask": None}, 2, "remove the key to turn it off"),
    ],
)
def test_its_faults_stand_in_the_one_error(block: dict, stage: int, told: str) -> None:
    with installed(), pytest.raises(ValueError, match=told):
        make_engine(ds_config(block=block, zero_optimization={"stage": stage}))
