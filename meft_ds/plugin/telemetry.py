# SPDX-License-Identifier: Apache-2.0
"""What a run did in its last accumulation window, as `engine.meft_stats()` reports it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from meft_ds.offload.dense_unit import DenseUnit
from meft_ds.offload.host.transfer import Bus, training_bytes
from meft_ds.offload.method import Method
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.schedule.timing import WindowTimes
from meft_ds.offload.schedule.window import StepResult
from meft_ds.plugin.build import Plan


class Stats:
    """Keeps the counters of the last closed window."""

    def __init__(self, *, pipeline: Pipeline, methods: list[Method], plan: Plan) -> None:
        self._pipeline, self._methods, self._plan = pipeline, methods, plan
        self._dense = [unit for unit in pipeline.units if isinstance(unit, DenseUnit)]
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
        of_methods = {method.name: method.stats() for method in self._methods}
        on_device = sum(stats.pop("device_bytes") for stats in of_methods.values())
        return {
            "steps": self._steps,
            "bytes_down_per_step": down,
            "bytes_up_per_step": up,
            "bytes": counts,
            "device_bytes": on_device + sum(unit.footprint().device for unit in self._dense),
            "host_bytes": self._plan.host,
            **of_methods.pop("sparse_adapter", {}),  # at the top level since before there were other methods
            **of_methods,
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


TAG = "Train/Samples/meft_"

Event = tuple[str, float, int]


class Writer(Protocol):
    """What is used of DeepSpeed's MonitorMaster."""

    enabled: bool

    def write_events(self, event_list: list[Event]) -> None:
        """Write (tag, value, samples so far) to every configured place."""


class WindowMonitor:
    """Writes each closed window once. Does nothing while the monitor is off.

    Args:
        writer: DeepSpeed's monitor.
        bus: counts the bytes.
    """

    def __init__(self, writer: Writer, bus: Bus) -> None:
        self._writer, self._bus = writer, bus
        self._closed: tuple[int, dict[str, float]] | None = None

    def note(self, window: int, result: StepResult) -> None:
        """Keep what `write` will write: `window` has just been closed by the step that gave `result`."""
        if not self._writer.enabled:
            return
        times = result.times
        values = {
            "step_s": times.wall_s,
            "bound_s": times.bound_s,
            "efficiency": times.efficiency,
            "stall_s": times.stall_s,
            "norm_wait_s": times.norm_s,
            "host_update_s": times.host_s,
            "payloads": float(times.payloads),
        }
        if not result.overflow:  # a skipped step has no norm
            values["grad_norm"] = result.grad_norm
        self._closed = window, values

    def write(self, samples: int) -> None:
        """Write the window noted last, unless that was done. Call when all its updates are applied, before the bus
        closes the window after it.

        Args:
            samples: trained on until the end of the noted window.
        """
        if self._closed is None:
            return
        (window, values), self._closed = self._closed, None
        down, up = training_bytes(self._bus.counts_of(window))
        values = {"bytes_down": float(down), "bytes_up": float(up), **values}
        self._writer.write_events([(TAG + name, value, samples) for name, value in values.items()])
