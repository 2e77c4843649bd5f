# SPDX-License-Identifier: Apache-2.0
"""What ranks of test_bus.py do: how much host memory is page-locked, and what lanes tell of their times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from meft_ds.offload.host.page_locked import pages, taken
from tests.emulated_accelerator.cells import CELLS, QUIET
from tests.emulated_accelerator.device import backend
from tests.methods import engine_of
from tests.toy import batch


def memory(folder: Path, cell: str) -> dict[str, int]:
    """What the plan counted, beside what there is: page-locked bytes by the device's allocator, and other tensors."""
    before = backend.pinned_usage()[0]
    engine = engine_of(CELLS[cell].entry, precision="bf16", **QUIET)
    pipeline = engine.optimizer.pipeline
    locked, other = backend.pinned_usage()[0] - before, 0
    for unit in pipeline.units:
        rows = getattr(unit, "rows", None)
        if rows is None:
            other += _bytes(*unit.state_tensors().values())
        else:  # masters and replicas on pages of their own, in this order: store, moments, what is noted of each row
            other += sum(pages(_bytes(t)) for t in rows.store)
            other += _bytes(unit.adam.exp_avg, unit.adam.exp_avg_sq, rows._slot_of_row, rows._ever_active)
    step(engine, 0)
    step(engine, 1)
    grown = backend.pinned_usage()[0] - before - locked
    unknown = sum(taken(t.numel(), engine.device) for key, t in pipeline.bus._staging.items() if isinstance(key, tuple))
    planned = engine.meft_stats()["host_bytes"]
    return {"planned": planned, "locked": locked, "other": other, "grown": grown, "unknown": unknown}


def times(folder: Path, slow: str) -> dict[str, Any]:
    """Times of a window, one stream of which takes its time for each operator."""
    engine = engine_of(CELLS["subspace, state on the host"].entry, gas=1, **QUIET)
    step(engine, 0)
    streams = engine.optimizer.pipeline.bus._streams
    backend.set_delay(streams[slow].stream_id if slow in streams else 0, 100_000 if slow in streams else 300)
    step(engine, 1)  # its update goes up in the next window
    step(engine, 2)
    backend.set_delay(streams[slow].stream_id if slow in streams else 0, 0)
    return engine.meft_stats() | {"units": len(engine.optimizer.pipeline.units)}


def step(engine: Any, seed: int) -> None:
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(**{key: t.to(engine.device) for key, t in batch(seed).items()}).loss)
        engine.step()


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
