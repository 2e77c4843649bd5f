# SPDX-License-Identifier: Apache-2.0
"""Trains with DeepSpeed in several configurations that have no block, and prints a digest of all that came of it."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from tests.toy import batch, ds_config, make_engine, tiny_llama

CASES: dict[str, dict[str, Any]] = {
    "stage 0": {"zero_optimization": {"stage": 0}},
    "stage 1, bf16, accumulation": {"zero_optimization": {"stage": 1}, "gas": 2, "precision": "bf16"},
    "stage 2, fp16": {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, "initial_scale_power": 8}},
    "stage 3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "stage 3, bf16, accumulation": {"zero_optimization": {"stage": 3}, "gas": 2, "precision": "bf16"},
    "stage 2, schedule": {
        "zero_optimization": {"stage": 2},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_max_lr": 1e-2}},
    },
}


def main() -> None:
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {name: run(case, folder / name.replace(" ", "_")) for name, case in CASES.items()}
    found["loaded"] = sorted(name for name in sys.modules if name.startswith("meft_ds.plugin.e"))
    found["armed"] = "meft_ds" in sys.modules
    print("RESULT " + json.dumps(found), flush=True)


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    config = ds_config(block=None, **case)
    engine = make_engine(config, tiny_llama())
    losses = steps(engine, 0, 3)
    engine.save_checkpoint(str(folder))
    losses += steps(engine, 3, 2)
    digest, norm = state(engine), engine.get_global_grad_norm()
    engine.load_checkpoint(str(folder))
    again = steps(engine, 3, 2)
    kinds = [type(x).__module__ + "." + type(x).__qualname__ for x in (engine, engine.optimizer, engine.lr_scheduler)]
    found = {
        "kinds": kinds,
        "losses": losses,
        "after loading": again,
        "digest": digest,
        "norm": None if norm is None else float(norm),
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()),
    }
    engine.destroy()
    return found


def steps(engine: Any, first: int, count: int) -> list[float]:
    losses = []
    for micro in range(first, first + count * engine.gradient_accumulation_steps()):
        loss = engine(**batch(micro)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def state(engine: Any) -> str:
    digest = hashlib.sha256()
    for p in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            digest.update(p.detach().float().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
