# SPDX-License-Identifier: Apache-2.0
"""What a run did in its last accumulation window, as `engine.meft_stats()` reports it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meft_ds.offload.bus import training_bytes
from meft_ds.offload.dense import DenseUnit
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.timeline import WindowTimes
from meft_ds.plugin.setup import Plan
from meft_ds.sparse_adapter.module import SparseAdapter
from meft_ds.sparse_adapter.unit import RowsUnit


class Stats:
    """Keeps the counters of the last closed window."""

    def __init__(self, *, pipeline: Pipeline, adapters: list[SparseAdapter], plan: Plan) -> None:
        self._pipeline, self._adapters, self._plan = pipeline, adapters, plan
        units = pipeline.units
        self._rows = [unit.rows for unit in units if isinstance(unit, RowsUnit)]
        self._dense = [unit for unit in units if isinstance(unit, DenseUnit)]
        self._closed: int | None = None
        self._times: WindowTimes | None = None
        self._steps = 0

    def close_window(self, times: WindowTimes) -> int:
        """Take note of the window that just ended; returns its number."""
        closed = self._pipeline.bus.close_window()
        self._closed, self._times = closed, replace(times, spans=(), marks=())  # sums are all that is reported
        self._steps += 1
        return closed

    def report(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        self._pipeline.flush()  # the window's last bytes go up only then
        counts = {} if self._closed is None else self._pipeline.bus.counts_of(self._closed)
        down, up = training_bytes(counts)
        routers = sum(p.numel() * p.element_size() for a in self._adapters for p in a.parameters())
        return {
            "steps": self._steps,
            "bytes_down_per_step": down,
            "bytes_up_per_step": up,
            "bytes": counts,
            "device_bytes": sum(rows.device_bytes() for rows in self._rows)
            + routers
            + sum(unit.footprint().device for unit in self._dense),
            "host_bytes": self._plan.host,
            "rows_total": sum(rows.r for rows in self._rows),
            "active_rows": [rows.window_rows for rows in self._rows],
            "expert_load": [
                None if load is None else load.tolist() for load in (r.last_expert_load for r in self._rows)
            ],
            "dead_rows": sum(rows.dead_rows() for rows in self._rows),
            "spills": sum(rows.spills for rows in self._rows),
            **self._schedule(),
        }

    def _schedule(self) -> dict[str, Any]:
        times, tuner = self._times, self._pipeline.tuner
        if times is None:
            return {}
        return {
            "schedule_mode": tuner.choice or tuner.mode,
            "step_s": times.wall_s,
            "compute_s": times.compute_s,
            "stall_s": times.stall_s,
            "norm_wait_s": times.norm_s,
            "hooks_s": times.hooks_s,
            "down_s": times.down_s,
            "host_update_s": times.host_s,
            "up_s": times.up_s,
            "payloads": times.payloads,
            "bound_s": times.bound_s,
            "efficiency": times.efficiency,
        }
