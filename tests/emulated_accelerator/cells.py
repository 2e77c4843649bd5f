# SPDX-License-Identifier: Apache-2.0
"""What the contract suite trains: cells of one method, one setting and one course of events, on either device.

`train` runs in a rank of either forge, so a cell's run on the CPU and the one on the emulated device are one function.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import meft_ds
from meft_ds import ops
from meft_ds.plugin.zero3 import consolidated
from tests.methods import METHODS, VARIANTS, Entry, engine_of, everything
from tests.toy import batch


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training.

    Attributes:
        entry: the method and its block.
        options: for `engine_of`: precision, mode, gas, checkpointing, zero_optimization.
        events: what happens in the middle: "overflow", "evaluation", "resume", or after each step: "side stream", on
            which the program copies the weights. And "export" at the end.
        world: ranks.
        windows: that train, after those that only score.
    """

    entry: Entry
    options: dict[str, Any] = field(default_factory=dict)
    events: tuple[str, ...] = ()
    world: int = 1
    windows: int = 4


def zero3(**settings: Any) -> dict[str, Any]:
    """The ds_config's part for ZeRO-3 that partitions and gathers every parameter, however small."""
    return {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **settings}}


QUIET = {"timers": {"throughput": {"enabled": False}}}
"""DeepSpeed's timer waits for the whole device in each step, which hides that somebody else does not."""
OFFLOAD = zero3(offload_param={"device": "cpu", "pin_memory": True}, stage3_prefetch_bucket_size=4000)
_OF = {entry.name: entry for entry in [*METHODS, *VARIANTS]}
_MAIN = ("adapter", "subspace", "tiles", "fourth method")
_PARTITIONED = ("adapter", "subspace", "tiles")


def _with(name: str, **settings: Any) -> Entry:
    """An entry of the table with other settings of its method."""
    entry = _OF[name]
    (method,) = [key for key in entry.block if key != "train"]
    return replace(entry, block={**entry.block, method: {**entry.block[method], **settings}})


def _cells() -> dict[str, Cell]:
    found = {name: Cell(entry=entry) for name, entry in _OF.items()}
    found |= {
        "subspace, state on the device": Cell(entry=_with("subspace", state_device="accelerator")),
        "subspace, state on the host": Cell(entry=_with("subspace", state_device="cpu")),
        "tiles, state on the device": Cell(entry=_with("tiles", state_device="accelerator")),
        "tiles, state on the host": Cell(entry=_with("tiles", state_device="cpu")),
        "adapter, selection on the device": Cell(entry=_with("adapter", selection="device")),
        "adapter, spill": Cell(entry=_with("adapter", cache_rows=12)),
        "adapter, spill, selection on the device": Cell(entry=_with("adapter", cache_rows=12, selection="device")),
        "adapter, whole batch": Cell(entry=_with("adapter", scope="batch")),
    }
    for name in _MAIN:
        # a fit turns what rounding or the order of sums changes into other projectors
        unfitted = replace(_OF[name], block=_OF[name].in_parts or _OF[name].block)
        found |= {
            f"{name}, {precision}": Cell(entry=unfitted, options={"precision": precision})
            for precision in ("bf16", "fp16")
        }
        # the mode that the measured times choose makes no difference where nothing is clipped
        found[f"{name}, auto"] = Cell(entry=unfitted, options={"mode": "auto", "gradient_clipping": 0.0}, windows=5)
        found[f"{name}, eager"] = Cell(entry=_OF[name], options={"mode": "eager"})
        found |= {
            f"{name}, {kind} checkpointing": Cell(entry=_OF[name], options={"checkpointing": kind})
            for kind in ("reentrant", "nonreentrant")
        }
        found[f"{name}, events"] = Cell(entry=_OF[name], events=("evaluation", "resume", "export"))
        found[f"{name}, overflow"] = Cell(entry=_OF[name], options={"precision": "fp16"}, events=("overflow",))
        found[f"{name}, side stream"] = Cell(entry=_OF[name], events=("side stream",))
        found[f"{name}, two ranks"] = Cell(entry=unfitted, world=2)
    for name in _PARTITIONED:
        found[f"{name}, ZeRO-3"] = Cell(entry=_OF[name], options=zero3())
        found[f"{name}, ZeRO-3, offload_param"] = Cell(entry=_OF[name], options=OFFLOAD)
        found[f"{name}, ZeRO-3, two ranks"] = Cell(entry=_OF[name], options=zero3(), world=2)
    return found


CELLS = _cells()


def train(folder: Path, cell: str, weather: str = "calm") -> dict[str, Any]:
    """Train a cell; return its losses and norms, and leave this rank's final state in the folder."""
    chosen = CELLS[cell]
    rank = int(os.environ["RANK"])
    with under(weather, seed=rank):
        engine = engine_of(chosen.entry, **chosen.options, **QUIET)
        engine, losses, norms, seen = _windows(engine, chosen, folder)
        state = final(engine) | seen
        if "export" in chosen.events:
            state |= _exported(engine, folder / "export")
        torch.save(state, folder / f"state{rank}.pt")
        return {"losses": losses, "norms": norms, "device": engine.device.type, "kernels": ops.backend()}


