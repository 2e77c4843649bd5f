# SPDX-License-Identifier: Apache-2.0
"""Runs method x precision x ZeRO stage x ranks x accumulation x checkpointing: docs/reference/compatibility.md.

    python -m tests.compatibility.cells --write            # minutes

A cell trains a tiny Llama for some steps on the same rows, dealt out to ranks and micro-batches, and must give the
losses of its method and precision on one rank in stage 0 without accumulation and checkpointing. What depends on the
micro-batch by its definition (scores of tiles, fits of projectors) is left out here and tested elsewhere.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tests.ranks import run_ranks
from tests.toy import ADAPTER, VOCAB, ds_config, make_engine, tiny_llama

DOCS = Path(__file__).resolve().parents[2] / "docs" / "reference" / "compatibility.md"
METHODS: dict[str, dict[str, Any]] = {
    "sparse_adapter": {"sparse_adapter": dict(ADAPTER), "train": ["norm"]},
    "subspace": {"subspace": {"projectors": "random", "nonzeros": 2, "refit_interval": 2}},
    "sparse_matrix": {"sparse_matrix": {"density": 0.1, "block_size": 8, "score": "magnitude"}, "train": ["norm"]},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}
STAGES, RANKS, ACCUMULATION, CHECKPOINTING = (0, 1, 2, 3), (1, 2), (1, 2), ("none", "reentrant", "nonreentrant")
ROWS, STEPS, BATCHES = 4, 8, 2
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-1, "fp16": 5e-2, "autocast": 5e-2}

Cell = tuple[str, str, int, int, int, str]
"""Method, precision, stage, ranks, accumulation, checkpointing."""


def every_cell() -> list[Cell]:
    return list(itertools.product(METHODS, PRECISIONS, STAGES, RANKS, ACCUMULATION, CHECKPOINTING))


def run_cells(cells: Iterable[Cell], timeout: float = 1500) -> dict[Cell, list[float] | str]:
    """Losses of each cell by step, or the error; one start of the program per number of ranks."""
    found: dict[Cell, list[float] | str] = {}
    for ranks in RANKS:
        chosen = [cell for cell in cells if cell[3] == ranks]
        if chosen:
            output = run_ranks(Path(__file__), ranks, json.dumps(chosen), timeout=timeout)[0]
            line = next(line for line in output.splitlines() if line.startswith("RESULT "))
            found |= dict(zip(chosen, json.loads(line.removeprefix("RESULT ")), strict=True))
    return found


def reference(cell: Cell) -> Cell:
    return cell[0], cell[1], 0, 1, 1, "none"


def verdict(cell: Cell, found: dict[Cell, list[float] | str]) -> str:
    """ "" if the cell trained as its reference did, else what is wrong."""
    losses, expected = found[cell], found[reference(cell)]
    if isinstance(losses, str) or isinstance(expected, str):
        return losses if isinstance(losses, str) else f"its reference failed: {expected}"
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    learned = max(abs(losses[i] - losses[i - BATCHES]) for i in range(BATCHES, STEPS))
    if learned < 4 * TOLERANCE[cell[1]]:
        return f"it learns too little to tell: losses of a batch differ by at most {learned:.1e}"
    return "" if worst <= TOLERANCE[cell[1]] else f"losses differ by {worst:.1e}"


def table(found: dict[Cell, list[float] | str]) -> str:
    """The page."""
    import deepspeed
    import transformers

    runs = list(itertools.product(ACCUMULATION, CHECKPOINTING))
    columns = list(itertools.product(STAGES, RANKS))
    lines = [
        "# Compatibility",
        "",
        "Written by `python -m tests.compatibility.cells --write`, not by hand; `pytest -m long tests/compatibility`",
        f"holds it against a new run. A cell counts the runs of {len(runs)} (accumulation 1 and 2, checkpointing none,",
        "reentrant and non-reentrant) that gave the losses of one rank in stage 0 without either. Tiny Llama on a CPU, "
        f"torch {torch.__version__.split('+')[0]}, deepspeed {deepspeed.__version__}, transformers "
        f"{transformers.__version__}. **Not run on a GPU.**",
        "",
        "| method | precision | "
        + " | ".join(f"stage {stage}, {ranks} rank{'s'[: ranks - 1]}" for stage, ranks in columns)
        + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    faults: list[str] = []
    for method, precision in itertools.product(METHODS, PRECISIONS):
        cells = []
        for stage, ranks in columns:
            told = {run: verdict((method, precision, stage, ranks, *run), found) for run in runs}
            cells.append(f"{sum(not fault for fault in told.values())} of {len(runs)}")
            for (gas, checkpointing), fault in told.items():
                where = f"{method}, {precision}, stage {stage}, {ranks} ranks, accumulation {gas}, {checkpointing}"
                faults += [f"* {where}: {fault}"] if fault else []
        lines.append(f"| {method} | {precision} | " + " | ".join(cells) + " |")
    tolerances = ", ".join(f"{precision} {tolerance:g}" for precision, tolerance in TOLERANCE.items())
    lines += [
        "",
        f"Largest difference of a loss that counts as the same: {tolerances}.",
        *([""] if faults else []),
        *faults,
    ]
    return "\n".join(lines) + "\n"


# -- one rank of the program -------------------------------------------------------------------------------------------


def losses_of(cell: Cell) -> list[float]:
    method, precision, stage, world, gas, checkpointing = cell
    rank, micro = int(os.environ["RANK"]), ROWS // world // gas
    model = tiny_llama()
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    extra = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20}, **PRECISIONS[precision]}
    config = ds_config(block=METHODS[method], gas=gas, micro=micro, **extra)
    # eps: the step of a gradient near 0 must not turn its rounding into a difference
    config["optimizer"]["params"] |= {"lr": 2e-2, "eps": 1e-4}
    engine = make_engine(config, model)
    losses = []
    for step in range(STEPS):
        ids = torch.randint(0, VOCAB, (ROWS, 8), generator=torch.Generator().manual_seed(step % BATCHES))
        total = torch.zeros(())
        for part in range(gas):
            first = (rank * gas + part) * micro
            mine = ids[first : first + micro]
            loss = engine(input_ids=mine, labels=mine, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / gas
        if world > 1:
            torch.distributed.all_reduce(total)
        losses.append(total.item() / world)
    engine.destroy()
    return losses


def as_rank(cells: list[Cell]) -> None:
    found: list[list[float] | str] = []
    for cell in cells:
        try:
            found.append(losses_of(cell))
        except (RuntimeError, ValueError, AssertionError, AttributeError, TypeError) as fault:
            found.append(f"{type(fault).__name__}: {str(fault).splitlines()[0][:160]}")
    print("RESULT " + json.dumps(found), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].startswith("["):
        as_rank([tuple(cell) for cell in json.loads(sys.argv[1])])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {DOCS.name}")
    write = parser.parse_args().write
    page = table(run_cells(every_cell()))
    print(page)
    if write:
        DOCS.write_text(page)


if __name__ == "__main__":
    main()
