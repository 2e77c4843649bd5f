# SPDX-License-Identifier: Apache-2.0
"""What ranks do in test_successors.py: functions that a forge runs on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from meft_ds.sparse_adapter.attach import find_adapters
from tests.toy import ADAPTER, batch, ds_config, make_engine, tiny_llama


def again(folder: Path, destroyed: bool) -> dict[str, Any]:
    """Two engines on one model, the first destroyed or still there; rows lie in memory that the ranks share."""
    model, config = tiny_llama(), ds_config(block={"sparse_adapter": dict(ADAPTER)}, micro=2, precision="bf16")
    engine = make_engine(config, model)
    losses = [_step(engine, seed) for seed in range(3)]
    rows = [adapter.rows.master for adapter in find_adapters(model).values()]
    was, places = [r.clone() for r in rows], [r.data_ptr() for r in rows]
    if destroyed:
        engine.destroy()
    second = make_engine(config, model)
    rows = [adapter.rows.master for adapter in find_adapters(model).values()]
    found = {
        "kept": all(torch.equal(a, b) for a, b in zip(rows, was, strict=True)),
        "places": [r.data_ptr() for r in rows] == places,
    }
    losses += [_step(second, seed) for seed in range(3)]
    second.meft_flush()
    dist.barrier()
    sums = [float(r.double().sum()) for r in rows]
    second.destroy()
    return {**found, "losses": losses, "sums": sums, "changed": not torch.equal(rows[0], was[0])}


def _step(engine: Any, seed: int) -> float:
    loss = engine(**batch(2 * seed + dist.get_rank(), rows=2)).loss
    engine.backward(loss)
    engine.step()
    return float(loss)
