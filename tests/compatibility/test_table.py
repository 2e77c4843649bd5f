# SPDX-License-Identifier: Apache-2.0
"""docs/reference/compatibility.md is what a run gives."""

from __future__ import annotations

import itertools

import pytest

from tests.compatibility.cells import DOCS, METHODS, Cell, every_cell, reference, run_cells, table, verdict


@pytest.mark.slow
def test_cells_far_from_the_plain_one_train_alike() -> None:
    """The corners on one rank; all cells take far longer."""
    far: list[Cell] = [
        (method, precision, 3, 1, 2, checkpointing)
        for method, (precision, checkpointing) in itertools.product(
            METHODS, (("fp32", "nonreentrant"), ("bf16", "reentrant"), ("autocast", "none"))
        )
    ]
    cells = list(dict.fromkeys([*map(reference, far), *far]))
    found = run_cells(cells)
    assert {cell: verdict(cell, found) for cell in far} == dict.fromkeys(far, "")


@pytest.mark.long
def test_the_page_is_what_a_run_of_all_cells_gives() -> None:
    assert table(run_cells(every_cell())) == DOCS.read_text()
