# SPDX-License-Identifier: Apache-2.0
"""trl's trainers, reference and reward models included, with each method in stages 2 and 3; the first loss is plain
DeepSpeed's."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Forge

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed"),
]

METHODS = ("sparse_adapter", "subspace", "sparse_matrix")
EXTRA = {"sft": 0, "dpo": 1, "grpo": 2, "reward": 0, "dpo alone": 1, "gkd": 1}  # engines that only evaluate
CELLS = [*((trainer, stage) for trainer in ("sft", "dpo", "grpo") for stage in (2, 3)), ("reward", 3), ("gkd", 3)]


@pytest.fixture(scope="module")
def forked() -> Iterator[Forge]:
    """A process of their own, since it imports trl."""
    with Forge() as made:
        yield made


@pytest.mark.parametrize(("trainer", "stage"), [*CELLS, ("dpo alone", 3)])
def test_a_trainer_of_trl_trains_with_each_method(forked: Forge, tmp_path: Path, trainer: str, stage: int) -> None:
    def run(method: str | None, steps: int) -> dict[str, Any]:
        arguments = {"trainer": trainer, "method": method, "stage": stage, "steps": steps}
        (found,) = forked.results("tests.e2e.trl_runs:run", tmp_path / str(method), world=1, **arguments)
        return found

    plain = run(None, 1)
    for method in METHODS:
        found = run(method, 20)
        assert found["engines"] == ["MeftEngine"] + ["DeepSpeedEngine"] * EXTRA[trainer], method
        assert found["losses"][0] == pytest.approx(plain["losses"][0], abs=2e-5), method
        assert found["rewards"][0] == plain["rewards"][0], "what is generated first"
        assert len(found["losses"]) == 20 and found["finite"] and found["moved"], method


def test_trainer_evaluates_in_stage_3_before_it_trains(forked: Forge, tmp_path: Path) -> None:
    def run(method: str | None) -> dict[str, Any]:
        (found,) = forked.results(
            "tests.e2e.trl_runs:evaluate_first", tmp_path / str(method), world=1, method=method, stage=3
        )
        return found

    plain = run(None)
    for method in METHODS:
        found = run(method)
        assert found["engines"] == ["DeepSpeedEngine", "MeftEngine"], method
        assert found["eval"] == pytest.approx(plain["eval"], abs=2e-5), method
        assert found["losses"][0] == pytest.approx(plain["losses"][0], abs=2e-5) and len(found["losses"]) == 4, method
