# SPDX-License-Identifier: Apache-2.0
"""The table of methods over which the contract suite (tests/contract/) runs.

Each claim of the suite holds for each entry. A new method gets all of them by one line in `METHODS`. An entry of
`VARIANTS` is a method with other settings, whose claims run with `-m slow`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import fourth_method
from tests.offload.overlap import make_late
from tests.toy import ADAPTER, batch, ds_config, make_engine, tiny_llama

GAS = 2


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method, and what a test needs to see it train.

    `block` is the "meft_offload" block. The first `untrained` windows update nothing. A run is saved after each of the
    windows `saves`, and resumed. Where sums are taken in another order (micro-batches, ranks) results agree within
    `atol` and `rtol`; `in_parts` is the block for the claim about micro-batches, where another one's results depend on
    how a window is cut. The mean loss of two windows falls by `falls` in twelve windows over the same four batches.
    `installed` surrounds the making of an engine, for a method that only the tests have.
    """

    name: str
    block: dict[str, Any]
    in_parts: dict[str, Any] | None = None
    untrained: int = 0
    saves: tuple[int, ...] = (3,)
    atol: float = 2e-5
    rtol: float = 1e-3
    falls: float = 0.2
    model: Callable[[int], nn.Module] = tiny_llama
    installed: Callable[[], AbstractContextManager[Any]] = nullcontext


FIT = {"nonzeros": 2, "projectors": "learned", "fit_steps": 2, "refit_interval": 3, "refit_threshold": 0.0}
FEW = r".*\.(q_proj|v_proj|up_proj)"  # a fit costs, and all matrices are fitted alike
SUBSPACE = {**FIT, "target_modules": FEW}
RANDOM = {**SUBSPACE, "projectors": "random", "refit_interval": 0}  # a fit sees one micro-batch
# scores of the whole window's gradient, which do not depend on how it is cut into micro-batches
TILES = {"density": 0.3, "block_size": 8, "warmup_steps": 2, "score": "paper"}
SCORED = {"untrained": 2, "saves": (1, 2, 4)}  # while scoring, right after the choice, in training
FITTED = {"saves": (3, 4), "atol": 2e-3, "rtol": 1e-2}  # right before and right after a check of projectors

METHODS = [
    Entry(name="adapter", block={"sparse_adapter": ADAPTER, "train": [r"layers\.0\..*norm"]}),
    Entry(name="adapter+compress", block={"sparse_adapter": {**ADAPTER, "compress": {"dim": 0.5, "nonzeros": 2}}}),
    Entry(name="subspace", block={"subspace": SUBSPACE}, in_parts={"subspace": RANDOM}, falls=1.0, **FITTED),
    Entry(name="tiles", block={"sparse_matrix": TILES}, falls=1.0, **SCORED),
    Entry(name="adapter+tiles", block={"sparse_adapter": ADAPTER, "sparse_matrix": TILES}, falls=1.0, **SCORED),
    Entry(
        name="adapter+subspace",
        block={"sparse_adapter": ADAPTER, "subspace": SUBSPACE},
        in_parts={"sparse_adapter": ADAPTER, "subspace": RANDOM},
        falls=1.0,
        **FITTED,
    ),
    Entry(name="fourth method", block={"random_mask": {"fraction": 0.3}}, falls=1.0, installed=fourth_method.installed),
]

VARIANTS = [
    Entry(name="lazy adapter", block={"sparse_adapter": {**ADAPTER, "optimizer": "lazy", "selection": "device"}}),
    Entry(
        name="lazy adapter+compress",
        block={"sparse_adapter": {**ADAPTER, "optimizer": "lazy", "compress": {"dim": 0.5, "nonzeros": 2}}},
    ),
    Entry(
        name="subspace by weights",
        block={"subspace": {**SUBSPACE, "gradient_side": "weight", "rounding": "residual"}},
        in_parts={"subspace": {**RANDOM, "gradient_side": "weight"}},
        falls=1.0,
        **FITTED,
    ),
    Entry(
        name="random subspace",
        block={"subspace": {**SUBSPACE, "projectors": "random", "rounding": "residual"}},
        in_parts={"subspace": {**RANDOM, "rounding": "residual"}},
        falls=1.0,
        **FITTED,
    ),
    Entry(name="random tiles", block={"sparse_matrix": {**TILES, "score": "random"}}, falls=1.0),
]

