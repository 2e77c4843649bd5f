# SPDX-License-Identifier: Apache-2.0
"""What the two ranks of test_sparse_matrix_ranks.py do: several short trainings."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.offload.overlap import make_late
from tests.plugin.subspace_ranks import Branches
from tests.plugin.tiles import SCORED, block, digest, method_of
from tests.toy import batch, ds_config, make_engine, tiny_llama

KINDS = ["abs_mean", "l2", "mean_abs", "paper", "random", "magnitude"]
MICRO, STEPS = 4, 4


def engine_for(
    *,
    rank: int = 0,
    world: int = 1,
    mode: str = "exact",
    model: nn.Module | None = None,
    checkpointing: str = "none",
    precision: str = "fp32",
    stage: int = 2,
    gas: int | None = None,
    **settings: Any,
) -> Any:
    """One rank takes the two ranks' micro-batches one after the other."""
    made = ds_config(
        block={**block(**settings), "schedule": {"mode": mode}},
        micro=MICRO,
        gas=2 // world if gas is None else gas,
        precision=precision,
    )
    made["zero_optimization"]["stage"] = stage
    # with a tiny eps AdamW turns rounding differences of near-zero gradients into whole steps
    made["optimizer"]["params"]["eps"] = 1e-3
    if precision == "fp16":
        made["fp16"] |= {"initial_scale_power": 8, "hysteresis": 1}
    model = tiny_llama() if model is None else model
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    engine = make_engine(made, model)
    if mode != "serial":
        make_late(engine.optimizer.pipeline, 10 + rank)
    return engine


def train(engine: Any, rank: int = 0, world: int = 1, windows: Any = range(SCORED + STEPS)) -> list[float]:
    """The mean loss of each window's micro-batches, of all ranks."""
    losses = []
    per_rank = engine.gradient_accumulation_steps()
    for step in windows:
        found = []
        for micro in range(per_rank):
            inputs = batch(10 * step + rank * per_rank + micro, MICRO)
            loss = engine(**inputs).loss
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        mean = torch.tensor(sum(found) / len(found), dtype=torch.float64)
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world)
    engine.meft_flush()
    return losses


def common(engine: Any) -> dict[str, Tensor]:
    """What must be the same bits on every rank."""
    found = {name: p.detach() for name, p in engine.module.named_parameters()}
    for unit in engine.optimizer.pipeline.units:
        if unit.wire == "blocks":
            found[f"{unit.name}/values"] = unit.values()
    return found


def own(engine: Any) -> dict[str, Tensor]:
    units = engine.optimizer.pipeline.units
    return {f"{unit.name}/{key}": t for unit in units for key, t in unit.state_tensors().items()}


def told(engine: Any) -> dict[str, Any]:
    engine.meft_flush()
    choice = method_of(engine).choice
    found = {"digest": digest(common(engine)), "choice": None if choice is None else choice.digest()}
    if choice is not None:
        found["scores"] = [tile.score for tile in choice.tiles]
    return found


def refused(**settings: Any) -> str:
    try:
        engine_for(**settings)
    except ValueError as fault:
        return str(fault)
    return ""


def trainings(folder: Path) -> dict[str, Any]:
    """What this rank found, by training. One rank has left its checkpoints in the folder."""
    rank = int(os.environ["RANK"])
    here: dict[str, Any] = {"rank": rank, "world": 2}
    found: dict[str, Any] = {}

    for kind in KINDS:
        engine = engine_for(**here, score=kind)
        found[kind] = {"losses": train(engine, rank, 2), **told(engine)}
        units = engine.optimizer.pipeline.units
        found[kind]["units"] = [[unit.numel, unit.state_range()[1] - unit.state_range()[0]] for unit in units]
    torch.save(common(engine), folder / f"magnitude{rank}.pt")
    again = engine_for(**here, score="abs_mean")
    found["again"] = {"losses": train(again, rank, 2), **told(again)}

    for checkpointing in ("none", "reentrant", "nonreentrant"):
        for mode in ("serial", "exact") if checkpointing == "none" else ("exact",):
            engine = engine_for(**here, gas=2, precision="bf16", checkpointing=checkpointing, mode=mode)
            train(engine, rank, 2)
            found[f"{mode} {checkpointing}"] = {**told(engine), "own": digest(own(engine))}
    for where in ("cpu", "accelerator"):
        # float32 on the bus, as it is where nothing uses the bus
        engine = engine_for(**here, gas=2, precision="bf16", state_device=where, others={"grad_dtype": "fp32"})
        train(engine, rank, 2)
        found[f"state {where}"] = {**told(engine), "own": digest(own(engine))}
    engine = engine_for(**here, gas=2, precision="bf16", stage=0)
    train(engine, rank, 2)
    found["stage 0"] = {**told(engine), "own": digest(own(engine))}

    # an overflow on one rank only: while scoring, then in training
    engine = engine_for(**here, precision="fp16")
    windows: list[Any] = []
    for step, bad in enumerate((False, True, False, False, True, False)):
        before = told(engine)
        loss = engine(**batch(step, MICRO)).loss
        engine.backward(loss * (math.inf if bad and rank == 1 else 1.0))
        engine.step()
        scored = engine.meft_stats()["sparse_matrix"]["scored_steps"]
        windows.append([scored, engine.optimizer.cur_scale, told(engine) == before])
    found["overflow"] = {"windows": windows, **told(engine)}

    # resume: what one rank saved, and what one rank will load
    for at in (1, SCORED + 1):
        engine = engine_for(**here, score="l2")
        engine.load_checkpoint(str(folder / "one"), tag=f"at{at}")
        engine.micro_steps = at
        found[f"loaded {at}"] = {"losses": train(engine, rank, 2, range(at, SCORED + STEPS)), **told(engine)}
        engine = engine_for(**here, score="l2")
        train(engine, rank, 2, range(at))
        engine.save_checkpoint(str(folder / "two"), tag=f"at{at}")
        found[f"saved {at}"] = {"losses": train(engine, rank, 2, range(at, SCORED + STEPS)), **told(engine)}
        again = engine_for(**here, score="l2")
        again.load_checkpoint(str(folder / "two"), tag=f"at{at}")
        found[f"again {at}"] = {"losses": train(again, rank, 2, range(at, SCORED + STEPS)), **told(again)}

    # faults of files, which the first rank alone sees
    found["refused"] = [
        refused(**here, choice_file=str(folder / "nowhere.json")),
        refused(**here, score="random", choice_out=str(folder / "file" / "tiles.json")),
        refused(**here, density=1e-3),
    ]

    # layers that one rank reaches and the other does not, now and then
    for mode in ("serial", "exact"):
        engine = engine_for(**here, mode=mode, model=Branches(), gas=1, density=0.3, budget="per_module")
        for step in range(7):
            g = torch.Generator().manual_seed(10 * step + rank)
            used = [step % 3 != 2 and rank == 0, (step + rank) % 2 == 0, rank == 1]
            engine.backward(engine(torch.randn(4, 5, 16, generator=g), used))
            engine.step()
        found[f"apart {mode}"] = told(engine)
    return found
