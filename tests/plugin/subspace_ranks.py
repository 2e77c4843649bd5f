# SPDX-License-Identifier: Apache-2.0
"""What the two ranks of test_subspace_ranks.py do: several short trainings."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.offload.overlap import make_late
from tests.toy import batch, ds_config, make_engine, state_of, tiny_llama

ROWS, WINDOWS, INTERVAL = 8, 9, 4
CHECKED = r".*\.(q_proj|v_proj|up_proj)"


def engine_for(
    mode: str = "exact",
    *,
    rank: int = 0,
    world: int = 1,
    model: nn.Module | None = None,
    checkpointing: str = "none",
    gas: int = 1,
    precision: str = "fp32",
    **settings: Any,
) -> Any:
    learned = {"projectors": "learned", "fit_steps": 2, "refit_interval": INTERVAL, "refit_threshold": 0.0}
    settings = {"nonzeros": 2, **learned, **settings}
    block = {"schedule": {"mode": mode}, "subspace": settings}
    config = ds_config(block=block, micro=ROWS // world, gas=gas, precision=precision)
    # with a tiny eps AdamW turns rounding differences of near-zero gradients into whole steps
    config["optimizer"]["params"]["eps"] = 1e-3
    model = tiny_llama() if model is None else model
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    engine = make_engine(config, model)
    if mode != "serial":
        make_late(engine.optimizer.pipeline, 10 + rank)
    return engine


def share(seed: int, rank: int, world: int) -> dict[str, Tensor]:
    """This rank's part of a global batch. A check fits to the first half of each rank's tokens, so one rank gets the
    rows in the order in which it sees the same halves as two ranks do."""
    whole = batch(seed, rows=ROWS)
    whole["attention_mask"][:] = 1
    whole["labels"] = whole["input_ids"].clone()
    quarter = ROWS // 4
    order = [0, 2, 1, 3] if world == 1 else [0, 1, 2, 3]
    rows = [t for q in order for t in range(q * quarter, (q + 1) * quarter)]
    mine = rows[rank * ROWS // world : (rank + 1) * ROWS // world]
    return {k: t[mine] for k, t in whole.items()}


def train(engine: Any, rank: int = 0, world: int = 1, windows: int = WINDOWS) -> list[float]:
    norms = []
    gas = engine.gradient_accumulation_steps()
    for step in range(windows):
        for micro in range(gas):
            engine.backward(engine(**share(gas * step + micro, rank, world)).loss)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    engine.meft_flush()
    return norms


def common(engine: Any) -> dict[str, Tensor]:
    """What must be the same bits on every rank."""
    found = {name: p.detach() for name, p in engine.module.named_parameters()}
    for unit in engine.optimizer.pipeline.units:
        found |= {f"{unit.name}/{key}": t for key, t in unit.shared_tensors().items()}
    return found


def digest(tensors: dict[str, Tensor]) -> str:
    parts = [t.contiguous().view(torch.uint8).numpy().tobytes() for _, t in sorted(tensors.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


class Branches(nn.Module):
    """Layers with a linear layer each that only some ranks use in a step, as an expert without tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]) for _ in range(3)])

    def forward(self, x: Tensor, used: list[bool]) -> Tensor:
        for (always, sometimes), use in zip(self.layers, used, strict=True):
            x = x + torch.tanh(always(x))
            if use:
                x = x + torch.tanh(sometimes(x))
        return x.square().mean()


def train_apart(mode: str, side: str, rank: int) -> Any:
    engine = engine_for(mode, rank=rank, world=2, model=Branches(), refit_interval=2, gradient_side=side)
    for step in range(7):
        g = torch.Generator().manual_seed(10 * step + rank)
        used = [step % 3 != 2 and rank == 0, (step + rank) % 2 == 0, rank == 1]
        engine.backward(engine(torch.randn(4, 5, 16, generator=g), used))
        engine.step()
    engine.meft_flush()
    return engine


def train_late(mode: str, side: str, rank: int) -> Any:
    """In the first window no rank uses the layers that some use later, a different rank first for each; one is never
    used."""
    engine = engine_for(mode, rank=rank, world=2, model=Branches(), refit_interval=0, gradient_side=side)
    for step in range(5):
        g = torch.Generator().manual_seed(10 * step + rank)
        used = [step == 2 and rank == 0, step >= 3 and rank == 1, False]
        engine.backward(engine(torch.randn(4, 5, 16, generator=g), used))
        engine.step()
    engine.meft_flush()
    return engine


def trainings(folder: Path) -> dict[str, Any]:
    """What this rank found, by training; leaves its weights after the first one in the folder."""
    rank = int(os.environ["RANK"])
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    found: dict[str, Any] = {}

    engine = engine_for(rank=rank, world=2)
    found["learned"] = {"norms": train(engine, rank, 2), "digest": digest(common(engine))}
    stats = engine.meft_stats()
    found["learned"] |= {"bytes": stats["bytes"]["subspace"], "bias": stats["subspace"]["bias"]}
    found["learned"]["checks"] = stats["subspace"]["checks"]
    torch.save(common(engine), folder / f"learned{rank}.pt")
    found["again"] = {"norms": train(repeat := engine_for(rank=rank, world=2), rank, 2)}
    found["again"]["digest"] = digest(common(repeat))

    for name, checkpointing in (("none", "none"), ("reentrant", "reentrant"), ("nonreentrant", "nonreentrant")):
        for mode in ("serial", "exact"):
            options = dict(gas=2, precision="bf16", target_modules=CHECKED, checkpointing=checkpointing)
            print(mode, name, file=sys.stderr, flush=True)
            engine = engine_for(mode, rank=rank, world=2, **options)
            norms = train(engine, rank, 2, windows=13 if name == "none" else 6)
            state = digest(state_of(engine))
            found[f"{mode} {name}"] = {"norms": norms, "digest": digest(common(engine)), "state": state}

    engine = engine_for("serial", rank=rank, world=2)
    found["reduced"] = []
    for step in range(INTERVAL + 1):
        sizes.clear()
        engine.backward(engine(**share(step, rank, 2)).loss)
        engine.step()
        found["reduced"].append(sorted(set(sizes)))
    found["units"] = {u.name: [u.wire, u.numel] for u in engine.optimizer.pipeline.units}

    for mode, side in (("exact", "activation"), ("serial", "activation"), ("exact", "weight")):
        engine = train_apart(mode, side, rank)
        bias = engine.meft_stats()["subspace"]["bias"]
        found[f"apart {mode} {side}"] = {"digest": digest(common(engine)), "bias": bias}
        engine = train_late(mode, side, rank)
        bias = engine.meft_stats()["subspace"]["bias"]
        found[f"late {mode} {side}"] = {"digest": digest(common(engine)), "bias": bias}
    return found
