# SPDX-License-Identifier: Apache-2.0
"""Trainings that the tests of an accelerator compare: the same case in series, overlapping, on a CPU, on several ranks.

As a program it runs cases and leaves what came out in a folder: `runs.py FOLDER own|twin CASE...`. On which device
is settled by DeepSpeed, so `DS_ACCELERATOR=cpu` makes it the reference for a device.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meft_ds.plugin.zero3 import consolidated
from tests.methods import parts
from tests.offload.overlap import run_inline
from tests.toy import ADAPTER, ds_config, make_engine, tiny_llama

WINDOWS = 6
ROWS = 8  # of a window's micro-batch, over all ranks


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method with its settings, and how it trains.

    Attributes:
        block: "meft_offload" without its schedule.
        zero: "zero_optimization".
        fitted: whether projectors are fitted, which magnifies differences of rounding.
        checkpointing: "none", "reentrant" or "nonreentrant".
    """

    block: dict[str, Any]
    mode: str = "exact"
    precision: str = "fp32"
    gas: int = 1
    checkpointing: str = "none"
    zero: dict[str, Any] = field(default_factory=lambda: {"stage": 2})
    fitted: bool = False

    @property
    def twin(self) -> str:
        """The mode whose results are this one's bit for bit: with lanes in line, unless it is "serial"."""
        return "serial" if self.mode == "exact" else self.mode


RANDOM = {"nonzeros": 2, "projectors": "random", "refit_interval": 0, "state_device": "cpu"}
LEARNED = {**RANDOM, "projectors": "learned", "refit_interval": 3, "refit_threshold": 0.0, "fit_steps": 2}
# scores that do not depend on how a window is cut into micro-batches and ranks; one case below has the default's
TILES = {"density": 0.3, "block_size": 8, "warmup_steps": 2, "score": "paper", "state_device": "cpu"}
ADAPTED: dict[str, Any] = {"sparse_adapter": ADAPTER}
STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 4000}

PLAIN = {
    "adapter": Case(block=ADAPTED),
    "subspace": Case(block={"subspace": RANDOM}),
    "tiles": Case(block={"sparse_matrix": TILES}),
}
"""Each method, offloaded. `CASES` has each in other surroundings too."""
SURROUNDINGS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "accumulation": {"gas": 2},
    "reentrant": {"checkpointing": "reentrant", "gas": 2},
    "nonreentrant": {"checkpointing": "nonreentrant"},
    "bf16": {"precision": "bf16"},
    "stage 3": {"zero": STAGE_3},
    "stage 3, offload_param": {"zero": {**STAGE_3, "offload_param": {"device": "cpu", "pin_memory": True}}},
}
CASES = {
    **PLAIN,
    "adapter, keys chosen on the device": Case(block={"sparse_adapter": {**ADAPTER, "selection": "device"}}),
    "adapter, spilling": Case(block={"sparse_adapter": {**ADAPTER, "cache_rows": 12}}),
    "adapter, compressed": Case(block={"sparse_adapter": {**ADAPTER, "compress": {"dim": 0.5, "nonzeros": 2}}}),
    "adapter, lazy": Case(block={"sparse_adapter": {**ADAPTER, "optimizer": "lazy"}}),
    "dense": Case(block={**ADAPTED, "train": ["embed", "norm", "lm_head"]}),
    "subspace, learned": Case(block={"subspace": LEARNED}, fitted=True),
    "subspace, state on the accelerator": Case(block={"subspace": {**RANDOM, "state_device": "accelerator"}}),
    "tiles, state on the accelerator": Case(
        block={"sparse_matrix": {**TILES, "score": "abs_mean", "state_device": "accelerator"}}
    ),
    "adapter and tiles": Case(block={**ADAPTED, "sparse_matrix": TILES}),
    **{
        f"{name}, {how}": replace(case, **change)
        for name, case in PLAIN.items()
        for how, change in SURROUNDINGS.items()
    },
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out, on the host: losses, weights after `meft_flush` by name, and what each unit keeps."""

    losses: list[float]
    weights: dict[str, Tensor]
    state: dict[str, Tensor]


@contextlib.contextmanager
def engine_of(case: Case, mode: str) -> Iterator[Any]:
    """An engine of the case in training mode, closed afterwards."""
    rows = ROWS // int(os.environ.get("WORLD_SIZE", "1"))
    block = {**case.block, "schedule": {"mode": mode}}
    config = ds_config(precision=case.precision, block=block, gas=case.gas, micro=rows, zero_optimization=case.zero)
    # DeepSpeed's timer waits for the whole device in each step, which hides that somebody else does not
    config["timers"] = {"throughput": {"enabled": False}}
    # a tiny one turns rounding differences of near-zero gradients into whole steps
    config["optimizer"]["params"]["eps"] = 1e-3
    model = tiny_llama()
    if case.checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    engine = make_engine(config, model)
    try:
        engine.train()
        yield engine
    finally:
        engine.destroy()


def train(engine: Any, windows: Iterable[int]) -> list[float]:
    """Train on this rank's part of each window; return the losses. The last updates may still be under way."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    losses = []
    for window in windows:
        for micro in range(engine.gradient_accumulation_steps()):
            share = parts(100 * window + micro, world)[rank]
            loss = engine(**{key: t.to(engine.device) for key, t in share.items()}).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss)
    # read at the end: a read in between would make the host wait for the device, and hide a race
    return [loss.item() for loss in losses]


