# SPDX-License-Identifier: Apache-2.0
"""The contract suite can fail: with any of the waits planted away, a cell of it trains differently or dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emulated_accelerator.cells import CELLS
from tests.emulated_accelerator.faults import FAULTS
from tests.forked import Forge
from tests.methods import differing

Calm = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def calm(emulated_forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """What each rank of a cell ends with without a fault; trained once."""
    known: dict[str, list[dict[str, Any]]] = {}

    def of(cell: str) -> list[dict[str, Any]]:
        if cell not in known:
            folder = tmp_path_factory.mktemp("calm")
            emulated_forge.results(
                "tests.emulated_accelerator.cells:train", folder, world=CELLS[cell].world, cell=cell, weather="calm"
            )
            known[cell] = [torch.load(folder / f"state{rank}.pt") for rank in range(CELLS[cell].world)]
        return known[cell]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "cell"), [(name, cell) for name, fault in FAULTS.items() for cell in fault.cells])
def test_a_fault_is_noticed(fault: str, cell: str, calm: Calm, emulated_forge: Forge, tmp_path: Path) -> None:
    ended = emulated_forge.run(
        "tests.emulated_accelerator.faults:train",
        tmp_path,
        world=CELLS[cell].world,
        timeout=60,
        cell=cell,
        fault=fault,
    )
    for one in ended:
        assert "does not fit" not in one.log, one.log[-1000:]
    assert any(one.code for one in ended) or any(
        differing(torch.load(tmp_path / f"state{rank}.pt"), state) for rank, state in enumerate(calm(cell))
    )
