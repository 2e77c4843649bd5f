# SPDX-License-Identifier: Apache-2.0
"""Runs architecture x method x ZeRO stage on tiny random models, and writes docs/architectures.md.

    python -m tests.architectures.table --write            # minutes
    python -m tests.architectures.table --only "T5.*subspace.*3"

A cell (`tests.architectures.cell`) trains, saves, resumes and exports; it must also have the losses of its architecture
and method in stage 2 on one rank.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.forked import forge

DOCS = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
METHODS = ("sparse_adapter", "subspace", "sparse_matrix")
STAGES = (2, 3)
ON_TWO_RANKS = ("Qwen2", "Mixtral", "BERT, masked words", "BART")
TIMEOUT = 120

Cell = tuple[str, str, int, int]
"""Architecture, method, stage, ranks."""


def every_cell() -> list[Cell]:
    from tests.architectures.models import architectures

    one = [(a, method, stage, 1) for a, method, stage in itertools.product(architectures(), METHODS, STAGES)]
    return one + [(a, method, stage, 2) for a, method, stage in itertools.product(ON_TWO_RANKS, METHODS, STAGES)]


def run_cells(cells: Iterable[Cell], *, told: bool = False) -> dict[Cell, dict[str, Any]]:
    """What each cell gave: `found` by proof, and its `losses`."""
    results: dict[Cell, dict[str, Any]] = {}
    with forge() as process, tempfile.TemporaryDirectory() as folder:
        for number, cell in enumerate(cells):
            architecture, method, stage, world = cell
            place = Path(folder) / str(number)
            arguments = {"architecture": architecture, "method": method, "stage": stage}
            ended = process.run("tests.architectures.cell:run_cell", place, world=world, timeout=TIMEOUT, **arguments)
            results[cell] = _together(ended)
            shutil.rmtree(place)
            if told:
                print(cell, f"{max(rank.seconds for rank in ended):.1f} s", results[cell]["found"], flush=True)
    return results


def _together(ended: list[Any]) -> dict[str, Any]:
    """The first fault of any rank."""
    for rank in ended:
        if rank.code != 0 or rank.result is None:
            last = [line for line in rank.log.splitlines() if line.strip()][-1:]
            why = f"ended by signal {-rank.code} after {rank.seconds:.0f} s" if rank.code < 0 else "".join(last)
            return {"found": {"trains": why}, "losses": [], "log": rank.log}
    first = ended[0].result
    for rank in ended[1:]:
        for proof, fault in rank.result["found"].items():
            first["found"][proof] = first["found"].get(proof) or fault
        if rank.result["losses"] != first["losses"]:
            first["found"]["trains"] = first["found"].get("trains") or "ranks with the same batch have other losses"
    return {**first, "log": "\n".join(rank.log for rank in ended)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {DOCS.name}")
    parser.add_argument("--only", default="", help="a regular expression that cells must match, as they are printed")
    parser.add_argument("--log", action="store_true", help="print the log of cells with a fault")
    options = parser.parse_args()
    cells = [cell for cell in every_cell() if re.search(options.only, str(cell))]
    results = run_cells(cells, told=True)
    if options.log:
        for cell, result in results.items():
            if any(result["found"].values()):
                print("=" * 100, cell, result["log"], sep="\n")


if __name__ == "__main__":
    main()
