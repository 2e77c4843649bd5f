# SPDX-License-Identifier: Apache-2.0
"""How many of the tiles that one kind of score chooses another kind chooses too.

    python benchmarks/tile_overlap.py                            # the example's base and facts, about a minute
    python benchmarks/tile_overlap.py --density 0.05 --block-size 16

Each kind scores the untrained base in `--steps` windows of 32 facts, through the product; "abs_mean, other batches" is
how far the choice depends on the batches. Budget "global" and preset "all" where the name says nothing else. Also how
many tiles each layer and role gets. Prints a table and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import tasks  # noqa: E402
import torch  # noqa: E402
from tile_picture import table  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq  # noqa: E402

from benchmarks.machine import machine, machine_line  # noqa: E402
from benchmarks.quality import BASE, BATCH, orders  # noqa: E402
from benchmarks.quality_methods import TILES, SparseMatrix  # noqa: E402
from meft_ds.sparse_matrix.choice.choice import Choice  # noqa: E402

# name: (settings, seed of the batches)
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "abs_mean": ({"score": "abs_mean"}, 0),
    "abs_mean, other batches": ({"score": "abs_mean"}, 1),
    "l2": ({"score": "l2"}, 0),
    "paper": ({"score": "paper"}, 0),
    "mean_abs": ({"score": "mean_abs"}, 0),
    "magnitude": ({"score": "magnitude"}, 0),
    "random": ({"score": "random"}, 0),
    "abs_mean, per module": ({"score": "abs_mean", "budget": "per_module"}, 0),
    "abs_mean, not normalized": ({"score": "abs_mean", "normalize": False}, 0),
    "paper, preset paper": ({"score": "paper", "preset": "paper"}, 0),
}
REFERENCE = "abs_mean"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=TILES["density"])
    parser.add_argument("--block-size", type=int, default=TILES["block_size"])
    parser.add_argument("--steps", type=int, default=TILES["warmup_steps"], help="windows that score")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the choices, <kind>.json")
    args = parser.parse_args()
    settings = {"density": args.density, "block_size": args.block_size, "budget": "global", "warmup_steps": args.steps}
    choices = {name: choose({**settings, **block}, seed, args.steps) for name, (block, seed) in KINDS.items()}
    if args.keep is not None:
        for name, choice in choices.items():
            choice.save(args.keep / f"{name.replace(', ', '_').replace(' ', '_')}.json")
    tiles = {name: {(t.name, t.rows, t.cols) for t in choice.tiles} for name, choice in choices.items()}
    rows: list[dict[str, Any]] = [
        {
            "kind": name,
            "tiles": len(tiles[name]),
            "shared": len(tiles[name] & tiles[REFERENCE]) / len(tiles[REFERENCE]),
            "layers": count(choice, "layer"),
            "roles": count(choice, "role"),
        }
        for name, choice in choices.items()
    ]
    there = sum(elements for _, _, elements in choices[REFERENCE].cells)
    chance = choices[REFERENCE].elements / there
    layers, roles = (list(dict.fromkeys(cell[i] for cell in choices[REFERENCE].cells)) for i in (0, 1))
    heads = "".join(f"{layer!s:>5}" for layer in layers) + "  role" + "".join(f"{role:>6}" for role in roles)
    print(f"\n{'kind':<26}{'tiles':>6}{'shared':>8}  layer{heads}")
    for row in rows:
        cells = "".join(f"{row['layers'].get(layer, 0):>5}" for layer in layers) + " " * 6
        cells += "".join(f"{row['roles'].get(role, 0):>6}" for role in roles)
        print(f"{row['kind']:<26}{row['tiles']:>6}{row['shared']:>8.1%}       {cells}")
    print(machine_line(machine()))
    print(f"by chance {chance:.1%}: the chosen share of what could be chosen")
    print(
        json.dumps(
            {
                "benchmark": "tile_overlap",
                **settings,
                "machine": machine(),
                "reference": REFERENCE,
                "chance": chance,
                "rows": rows,
            }
        )
    )


def choose(block: dict[str, Any], seed: int, steps: int) -> Choice:
    """The tiles that an engine with these settings chooses on the facts."""
    torch.manual_seed(0)
    task = tasks.load_task("facts", None, None, 256, 1, 0)
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="right")
    rows = tasks.encode(task.train, tokenizer, 256)
    collate = DataCollatorForSeq2Seq(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "tiles.json")
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        learner = SparseMatrix(model, {**block, "choice_out": path}, BATCH["facts"])
        for chosen in orders(len(rows), BATCH["facts"], learner.scoring and steps, seed):
            learner.step(dict(collate([rows[i] for i in chosen])), 0.0)
        learner.close()
        return Choice.load(path)


def count(choice: Choice, what: str) -> dict[Any, int]:
    """Tiles by layer or by role."""
    found: dict[Any, int] = {}
    for row in table(choice):
        found[row[what]] = found.get(row[what], 0) + row["tiles"]
    return found


if __name__ == "__main__":
    main()