def _windows(engine: Any, cell: Cell, folder: Path) -> tuple[Any, list[float], list[float], dict[str, Tensor]]:
    losses, norms, seen = [], [], {}
    rank, half = int(os.environ["RANK"]), cell.entry.untrained + cell.windows // 2
    for step in range(cell.entry.untrained + cell.windows):
        if step == half and "overflow" in cell.events:
            _window(engine, 1000 + step, factor=math.inf)
            assert engine.optimizer.overflow
        if step == half and "evaluation" in cell.events:
            losses.append(_evaluated(engine))
        if step == half and "resume" in cell.events:
            engine.save_checkpoint(str(folder / "saved"), tag="t")
            engine = engine_of(cell.entry, seed=9, **cell.options, **QUIET)
            assert engine.load_checkpoint(str(folder / "saved"), tag="t")[0] is not None
        losses += _window(engine, 10 * step + 100 * rank)
        norms.append(float(engine.get_global_grad_norm() or 0.0))
        if "side stream" in cell.events:
            seen |= {f"seen/{step}/{name}": t for name, t in _copied(engine).items()}
    return engine, losses, norms, {name: t.cpu() for name, t in seen.items()}


def _copied(engine: Any) -> dict[str, Tensor]:
    """What a program copies on a stream of its own, after all that the current one was given; the latter is late."""
    runtime = torch.get_device_module(engine.device)
    if engine.device.type == "cpu":
        return {name: p.detach().clone() for name, p in _trained(engine)}
    side = runtime.Stream()
    side.wait_stream(runtime.current_stream())
    _delay_what_comes()
    with runtime.stream(side):
        copies = {name: p.detach().clone() for name, p in _trained(engine)}
    runtime.current_stream().wait_stream(side)  # before the weights change again
    return copies


def _trained(engine: Any) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _delay_what_comes() -> None:
    from tests.emulated_accelerator import device

    device.backend.enqueue(torch.accelerator.current_stream().stream_id, lambda: time.sleep(0.1), "sleep")


def _window(engine: Any, seed: int, *, factor: float = 1.0) -> list[float]:
    losses = []
    for micro in range(engine.gradient_accumulation_steps()):
        loss = engine(**{key: t.to(engine.device) for key, t in batch(seed + micro).items()}).loss
        engine.backward(loss * factor)
        engine.step()
        losses.append(loss.item())
    return losses


def _evaluated(engine: Any) -> float:
    engine.eval()
    with torch.no_grad():
        found = engine(**{key: t.to(engine.device) for key, t in batch(5, rows=7).items()}).loss.item()
    engine.train()
    return found


def final(engine: Any) -> dict[str, Tensor]:
    """Return everything that training changed, on the host; weights are whole, on the first rank only under ZeRO-3."""
    state = everything(engine)
    if engine.zero_optimization_stage() == 3:
        whole = consolidated(engine.module) or {}
        state = {name: t for name, t in state.items() if not name.startswith("model/")}
        state |= {f"model/{name}": t for name, t in whole.items()}
    return {name: t.cpu() for name, t in state.items() if name != "told"}


def _exported(engine: Any, folder: Path) -> dict[str, Tensor]:
    """What the method's own export and the model's `save_pretrained` write."""
    engine.module.save_pretrained(str(folder))
    block = engine.config["meft_offload"]
    if "sparse_adapter" in block:
        meft_ds.save_adapter(engine, folder / "adapter")
    if "sparse_matrix" in block:
        meft_ds.save_tiles(engine, folder / "tiles.safetensors")
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        where = re.sub("-[0-9a-f]{16}", "", str(path.relative_to(folder)))  # a digest of what is in it
        found |= {f"export/{where}/{name}": t for name, t in load_file(path).items()}
    return found


# -- weather: when a stream's work runs --------------------------------------------------------------------------------


@contextlib.contextmanager
def under(weather: str, seed: int = 0) -> Iterator[None]:
    """Let the streams of the emulated device run at another time, inside; on the CPU there is only "calm".

    "calm": at once. "delays": after a random while, another one for each stream. "lazy": only when somebody waits.
    "slow": the default stream is late. "late": all others are.
    """
    if weather == "calm":
        yield
        return
    _WEATHERS[weather](random.Random(seed))
    yield


def _delays(chance: random.Random) -> None:
    from tests.emulated_accelerator import device

    device.backend.set_delay(0, chance.choice([0, 30]))
    for stream in range(1, 64):
        device.backend.set_delay(stream, chance.choice([0, 500, 3000]))


def _lazy(chance: random.Random) -> None:
    from tests.emulated_accelerator import device

    for stream in range(64):
        device.backend.set_lazy(stream, True)


def _slow(chance: random.Random) -> None:
    from tests.emulated_accelerator import device

    device.backend.set_delay(0, 300)


def _late(chance: random.Random) -> None:
    from tests.emulated_accelerator import device

    for stream in range(1, 64):
        device.backend.set_delay(stream, 5000)


_WEATHERS: dict[str, Callable[[random.Random], None]] = {
    "delays": _delays,
    "lazy": _lazy,
    "slow": _slow,
    "late": _late,
}