slow = pytest.mark.slow
every_method = pytest.mark.parametrize(
    "entry",
    [*(pytest.param(e, id=e.name) for e in METHODS), *(pytest.param(e, id=e.name, marks=slow) for e in VARIANTS)],
)
"""Parametrizes a claim by the table."""


def engine_of(
    entry: Entry,
    *,
    precision: str = "fp32",
    seed: int = 0,
    mode: str = "exact",
    late: int | None = None,
    checkpointing: str = "none",
    scale_power: int = 8,
    scale_window: int = 1000,
    model: nn.Module | None = None,
    **extra: Any,
) -> Any:
    """An engine of the entry's method in training mode.

    Args:
        seed: of the model's weights.
        late: seed of how late the lanes are, at random; None: they are not.
        checkpointing: "none", "reentrant" or "nonreentrant".
        scale_power, scale_window: in fp16 the first loss scale is 2**scale_power; it doubles after so many good steps.
        model: instead of a new one.
        extra: for `ds_config`.
    """
    block = {"schedule": {"mode": mode}, **entry.block}
    config = ds_config(precision=precision, block=block, **{"gas": GAS, **extra})
    # a tiny one turns rounding differences of near-zero gradients into whole steps
    config["optimizer"]["params"]["eps"] = 1e-3
    if precision == "fp16":
        config["fp16"] |= {"initial_scale_power": scale_power, "hysteresis": 1, "loss_scale_window": scale_window}
    model = entry.model(seed) if model is None else model
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    with entry.installed():
        engine = make_engine(config, model)
    engine.train()
    if late is not None:
        make_late(engine.optimizer.pipeline, late)
    return engine


def steps(engine: Any, seeds: Any) -> list[float]:
    """Train one window per seed; returns the loss of every micro-batch. Updates may still be under way."""
    losses = []
    for seed in seeds:
        for micro in range(engine.gradient_accumulation_steps()):
            loss = engine(**{key: t.to(engine.device) for key, t in batch(100 * seed + micro).items()}).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def everything(engine: Any) -> dict[str, Tensor]:
    """Copies of all that training changes, by name: weights, buffers, state of units and methods, and counters."""
    engine.meft_flush()
    pipeline, state = engine.optimizer.pipeline, {}
    state |= {f"model/{name}": t for name, t in [*engine.module.named_parameters(), *engine.module.named_buffers()]}
    told: dict[str, Any] = {"steps": pipeline.state()["steps"]}
    for unit in pipeline.units:
        state |= {f"{unit.name}/{key}": t for key, t in unit.state_tensors().items()}
        state |= {f"{unit.name}/shared/{key}": t for key, t in unit.shared_tensors().items()}
        told[unit.name] = unit.scalars()
    for method in engine._meft.methods:
        told[f"method {method.name}"], tensors = method.state(engine._meft.run)
        state |= {f"{method.name}/{key}": t for key, t in tensors.items()}
    state["told"] = torch.tensor(list(json.dumps(told, sort_keys=True).encode()))
    return {name: t.detach().clone() for name, t in state.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names under which two states are not the same bits, or that only one of them has."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if name not in one or name not in other or not torch.equal(one[name], other[name])]


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], entry: Entry) -> None:
    """The same state but for the order in which sums were taken."""
    assert one.keys() == other.keys()
    for name, t in one.items():
        if t.dtype.is_floating_point:
            torch.testing.assert_close(other[name], t, atol=entry.atol, rtol=entry.rtol, msg=name)


def parts(seed: int, count: int) -> list[dict[str, Tensor]]:
    """A batch of 8 rows in `count` parts; equally many tokens in each, so that the mean of means is the mean."""
    full = batch(seed, rows=8)
    full["attention_mask"][:] = 1
    full["labels"] = full["input_ids"].clone()
    each = 8 // count
    return [{key: t[k * each : (k + 1) * each] for key, t in full.items()} for k in range(count)]


def whole(seed: int, count: int) -> dict[str, Tensor]:
    """The batch of `parts` in one: first halves, then second halves, because projectors are fitted to first halves."""
    cut = parts(seed, count)
    halves = [{key: t.chunk(2)[side] for key, t in part.items()} for side in (0, 1) for part in cut]
    return {key: torch.cat([half[key] for half in halves]) for key in cut[0]}
