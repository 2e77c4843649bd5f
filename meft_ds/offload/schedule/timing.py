# SPDX-License-Identifier: Apache-2.0
"""Where the time of a window went: spans of work and waiting by lane, and the points between forward and backward.

Every span is also a `record_function` range named `meft.<lane>.<what>`, so a PyTorch profile shows the same lanes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from torch.profiler import record_function

from meft_ds.offload.host.transfer import Bus

LaneName = Literal["compute", "main", "down", "host", "up"]
"""Where work runs: in the model, elsewhere on the training thread, or on one of the three lanes."""
MarkName = Literal["forward", "forward_end", "backward_end", "step", "end"]
"""Points of a window on the training thread."""
_ON_MAIN = ("stall", "norm", "collect", "apply")  # work and waiting on the training thread


class Span(NamedTuple):
    """Work or waiting on one lane. Times are `time.perf_counter` seconds."""

    lane: LaneName
    what: str  # on "main": stall, norm, collect, apply; elsewhere the stage
    unit: str  # "" for what concerns all units
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class WindowTimes:
    """One accumulation window in seconds. A sum runs over its micro-batches or over all units.

    `step_s` is forwards, backwards and the step, without what your program does between them. `down_s`,
    `host_update_s` and `up_s` count work that ran in this window. With an overlapping schedule these are the host
    updates and uploads of the step before it.
    """

    step_s: float
    forward_s: float
    backward_s: float
    first_forward_s: float
    last_backward_s: float
    stall_s: float  # the training thread waited for an update
    norm_wait_s: float  # the training thread waited for the payloads, the norm and the verdict
    hooks_s: float  # the training thread's own work for the schedule: collecting and applying
    down_s: float
    host_update_s: float  # norms and updates
    up_s: float
    tail_s: float  # down + host + up of the shallowest layer
    payloads: int
    spans: Sequence[Span] = ()
    marks: Sequence[tuple[MarkName, float]] = ()

    @property
    def compute_s(self) -> float:
        """Forward and backward without the waiting inside them."""
        return max(self.forward_s + self.backward_s - self.stall_s, 0.0)

    @property
    def bound_s(self) -> float:
        """The busiest lane, and what the first layer cannot hide (docs/explanation/schedule.md)."""
        return max(self.compute_s, self.down_s, self.host_update_s, self.up_s) + self.tail_s

    @property
    def efficiency(self) -> float:
        """`bound_s` over `step_s`, at most 1."""
        return min(1.0, self.bound_s / self.step_s) if self.step_s > 0 else 1.0


class Timeline:
    """Collects spans from all threads, and marks from the training thread.

    Args:
        bus: gives points in the device's work, so that forward and backward are the device's times.
        shallowest: names of the units of the first layer.
    """

    def __init__(self, bus: Bus, shallowest: Sequence[str] = ()) -> None:
        self._bus = bus
        self._shallowest = frozenset(shallowest)
        self._spans: list[Span] = []
        self._adding = threading.Lock()
        self._marks: list[tuple[MarkName, float, Any]] = []

    @contextlib.contextmanager
    def span(self, lane: LaneName, what: str, unit: str = "") -> Iterator[None]:
        """Time what runs inside."""
        with record_function(f"meft.{lane}.{what}" + (f" {unit}" if unit else "")):
            start = time.perf_counter()
            try:
                yield
            finally:
                span = Span(lane, what, unit, start, time.perf_counter())
                with self._adding:
                    self._spans.append(span)

    def mark(self, what: MarkName) -> None:
        """Note a point of the window."""
        self._marks.append((what, time.perf_counter(), self._bus.mark(timed=True)))

    def close_window(self) -> WindowTimes:
        """Return what was collected since the last call."""
        self.mark("end")
        with self._adding:
            spans, self._spans = self._spans, []
        marks, self._marks = self._marks, []
        found = [(what, _between(first, last)) for what, first, last in phases(marks)]
        forwards, backwards = ([s for what, s in found if what == name] for name in ("forward", "backward"))
        total = {lane: sum(s.seconds for s in spans if s.lane == lane) for lane in ("down", "host", "up")}
        main = {what: sum(s.seconds for s in spans if s.lane == "main" and s.what == what) for what in _ON_MAIN}
        step = next((at for what, at, _ in marks if what == "step"), marks[-1][1])
        return WindowTimes(
            step_s=sum(forwards) + sum(backwards) + marks[-1][1] - step,
            forward_s=sum(forwards),
            backward_s=sum(backwards),
            first_forward_s=forwards[0] if forwards else 0.0,
            last_backward_s=backwards[-1] if backwards else 0.0,
            stall_s=main["stall"],
            norm_wait_s=main["norm"],
            hooks_s=main["collect"] + main["apply"],
            down_s=total["down"],
            host_update_s=total["host"],
            up_s=total["up"],
            tail_s=sum(s.seconds for s in spans if s.lane != "main" and s.unit in self._shallowest),
            payloads=sum(s.lane == "down" for s in spans),
            spans=tuple(spans),
            marks=tuple((what, at) for what, at, _ in marks),
        )


_Mark = TypeVar("_Mark", bound=tuple[Any, ...])


def phases(marks: Sequence[_Mark]) -> Iterator[tuple[str, _Mark, _Mark]]:
    """Yield ("forward" or "backward", first mark, last mark). A mark's first item says what it marks.

    A backward goes from its forward's end to the last "backward_end" before the next forward or the step.
    """
    begun = ended = backward_ended = None
    for mark in marks:
        what = mark[0]
        if what == "backward_end":
            backward_ended = mark
        elif what == "forward_end":
            if begun is not None:
                yield "forward", begun, mark
            begun, ended, backward_ended = None, mark, None
        else:  # the next forward, the step, or the end
            if ended is not None and backward_ended is not None:
                yield "backward", ended, backward_ended
                ended = backward_ended = None
            begun = mark if what == "forward" else None


def _between(first: tuple[str, float, Any], last: tuple[str, float, Any]) -> float:
    """Return the seconds of the device's work between two marks; of the thread where the device has no clock."""
    if first[2] is None or last[2] is None:
        return last[1] - first[1]
    last[2].synchronize()  # hardly waits: a step ends after the device did the backward
    return float(first[2].elapsed_time(last[2])) / 1e3
