# SPDX-License-Identifier: Apache-2.0
"""Runs architecture x method x ZeRO stage on tiny random models, and writes docs/reference/architectures.md.

    python -m tests.architectures.table --write            # minutes
    python -m tests.architectures.table --only "T5.*subspace', 3" --log

A cell (`tests.architectures.cell`) trains, saves, resumes and exports. Its losses must also be those of the same
architecture and method in stage 2 on one rank.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.forked import Ended, Forge

DOCS = Path(__file__).resolve().parents[2] / "docs" / "reference" / "architectures.md"
METHODS = ("sparse_adapter", "subspace", "sparse_matrix")
STAGES = (2, 3)
PROOFS = ("trains", "saves", "resumes", "exports")
ON_TWO_RANKS = ("Qwen2", "Mixtral", "BERT, masked words", "BART")
TIMEOUT = 120
_TOLERANCE = 1e-3  # of losses in another stage, or on other ranks: the same products, added up in another order

Cell = tuple[str, str, int, int]
"""Architecture, method, stage, ranks."""
Found = dict[str, Any]
"""What is wrong with each proof that was tried, "" for nothing; or {"refused": reason}. `losses` by step, and `log`."""


def every_cell() -> list[Cell]:
    from tests.architectures.models import architectures

    one = [(a, method, stage, 1) for a, method, stage in itertools.product(architectures(), METHODS, STAGES)]
    return one + [(a, method, stage, 2) for a, method, stage in itertools.product(ON_TWO_RANKS, METHODS, STAGES)]


def run_cells(cells: Iterable[Cell], *, tell: bool = False) -> dict[Cell, Found]:
    """What each cell gave; cells that are to agree with one that ran before are compared with it."""
    results: dict[Cell, Found] = {}
    with Forge() as process, tempfile.TemporaryDirectory() as folder:
        for number, cell in enumerate(cells):
            architecture, method, stage, ranks = cell
            ended = process.run(
                "tests.architectures.cell:run_cell",
                place := Path(folder) / str(number),
                world=ranks,
                timeout=TIMEOUT,
                **{"architecture": architecture, "method": method, "stage": stage},
            )
            shutil.rmtree(place)
            results[cell] = _compared(_together(ended), results.get((architecture, method, 2, 1)))
            if tell:
                told = {key: text for key, text in results[cell].items() if key not in ("losses", "log")}
                print(cell, f"{max(rank.seconds for rank in ended):.1f} s", told, flush=True)
    return results


def fault(found: Found) -> str:
    """The first fault of a cell; "" for none, or for a refusal."""
    if "refused" in found:
        return ""
    return next((f"{proof}: {found[proof]}" for proof in PROOFS if found.get(proof)), "")


def table(results: dict[Cell, Found]) -> str:
    """The page."""
    import deepspeed
    import torch
    import transformers

    from tests.architectures.models import architectures

    columns = list(itertools.product(METHODS, STAGES))
    lines = [
        "# Architectures",
        "",
        "Written by `python -m tests.architectures.table --write`, not by hand; `pytest -m long tests/architectures`",
        "holds it against a new run. Tiny models with random weights, made from their configs, on a CPU in fp32, no",
        "dropout; biases are not 0, and stage 3 partitions parameters of any size",
        "(`stage3_param_persistence_threshold: 0`). One rank where no number is given. Settings are the defaults, but",
        "tiles are 8 wide at density 0.1 after 2 steps of scoring, and projectors are fitted in 2 steps. It shows that",
        "things work, not how well they learn.",
        f"torch {torch.__version__.split('+')[0]}, deepspeed {deepspeed.__version__}, transformers "
        f"{transformers.__version__}.",
        "",
        "* **T**rains: the first loss is the plain model's, losses fall, everything that the method trains has moved,",
        "  and losses are those of stage 2 on one rank.",
        "* **S**aves: `save_checkpoint`, after which training goes on.",
        "* **R**esumes: a new engine, on other weights, loads it and goes on with the same losses and weights, bit for",
        "  bit.",
        "* **E**xports: what `save_pretrained` and `save_16bit_model` write, loaded by plain transformers (and",
        "  `load_adapter`), gives the same logits.",
        "* `refused`: `deepspeed.initialize` raises a `ValueError` that says why.",
        "",
        "| architecture | " + " | ".join(f"`{method}`, stage {stage}" for method, stage in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    notes: dict[str, list[str]] = defaultdict(list)
    for name, ranks in dict.fromkeys((cell[0], cell[3]) for cell in results):
        title = f"{name} (`{architectures()[name].model}`)" + (f", {ranks} ranks" if ranks > 1 else "")
        row = []
        for method, stage in columns:
            found = results[name, method, stage, ranks]
            row.append(_letters(found))
            told = f"refused: {found['refused'].split('. ')[0]}" if "refused" in found else fault(found)
            if told:
                notes[told].append(f"{name}, {method}, stage {stage}" + (f", {ranks} ranks" if ranks > 1 else ""))
        lines.append(f"| {title} | " + " | ".join(row) + " |")
    if notes:
        lines += ["", "## What is refused or does not work", ""]
        lines += [f"* {'; '.join(where)}: {told}" for told, where in notes.items()]
    return "\n".join(lines) + "\n"


def _letters(found: Found) -> str:
    if "refused" in found:
        return "refused"
    return "".join(proof[0].upper() if found.get(proof) == "" else "-" for proof in PROOFS)


def _together(ended: list[Ended]) -> Found:
    """The first fault of any rank."""
    log = "\n".join(rank.log for rank in ended)
    for rank in ended:
        if rank.result is None:
            last = [line for line in rank.log.splitlines() if line.strip()][-1:]
            why = f"ended by signal {-rank.code}" if rank.code < 0 else "".join(last)
            return {"trains": why, "losses": [], "log": log}
    found: Found = ended[0].result
    for rank in ended[1:]:
        for proof, told in rank.result.items():
            if proof != "losses":
                found[proof] = found.get(proof) or told
        if rank.result["losses"] != found["losses"]:
            found["trains"] = found.get("trains") or "ranks with the same batch have other losses"
    return {**found, "log": log}


def _compared(found: Found, with_found: Found | None) -> Found:
    if with_found is None or found.get("trains") != "" or not with_found["losses"]:
        return found
    apart = max(abs(a - b) for a, b in zip(found["losses"], with_found["losses"], strict=False))
    return (
        {**found, "trains": f"losses are {apart:.1e} from those of stage 2 on one rank"}
        if apart > _TOLERANCE
        else found
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {DOCS.name}")
    parser.add_argument("--only", default="", help="a regular expression to be found in a cell, as it is printed")
    parser.add_argument("--log", action="store_true", help="print the logs of cells with a fault")
    options = parser.parse_args()
    results = run_cells([cell for cell in every_cell() if re.search(options.only, str(cell))], tell=True)
    for cell, found in results.items():
        if options.log and fault(found):
            print("=" * 100, cell, found["log"], sep="\n")
    if not options.only:
        print(page := table(results))
        if options.write:
            DOCS.write_text(page)


if __name__ == "__main__":
    main()
