# SPDX-License-Identifier: Apache-2.0
"""One rank of test_traffic.py: counts what a step's collectives are given, by kind, and prints it with the formulas."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from tests.toy import ADAPTER, HIDDEN, batch, ds_config, make_engine, tiny_llama

BLOCKS: dict[str, dict[str, Any]] = {
    "sparse_adapter": {"sparse_adapter": dict(ADAPTER), "train": ["norm"]},
    "subspace": {"subspace": {"nonzeros": 2, "projectors": "random"}},
    "sparse_matrix": {"sparse_matrix": {"density": 0.1, "block_size": 8, "score": "magnitude"}, "train": ["norm"]},
}


def main() -> None:
    found = {name: run(block) for name, block in BLOCKS.items()}
    print("RESULT " + json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def run(block: dict[str, Any]) -> dict[str, Any]:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    engine = make_engine(ds_config(block=block, micro=4 // world), tiny_llama())
    for step in range(2):
        counts = counted(engine, step, slice(rank * (4 // world), (rank + 1) * (4 // world)))
    flat = [unit for unit in engine.optimizer.pipeline.units if unit.wire != "rows"]
    rows = sum(engine.meft_stats().get("active_rows", []))
    expected = {
        # the payload's float32 sum, and the updated slice padded to the longest
        "all_reduce": sum(4 * unit.numel for unit in flat),
        "all_gather": sum(4 * -(-unit.numel // world) for unit in flat),
        # ids and gradients of the rows that this rank's batch activated, and how many go to each rank
        "all_to_all_single": rows * (8 + 4 * 2 * HIDDEN)
        + (8 * world * len(engine._meft_methods[0].adapters) if rows else 0),
    }
    dense = sum(p.numel() * 4 for p in engine.module.parameters())
    engine.destroy()
    return {"counts": counts, "expected": expected, "dense": dense}


def counted(engine: Any, step: int, mine: slice) -> dict[str, int]:
    """Bytes that this rank gives to collectives in one step, but for those of a few numbers."""
    counts: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "all_to_all_single")}

    def wrapped(name: str) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if name == "all_reduce" else args[1]
            if given.dtype != torch.float64:  # the norm and the verdict
                counts[name] += given.numel() * given.element_size()
            return originals[name](*args, **kwargs)

        return collective

    for name in originals:
        setattr(dist, name, wrapped(name))
    try:
        loss = engine(**{key: t[mine] for key, t in batch(step).items()}).loss
        engine.backward(loss)
        engine.step()
        engine.meft_flush()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return {name: counts[name] for name in originals}


if __name__ == "__main__":
    main()
