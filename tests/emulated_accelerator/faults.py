# SPDX-License-Identifier: Apache-2.0
"""Planted faults: edits of the product's source, made in the rank that trains, each of which the suite must notice."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.emulated_accelerator import cells

BUS = "meft_ds.offload.host.transfer:Bus."


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is taken away, and who notices.

    Attributes:
        edits: (function, text in its source, text instead of it).
        cells: of the suite, each of which trains differently with the fault.
        weather: in which they do.
    """

    edits: tuple[tuple[str, str, str], ...]
    cells: tuple[str, ...]
    weather: str = "lazy"


ON_HOST = ("subspace, state on the host", "tiles, state on the host", "fourth method")
ON_DEVICE = ("subspace, state on the device", "tiles, state on the device")
SIDE = ("subspace, side stream", "tiles, side stream", "fourth method, side stream")
PARTITIONED = ("tiles, ZeRO-3, two ranks",)
_UNSYNCHRONIZED = "took.seconds = 0.0 if direction == {!r} else done.synchronize() or begun.elapsed_time(done) / 1e3"
_SYNCHRONIZES = "done.synchronize()\n    took.seconds = begun.elapsed_time(done) / 1e3"
_WAITS = (BUS + "wait", "mark is not None", "False")
_FETCHES = (BUS + "fetch_rows", "dst.copy_(rows)", "dst.copy_(rows, non_blocking=True)")
_UP = (BUS + "up", "t.to(self.device)", "t.to(self.device, non_blocking=True)")

FAULTS = {
    "the way down does not wait for backward": Fault(
        edits=((BUS + "lane", "stream.wait_event(after)", "pass"),), cells=("adapter", *ON_HOST, *ON_DEVICE)
    ),
    "the mark after backward is made on no stream": Fault(
        edits=((BUS + "mark", "event.record(self._runtime.current_stream(self.device))", ""),),
        cells=("adapter", *ON_HOST),
    ),
    "nobody waits for what comes up": Fault(
        edits=((BUS + "lane", _SYNCHRONIZES, _UNSYNCHRONIZED.format("up")), _WAITS), cells=(*ON_HOST, *ON_DEVICE)
    ),
    "nobody waits for what goes down": Fault(
        edits=((BUS + "lane", _SYNCHRONIZES, _UNSYNCHRONIZED.format("down")),), cells=("adapter", *ON_HOST)
    ),
    "an update on the device does not wait for moments of new projectors": Fault(
        edits=(("meft_ds.offload.updates:Updates._up_job", 'bus.lane("up", after)', 'bus.lane("up")'),),
        cells=("subspace, state on the device",),
        weather="slow",
    ),
    "a read on another stream does not wait for the update": Fault(
        edits=((BUS + "training", "self.wait(done)", "pass"),), cells=SIDE, weather="calm"
    ),
    "keys are scored before their inputs are down": Fault(
        edits=((BUS + "down", "host.copy_(t)", "host.copy_(t, non_blocking=True)"),), cells=("adapter",)
    ),
    "rows are gathered over those that still go up": Fault(edits=(_FETCHES, _UP), cells=("adapter, spill",)),
    "compressed rows are freed before they are down": Fault(
        edits=(("meft_ds.sparse_adapter.unit:RowsUnit.collect", "self._collected = self._payload", ""),),
        cells=("adapter+compress",),
        weather="late",
    ),
    "a gather does not wait for the slice": Fault(
        edits=(("meft_ds.plugin.zero3:Streams.read", "self._written is not None", "False"),),
        cells=PARTITIONED,
        weather="slow",
    ),
    "a write of a slice is noted on no stream": Fault(
        edits=(("meft_ds.plugin.zero3:Streams.wrote", "self._runtime is not None", "False"),),
        cells=PARTITIONED,
        weather="slow",
    ),
}


def plant(name: str, old: str, new: str) -> None:
    """Replace text in the source of the function `package.module:qualified.name`, which must be there."""
    path, _, qualified = name.partition(":")
    module: Any = importlib.import_module(path)
    holder, found = None, module
    for part in qualified.split("."):
        holder, found = found, getattr(found, part)
    source = textwrap.dedent(inspect.getsource(found))
    assert source.count(old) == 1, f"the planted fault does not fit {name} any more: {old!r} is not there once"
    made: dict[str, Any] = {}
    exec(compile(source.replace(old, new), f"<{name} with a fault>", "exec"), vars(module), made)
    setattr(holder, found.__name__, made[found.__name__])


def train(folder: Path, cell: str, fault: str) -> dict[str, Any]:
    """Train a cell with a fault planted."""
    for edit in FAULTS[fault].edits:
        plant(*edit)
    return cells.train(folder, cell, FAULTS[fault].weather)
