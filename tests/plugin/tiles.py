# SPDX-License-Identifier: Apache-2.0
"""What the tests of sparse matrix tuning in an engine share: blocks, configs, states."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from meft_ds.sparse_matrix.method import SparseMatrixMethod
from meft_ds.sparse_matrix.unit import TilesUnit
from tests.toy import batch, ds_config

SCORED = 2
EVERYTHING = {"density": 1.0, "score": "magnitude"}


def block(*, others: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """11 tiles of 8 x 8, after two windows of scoring."""
    base = {} if "choice_file" in settings else {"density": 0.1, "block_size": 8, "warmup_steps": SCORED}
    return {"sparse_matrix": {**base, **settings}, **(others or {})}


def config(
    precision: str = "fp32",
    *,
    others: dict[str, Any] | None = None,
    gas: int = 1,
    eps: float = 1e-8,
    scale_power: int = 8,
    **settings: Any,
) -> Any:
    made = ds_config(precision=precision, gas=gas, block=block(others=others, **settings))
    made["optimizer"]["params"]["eps"] = eps
    if precision == "fp16":
        made["fp16"] |= {"initial_scale_power": scale_power, "hysteresis": 1}
    return made


def method_of(engine: Any) -> SparseMatrixMethod:
    return next(method for method in engine._meft_methods if isinstance(method, SparseMatrixMethod))


def tiles_units(engine: Any) -> list[TilesUnit]:
    return [unit for unit in engine.optimizer.pipeline.units if isinstance(unit, TilesUnit)]


def everything(engine: Any) -> dict[str, Tensor]:
    """All state that training changes, and all weights and buffers, by name."""
    engine.meft_flush()
    model, units = engine.module, engine.optimizer.pipeline.units
    state = {f"model/{name}": t for name, t in [*model.named_parameters(), *model.named_buffers()]}
    state |= {f"{unit.name}/{key}": t for unit in units for key, t in unit.state_tensors().items()}
    state["steps"] = torch.tensor(list(engine.optimizer.pipeline.state()["steps"].values()))
    return {name: t.detach().clone() for name, t in state.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not one[name].equal(other[name])]


def digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].float().numpy().tobytes())
    return found.hexdigest()


def steps(engine: Any, seeds: Any, rows: int = 4) -> list[float]:
    losses = []
    for seed in seeds:
        for micro in range(engine.gradient_accumulation_steps()):
            loss = engine(**batch(100 * seed + micro, rows)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses
