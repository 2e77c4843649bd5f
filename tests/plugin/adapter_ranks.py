# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_ranks.py do: a small training with an adapter."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.offload.overlap import make_late
from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of, tiny_llama

ROWS = 4  # per rank and micro-batch with two ranks


def engine_for(
    seed: int = 0,
    *,
    optimizer: str = "dense",
    selection: str = "host",
    compress: int = 0,
    precision: str = "fp32",
    gas: int = 1,
    mode: str = "exact",
    checkpointing: str = "",
    late: int = 0,
    late_s: float = 2e-3,
) -> Any:
    """`late` is a seed: this rank's lanes are late at random, by up to `late_s` seconds."""
    adapter: dict[str, Any] = {**ADAPTER, "optimizer": optimizer, "selection": selection}
    if compress:
        adapter["compress"] = {"dim": compress}
    config = ds_config(
        precision=precision,
        gas=gas,
        micro=2 * ROWS // int(os.environ["WORLD_SIZE"]),
        block={"schedule": {"mode": mode}, "sparse_adapter": adapter, "train": [r"layers\.0\..*norm"]},
    )
    # with a tiny eps AdamW turns rounding differences of near-zero gradients into whole steps
    config["optimizer"]["params"]["eps"] = 1e-4
    model = tiny_llama(seed)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    engine = make_engine(config, model)
    if late:
        make_late(engine.optimizer.pipeline, 100 * late + int(os.environ["RANK"]), late_s)
    return engine


def share(seed: int) -> dict[str, torch.Tensor]:
    """This rank's part of the same global batch of 8 sentences, whatever the number of ranks."""
    whole = batch(seed, rows=2 * ROWS)
    whole["attention_mask"][:] = 1
    whole["labels"] = whole["input_ids"].clone()
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    each = 2 * ROWS // world
    return {k: t[rank * each : (rank + 1) * each] for k, t in whole.items()}


def run(engine: Any, steps: int, first: int) -> None:
    for micro in range(steps * engine.gradient_accumulation_steps()):
        engine.backward(engine(**share(first + micro)).loss)
        engine.step()


def train(folder: Path, steps: int = 10, **settings: Any) -> dict[str, Any]:
    engine = engine_for(**settings)
    run(engine, steps, 0)
    return told(engine, folder)


def save(folder: Path, **settings: Any) -> dict[str, Any]:
    """Save after three steps, and train three more."""
    engine = engine_for(**settings)
    run(engine, 3, 0)
    engine.save_checkpoint(str(folder / "ckpt"))
    run(engine, 3, 50)
    return told(engine, folder)


def resume(folder: Path, **settings: Any) -> dict[str, Any]:
    """Load what `save` saved, into a model of other weights, and train three more steps."""
    engine = engine_for(seed=9, **settings)
    assert engine.load_checkpoint(str(folder / "ckpt"))[0] is not None
    run(engine, 3, 50)
    return told(engine, folder)


def forever(folder: Path, saves: bool = False) -> None:
    """Train, and save after each step but the first, until something ends this rank; log each step."""
    engine = engine_for()
    for step in range(10**6):
        run(engine, 1, step)
        if saves and step > 0:
            engine.save_checkpoint(str(folder / "ckpt"))
        print(step, flush=True)


def raises(folder: Path) -> None:
    """The second rank raises between two steps."""
    engine = engine_for()
    run(engine, 1, 0)
    if dist.get_rank() == 1:
        raise RuntimeError("planted")
    time.sleep(2)
    run(engine, 1, 1)


def told(engine: Any, folder: Path, rank: int | None = None) -> dict[str, Any]:
    """Digest, norm and host bytes; leaves this rank's state in the folder."""
    engine.meft_flush()
    rows = [adapter.rows.master.clone() for adapter in engine._meft_methods[0].adapters]
    routers = [adapter.router.weight.detach().clone() for adapter in engine._meft_methods[0].adapters]
    norms = [p.detach().clone() for n, p in engine.module.named_parameters() if "norm" in n]
    digest = hashlib.sha256(b"".join(t.float().numpy().tobytes() for t in [*rows, *routers, *norms])).hexdigest()
    state = {"rows": rows, "routers": routers, "norms": norms, "state": state_of(engine)}
    torch.save(state, folder / f"state{dist.get_rank() if rank is None else rank}.pt")
    return {"digest": digest, "norm": engine.get_global_grad_norm(), "host": engine.meft_stats()["host_bytes"]}


def leave(folder: Path) -> None:
    """Leave three steps' updates under way, and tell at the very end what became of them."""
    # exit handlers run newest first: this one, older than the engine, sees what the engine's own leave behind
    at_the_end: list[Callable[[], Any]] = []
    weakref.finalize(leave, lambda: [job() for job in at_the_end])
    engine = engine_for(late=1, late_s=0.5)
    run(engine, 3, 0)
    rank = dist.get_rank()
    at_the_end.append(lambda: print(json.dumps(told(engine, folder, rank))))
    entries = engine.optimizer.pipeline._entries
    pending = [entry.unit.name for entry in entries if entry.pending and not entry.updated]
    (folder / f"pending{rank}.json").write_text(json.dumps(pending))
    dist.destroy_process_group()


if __name__ == "__main__":  # in an interpreter of its own, to its end
    {"raises": raises, "leave": leave}[sys.argv[1]](Path(sys.argv[2]))