def result_of(case: Case, mode: str, *, inline: bool = False, prepare: Callable[[Any], None] | None = None) -> Result:
    """Train a case for `WINDOWS` windows.

    Args:
        mode: of the schedule.
        inline: run the stages in order on the thread that trains.
        prepare: called with the engine before it trains.
    """
    with engine_of(case, mode) as engine:
        if inline and mode != "serial":
            run_inline(engine.optimizer.pipeline)
        if prepare is not None:
            prepare(engine)
        losses = train(engine, range(WINDOWS))
        engine.meft_flush()
        stage_3 = case.zero["stage"] == 3
        weights = consolidated(engine.module) or {} if stage_3 else engine.module.state_dict()
        units = engine.optimizer.pipeline.units
        state = {f"{unit.name}/{key}": t for unit in units for key, t in unit.state_tensors().items()}
        on_host = [{name: t.detach().cpu().clone() for name, t in tensors.items()} for tensors in (weights, state)]
        return Result(losses=losses, weights=on_host[0], state=on_host[1])


def differing(one: Result, other: Result) -> list[str]:
    """Names of what is not the same bits in two results."""
    names = [] if one.losses == other.losses else ["losses"]
    for mine, its in ((one.weights, other.weights), (one.state, other.state)):
        assert mine.keys() == its.keys()
        names += [name for name, t in mine.items() if not torch.equal(t, its[name])]
    return names


def assert_close(case: Case, one: Result, other: Result, *, losses: bool = True) -> None:
    """The same losses, if they are to be compared, and weights, but for the order in which sums were taken."""
    near: dict[str, float] = {"atol": 2e-3, "rtol": 1e-2} if case.fitted else {"atol": 1e-4, "rtol": 1e-3}
    if losses:
        torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), **near)
    assert one.weights.keys() == other.weights.keys()
    for name, t in one.weights.items():
        torch.testing.assert_close(t, other.weights[name], **near, msg=f"{name} differs")


def file_of(folder: Path, name: str, rank: int = 0) -> Path:
    """Where the program leaves the result of a case."""
    return folder / f"{name}.{rank}.pt"


def load(folder: Path, name: str, rank: int = 0) -> Result:
    """What the program left."""
    return Result(**torch.load(file_of(folder, name, rank)))


def main() -> None:
    """Run cases, overlapping in their own mode ("own") or in order ("twin")."""
    folder, which, *names = sys.argv[1:]
    for name in names:
        case = CASES[name]
        result = result_of(case, case.mode) if which == "own" else result_of(case, case.twin, inline=True)
        torch.save(vars(result), file_of(Path(folder), name, int(os.environ["RANK"])))


if __name__ == "__main__":
    main()
