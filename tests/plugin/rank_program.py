# SPDX-License-Identifier: Apache-2.0
"""A small training program for test_ranks.py, started once per rank.

Usage: rank_program.py ACTION FOLDER [key=value ...]
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tests.offload.overlap import make_late
from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of, tiny_llama

ROWS = 4  # per rank and micro-batch with two ranks


def engine_for(options: dict[str, str], seed: int = 0):  # type: ignore[no-untyped-def]
    adapter = {**ADAPTER, "optimizer": options.get("optimizer", "dense"), "selection": options.get("selection", "host")}
    if "compress" in options:
        adapter["compress"] = {"dim": int(options["compress"])}
    world = int(os.environ["WORLD_SIZE"])
    config = ds_config(
        precision=options.get("precision", "fp32"),
        gas=int(options.get("gas", "1")),
        micro=2 * ROWS // world,
        block={
            "schedule": {"mode": options.get("mode", "exact")},
            "sparse_adapter": adapter,
            "train": [r"layers\.0\..*norm"],
        },
    )
    # with a tiny eps AdamW turns rounding differences of near-zero gradients into whole steps
    config["optimizer"]["params"]["eps"] = 1e-4
    model = tiny_llama(seed)
    if "checkpointing" in options:
        model.gradient_checkpointing_enable({"use_reentrant": options["checkpointing"] == "reentrant"})
    engine = make_engine(config, model)
    if "late" in options:
        make_late(
            engine.optimizer.pipeline,
            100 * int(options["late"]) + int(os.environ["RANK"]),
            float(options.get("late_s", "2e-3")),
        )
    return engine


def share(seed: int) -> dict[str, torch.Tensor]:
    """This rank's part of the same global batch of 8 sentences, whatever the number of ranks."""
    whole = batch(seed, rows=2 * ROWS)
    whole["attention_mask"][:] = 1
    whole["labels"] = whole["input_ids"].clone()
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    each = 2 * ROWS // world
    return {k: t[rank * each : (rank + 1) * each] for k, t in whole.items()}


def run(engine, steps: int, first: int) -> None:  # type: ignore[no-untyped-def]
    for micro in range(steps * engine.gradient_accumulation_steps()):
        engine.backward(engine(**share(first + micro)).loss)
        engine.step()


def main() -> None:
    action, folder = sys.argv[1], Path(sys.argv[2])
    options = dict(item.split("=") for item in sys.argv[3:])
    # exit handlers run newest first: this one, older than the engine, sees what the engine's own leave behind
    at_the_end: list[Callable[[], None]] = []
    weakref.finalize(main, lambda: [job() for job in at_the_end])
    engine = engine_for(options)
    rank = dist.get_rank()
    if action == "train":
        run(engine, int(options.get("steps", "10")), 0)
        report(engine, folder, rank)
    elif action == "save":
        run(engine, 3, 0)
        engine.save_checkpoint(str(folder / "ckpt"))
        run(engine, 3, 50)
        report(engine, folder, rank)
    elif action == "resume":
        engine = engine_for(options, seed=9)
        assert engine.load_checkpoint(str(folder / "ckpt"))[0] is not None
        run(engine, 3, 50)
        report(engine, folder, rank)
    elif action == "forever":
        for step in range(10**6):
            run(engine, 1, step)
            if options.get("save") and step > 0:
                engine.save_checkpoint(str(folder / "ckpt"))
            print(step, flush=True)
    elif action == "raise":
        run(engine, 1, 0)
        if rank == 1:
            raise RuntimeError("planted")
        time.sleep(2)
        run(engine, 1, 1)
    elif action == "leave":
        run(engine, int(options["steps"]), 0)
        at_the_end.append(lambda: report(engine, folder, rank))
        pending = [
            entry.unit.name for entry in engine.optimizer.pipeline._entries if entry.pending and not entry.updated
        ]
        (folder / f"pending{rank}.json").write_text(json.dumps(pending))
        dist.destroy_process_group()
        return
    dist.barrier()
    dist.destroy_process_group()  # else gloo threads that run while the interpreter ends may abort it


def report(engine, folder: Path, rank: int) -> None:  # type: ignore[no-untyped-def]
    engine.meft_flush()
    rows = [adapter.rows.master.clone() for adapter in engine._meft_methods[0].adapters]
    routers = [adapter.router.weight.detach().clone() for adapter in engine._meft_methods[0].adapters]
    norms = [p.detach().clone() for n, p in engine.module.named_parameters() if "norm" in n]
    digest = hashlib.sha256(b"".join(t.float().numpy().tobytes() for t in [*rows, *routers, *norms])).hexdigest()
    torch.save(
        {"rows": rows, "routers": routers, "norms": norms, "state": state_of(engine)}, folder / f"state{rank}.pt"
    )
    print(
        json.dumps({"digest": digest, "norm": engine.get_global_grad_norm(), "host": engine.meft_stats()["host_bytes"]})
    )


main()
