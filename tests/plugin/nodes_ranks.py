# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_nodes.py do: train, laid out on nodes in several ways, one after another.

Ranks that `MEFT_DS_NODE` puts on different nodes share no memory and no store, as on different machines.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.toy import ADAPTER, batch, ds_config, make_engine, tiny_llama

BLOCKS: dict[str, dict[str, Any]] = {
    "dense": {"sparse_adapter": dict(ADAPTER), "train": ["norm"]},
    "lazy": {"sparse_adapter": dict(ADAPTER, optimizer="lazy")},
    "compress": {"sparse_adapter": dict(ADAPTER, compress={"dim": 8, "nonzeros": 2})},
    "subspace": {"subspace": {"projectors": "random", "nonzeros": 2}},
    "sparse_matrix": {"sparse_matrix": {"density": 0.1, "block_size": 8, "warmup_steps": 2}},
}


def trainings(folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [training(case) for case in cases]


def training(case: dict[str, Any]) -> dict[str, Any]:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if "layout" in case:  # else what the machine looks like to the ranks decides
        os.environ["MEFT_DS_NODE"] = f"node{case['layout'][rank]}"
        os.environ["LOCAL_RANK"] = str(case["layout"][:rank].count(case["layout"][rank]))
    schedule = {"schedule": {"mode": case.get("mode", "exact")}}
    engine = make_engine(ds_config(block=BLOCKS[case["block"]] | schedule, micro=4 // world), tiny_llama())
    if "load" in case:
        engine.load_checkpoint(case["load"])
    losses = []
    for step in range(case.get("from", 0), case.get("from", 0) + case.get("steps", 4)):
        mine = slice(rank * (4 // world), (rank + 1) * (4 // world))
        loss = engine(**{key: t[mine] for key, t in batch(100 + step).items()}).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    if "save" in case:
        engine.save_checkpoint(case["save"])
    engine.meft_flush()
    digest = hashlib.sha256()
    for adapter in getattr(engine._meft_methods[0], "adapters", []):
        digest.update(adapter.rows.master.numpy().tobytes())
    for p in engine.module.parameters():
        digest.update(p.detach().numpy().tobytes())
    stats = engine.meft_stats()
    rows = [unit for unit in engine.optimizer.pipeline.units if unit.wire == "rows"]
    stores = {t.data_ptr(): t.numel() * t.element_size() for unit in rows for t in unit.rows.store}
    moments = [t for unit in rows for name, t in unit.state_tensors().items() if name.startswith("exp_avg")]
    found = {
        "losses": losses,
        "norm": engine.get_global_grad_norm(),
        "digest": digest.hexdigest(),
        "host_bytes": stats["host_bytes"],
        "store": sum(stores.values()),
        "moments": sum(t.numel() * t.element_size() for t in moments),
        "files": sorted(p.name for p in Path(case["save"]).glob("*/meft/*")) if "save" in case else [],
    }
    engine.destroy()
    return found


if __name__ == "__main__":  # in a process that was given a /dev/shm of its own
    print("RESULT " + json.dumps(trainings(Path(), json.loads(sys.argv[1]))), flush=True)
    # peers must not go away while a collective of this rank still runs
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
