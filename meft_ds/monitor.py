# SPDX-License-Identifier: Apache-2.0
"""Every step's bytes and times for DeepSpeed's own monitor: TensorBoard, CSV, W&B or Comet, as the user configured it.

A step returns while its last bytes are still on their way up. So a window's events are kept until all its updates were
applied, which at the latest the next step does, and are then written with the number of samples that DeepSpeed's own
events of that step have.
"""

from __future__ import annotations

from typing import Protocol

from meft_ds.offload.host.transfer import Bus, training_bytes
from meft_ds.offload.schedule.window import StepResult

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
