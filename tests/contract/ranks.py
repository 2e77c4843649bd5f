# SPDX-License-Identifier: Apache-2.0
"""What the ranks of tests/contract/test_ranks.py do: functions that a forge runs on every rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tests.methods import METHODS, VARIANTS, Entry, differing, engine_of, everything, parts, whole

WINDOWS = 5
ENTRIES = {entry.name: entry for entry in [*METHODS, *VARIANTS]}


def trained(entry: Entry, rank: int = 0, world: int = 1, **options: Any) -> tuple[Any, list[float]]:
    """An engine after some windows over this rank's parts of the same batches, and the norms of their gradients."""
    engine = engine_of(entry, gas=1, micro=8 // world, late=rank, **options)
    norms = []
    for step in range(entry.untrained + WINDOWS):
        engine.backward(engine(**(parts(step, 2)[rank] if world == 2 else whole(step, 2))).loss)
        engine.step()
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    return engine, norms


def train(folder: Path, names: list[str]) -> dict[str, Any]:
    """Train each method, and in bf16 twice; leaves this rank's state in the folder."""
    rank, found = int(os.environ["RANK"]), {}
    for name in names:
        engine, norms = trained(ENTRIES[name], rank, 2)
        state = everything(engine)
        (once, first), (twice, second) = (trained(ENTRIES[name], rank, 2, precision="bf16") for _ in range(2))
        repeats = first == second and differing(everything(once), everything(twice)) == []
        found[name] = {"norms": norms, "repeats": repeats}
        torch.save(state, folder / f"{name}.{rank}.pt")
    return found
