# SPDX-License-Identifier: Apache-2.0
"""What a run did in its last accumulation window: `engine.meft_stats()`, DeepSpeed's monitor, and the trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from meft_ds.offload.host.transfer import WindowBytes, training_bytes
from meft_ds.offload.method import Method
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.schedule.timing import WindowTimes
from meft_ds.offload.schedule.trace import Trace
from meft_ds.offload.schedule.window import StepResult

MONITORED = ("step_s", "bound_s", "efficiency", "stall_s", "norm_wait_s", "host_update_s", "payloads")
"""What of `WindowTimes` DeepSpeed's monitor gets."""
REPORTED = (*MONITORED, "compute_s", "idle_s", "hooks_s", "down_s", "up_s")
"""What of `WindowTimes` `meft_stats` reports."""
TAG = "Train/Samples/meft_"

Event = tuple[str, float, int]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the run will hold and move at most, known before anything is allocated.

    Attributes:
        host: bytes of this node's memory.
        device, down, up: bytes of this rank.
        dense_names: of the tensors that train whole.
        dense_parameters, dense_device: how many parameters they have, and the device bytes of their units.
    """

    host: int
    device: int
    down: int
    up: int
    dense_names: tuple[str, ...]
    dense_parameters: int
    dense_device: int


class Writer(Protocol):
    """What is used of DeepSpeed's MonitorMaster."""

    enabled: bool

    def write_events(self, event_list: list[Event]) -> None:
        """Write (tag, value, samples so far) to every configured place."""


class Telemetry:
    """Keeps the numbers of the last closed window, and hands them to whoever wants them.

    Args:
        pipeline: measures its windows.
        methods: have numbers of their own.
        plan: what was planned.
        writer: DeepSpeed's monitor.
        trace: gets every window; None where the block names no trace file.

    Attributes:
        steps: windows closed so far.
    """

    def __init__(
        self, *, pipeline: Pipeline, methods: Sequence[Method], plan: Plan, writer: Writer, trace: Trace | None = None
    ) -> None:
        self._pipeline, self._methods, self._plan = pipeline, methods, plan
        self._writer, self.trace = writer, trace
        self._closed = WindowBytes()
        self._times: WindowTimes | None = None
        self._unwritten: dict[str, float] | None = None  # of the last window, while DeepSpeed's monitor has not got it
        self.steps = 0

    def close_window(self, result: StepResult, samples: int) -> None:
        """Take note of the window that a step ended. `samples` were trained on before that step.

        The step has applied what the one before it left under way, so the window before is complete now.
        """
        self.write(samples)
        self._closed = self._pipeline.bus.close_window()
        self._times = times = replace(result.times, spans=(), marks=())  # sums are all that is reported
        self.steps += 1
        if self._writer.enabled:
            self._unwritten = {name: float(getattr(times, name)) for name in MONITORED}
            if not result.overflow:  # a skipped step has no norm
                self._unwritten["grad_norm"] = result.grad_norm
        if self.trace is not None:
            self.trace.add(result.times)

    def write(self, samples: int) -> None:
        """Hand the last window to DeepSpeed's monitor once. All its updates must be applied.

        `samples` were trained on until the end of that window.
        """
        if self._unwritten is None:
            return
        values, self._unwritten = self._unwritten, None
        down, up = training_bytes(self._closed.by_channel())
        values = {"bytes_down": float(down), "bytes_up": float(up), **values}
        self._writer.write_events([(TAG + name, value, samples) for name, value in values.items()])

    def close(self) -> None:
        """Write the trace, if it has not been written."""
        if self.trace is not None:
            self.trace.close()

    def report(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON."""
        self._pipeline.flush()  # the window's last bytes go up only then
        counts = self._closed.by_channel()
        down, up = training_bytes(counts)
        of_methods = {method.name: method.stats() for method in self._methods}
        on_device = sum(stats.pop("device_bytes") for stats in of_methods.values())
        return {
            "steps": self.steps,
            "bytes_down_per_step": down,
            "bytes_up_per_step": up,
            "bytes": counts,
            "device_bytes": on_device + self._plan.dense_device,
            "host_bytes": self._plan.host,
            **of_methods,
            **self._schedule(),
        }

    def _schedule(self) -> dict[str, Any]:
        if self._times is None:
            return {}
        tuner = self._pipeline.tuner
        return {"schedule_mode": tuner.choice or tuner.mode, **{name: getattr(self._times, name) for name in REPORTED}}
