# SPDX-License-Identifier: Apache-2.0
"""docs/reference/architectures.md is what a run gives."""

from __future__ import annotations

import itertools

import pytest

from tests.architectures.table import DOCS, METHODS, STAGES, Cell, every_cell, fault, run_cells, table

FEW = ("Qwen2", "Qwen2-MoE", "BERT, classes", "T5", "ViT")
"""Biases, stacked experts, an encoder with a head for classes, an encoder with a decoder, images."""


@pytest.mark.slow
def test_models_of_every_kind_train_save_resume_and_export_with_every_method_in_both_stages() -> None:
    cells: list[Cell] = [(a, method, stage, 1) for a, method, stage in itertools.product(FEW, METHODS, STAGES)]
    results = run_cells(cells)
    assert {cell: fault(found) or found.get("refused", "") for cell, found in results.items()} == dict.fromkeys(
        cells, ""
    )


@pytest.mark.long
def test_the_page_is_what_a_run_of_all_cells_gives() -> None:
    assert table(run_cells(every_cell())) == DOCS.read_text()
