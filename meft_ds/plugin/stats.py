# SPDX-License-Identifier: Apache-2.0
"""What a run did in its last accumulation window, as `engine.meft_stats()` reports it."""

from __future__ import annotations

from typing import Any

from meft_ds.offload.bus import Bus
from meft_ds.offload.dense import DenseUnit
from meft_ds.offload.wire import Unit
from meft_ds.plugin.setup import Plan
from meft_ds.sparse_adapter.module import SparseAdapter
from meft_ds.sparse_adapter.unit import RowsUnit


class Stats:
    """Keeps the counters of the last closed window."""

    def __init__(self, *, bus: Bus, units: list[Unit], adapters: list[SparseAdapter], plan: Plan) -> None:
        self._bus, self._adapters, self._plan = bus, adapters, plan
        self._rows = [unit.rows for unit in units if isinstance(unit, RowsUnit)]
        self._dense = [unit for unit in units if isinstance(unit, DenseUnit)]
        self._bytes: dict[str, dict[str, int]] = {}
        self._steps = 0

    def close_window(self) -> None:
        """Take the counters of the window that just ended."""
        self._bytes = self._bus.take_counts()
        self._steps += 1

    def report(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        training = {name: entry for name, entry in self._bytes.items() if name != "eval_rows"}
        routers = sum(p.numel() * p.element_size() for a in self._adapters for p in a.parameters())
        return {
            "steps": self._steps,
            "bytes_down_per_step": sum(entry["down"] for entry in training.values()),
            "bytes_up_per_step": sum(entry["up"] for entry in training.values()),
            "bytes": self._bytes,
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
        }
