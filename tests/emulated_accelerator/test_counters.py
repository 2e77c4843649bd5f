# SPDX-License-Identifier: Apache-2.0
"""What each layer costs in a window of one micro-batch, on the emulated accelerator: budgets that may only fall.

Counts of waits and of pageable copies are exact, those of launches and bytes are bounds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.emulated_accelerator.counting import COUNTED
from tests.forked import Forge


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one layer may cost.

    Attributes:
        waits: of the thread that trains and of autograd's, by what they wait for.
        pageable: copies of memory that is not page-locked, of the same threads.
        launches: ours, beside those of the model's own forward and backward.
        beside: of our bytes on the device at rest, the share that the plan does not have.
        passing: bytes on the device that there are beside those at rest, with two layers.
    """

    waits: dict[str, int] = field(default_factory=dict)
    pageable: dict[str, int] = field(default_factory=dict)
    launches: int
    beside: float
    passing: int


BUDGETS = {
    # Down: inputs, experts, gates and the mask, for the scores on the host. Up: indices and the fetched rows, for which
    # pageable memory waits. Backward brings its indices up again.
    "adapter, selection on the host": Budget(
        waits={"training: copy down": 4, "training: copy up": 3, "autograd: copy up": 3},
        pageable={"training: copy up": 3, "autograd: copy up": 3},
        launches=175,
        beside=0.03,
        passing=850_000,
    ),
    # Inputs stay where they are; the experts' load is counted on the device, by a bincount that waits.
    "adapter, selection on the device": Budget(
        waits={
            "training: copy down": 2,
            "training: copy up": 3,
            "training: aten::bincount": 1,
            "autograd: copy up": 4,
        },
        pageable={"training: copy down": 1, "training: copy up": 4, "autograd: copy up": 4},
        launches=235,
        beside=0.0,
        passing=850_000,
    ),
    # The projectors are beside the plan. Most launches are plain torch's, in place of the Triton kernels.
    "subspace, state on the host": Budget(launches=2800, beside=0.25, passing=4_700_000),
    "subspace, state on the device": Budget(launches=2800, beside=0.15, passing=4_700_000),
    # Where the tiles lie is beside the plan.
    "tiles, state on the host": Budget(launches=110, beside=0.07, passing=430_000),
    "tiles, state on the device": Budget(launches=110, beside=0.03, passing=1_150_000),
}


def costs(forge: Forge, folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What windows cost in models of two and four layers."""
    two, four = (
        forge.results(
            "tests.emulated_accelerator.counting:count", folder / str(layers), world=1, name=name, layers=layers
        )[0]
        for layers in (2, 4)
    )
    return two, four


def per_layer(kind: str, two: dict[str, Any], four: dict[str, Any]) -> dict[str, float]:
    """What each of two more layers adds in one window, without what adds nothing."""
    more = Counter(four[kind])
    more.subtract(two[kind])
    return {what: times / 2 / COUNTED for what, times in more.items() if times}


def by_whom_computes(found: dict[str, float]) -> dict[str, float]:
    """Without lanes, whose threads are there to wait, and without events, which a step reads once they are reached."""
    return {what: times for what, times in found.items() if not what.startswith("lane") and "event" not in what}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGETS)
def test_each_layer_keeps_to_its_budget(name: str, emulated_forge: Forge, tmp_path: Path) -> None:
    budget, (two, four) = BUDGETS[name], costs(emulated_forge, tmp_path, name)
    assert by_whom_computes(per_layer("waits", two, four)) == budget.waits
    assert by_whom_computes(per_layer("pageable", two, four)) == budget.pageable
    launches = per_layer("launches", two, four)
    ours = launches["training"] + launches["autograd"] - (four["bare"] - two["bare"]) / 2
    assert 0 < ours <= budget.launches
    assert two["in passing"] <= budget.passing
    for found in (two, four):
        in_use, of_tensors = found["model"]
        assert in_use == pytest.approx(of_tensors, rel=0.01)
        in_use, planned = found["ours"]
        assert in_use <= (1 + budget.beside) * planned
        locked, on_the_host = found["locked"]
        assert locked <= on_the_host


def test_a_step_waits_for_nothing_but_the_copies_of_its_batch(emulated_forge: Forge, tmp_path: Path) -> None:
    (found,) = emulated_forge.results(
        "tests.emulated_accelerator.counting:count", tmp_path, world=1, name="tiles, state on the host", layers=2
    )
    waits = {what: times / COUNTED for what, times in found["waits"].items()}
    assert by_whom_computes(waits) == {"training: copy up": 3}
    assert waits["training: event"] <= 4  # times of the device, at the end of a window


@pytest.mark.slow
def test_rows_that_do_not_fit_the_cache_cost_more_waits(emulated_forge: Forge, tmp_path: Path) -> None:
    """How many more depends on what is selected. Each spilled part goes down while autograd waits."""
    two, four = costs(emulated_forge, tmp_path, "adapter, spill")
    waits = by_whom_computes(per_layer("waits", two, four))
    assert sum(waits.values()) <= 30 and waits["autograd: copy down"] > 0
