# SPDX-License-Identifier: Apache-2.0
"""Where the time of a window went: spans of work and waiting by lane, and the points between forward and backward.

Every span is also a `record_function` range named `meft.<lane>.<what>`, so a PyTorch profile shows the same lanes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from torch.profiler import record_function

from meft_ds.offload.host.transfer import Bus, DeviceTime

LaneName = Literal["compute", "main", "down", "host", "up"]
"""Where work runs: in the model, elsewhere on the training thread, or on one of the three lanes."""
MarkName = Literal["forward", "forward_end", "backward_end", "step", "verdict", "end", "stall"]
"""Points of a window on the training thread. At the verdict all payloads are down, so the device has nothing to do."""
_ON_MAIN = ("stall", "norm", "collect", "apply")  # work and waiting on the training thread


class Span(NamedTuple):
    """Work or waiting on one lane. Times are `time.perf_counter` seconds.

    Work on an accelerator's down or up stream ends when the lane's thread knew of its end, and begins as long before as
    it took on the device.
    """

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

    On an accelerator forwards, backwards, `idle_s`, `down_s` and `up_s` are the device's times. Waits and work of the
    training thread and of the host are the host's.
    """

    step_s: float
    forward_s: float
    backward_s: float
    first_forward_s: float
    last_backward_s: float
    stall_s: float  # the training thread waited for an update
    idle_s: float  # the device had nothing to do in forwards and backwards because of such waits
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
        """Forward and backward without the idle time inside them."""
        return max(self.forward_s + self.backward_s - self.idle_s, 0.0)

    @property
    def bound_s(self) -> float:
        """The busiest lane, and what the first layer cannot hide (docs/explanation/schedule.md)."""
        return max(self.compute_s, self.down_s, self.host_update_s, self.up_s) + self.tail_s

    @property
    def efficiency(self) -> float:
        """`bound_s` over `step_s`, at most 1."""
        return min(1.0, self.bound_s / self.step_s) if self.step_s > 0 else 1.0


_Point = tuple[MarkName, float, Any]
"""What it is, when the thread came to it, and the event that tells when the device did."""


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
        self._marks: list[_Point] = []
        self._stalls: list[tuple[_Point, _Point]] = []

    @contextlib.contextmanager
    def span(
        self, lane: LaneName, what: str, unit: str = "", *, on: AbstractContextManager[DeviceTime] | None = None
    ) -> Iterator[None]:
        """Time what runs inside. `on`: the stream on which it does, by `Bus.lane`."""
        took = DeviceTime()
        with record_function(f"meft.{lane}.{what}" + (f" {unit}" if unit else "")):
            start = time.perf_counter()
            try:
                with on or contextlib.nullcontext(took) as took:
                    yield
            finally:
                end = time.perf_counter()
                span = Span(lane, what, unit, start if took.seconds is None else end - took.seconds, end)
                with self._adding:
                    self._spans.append(span)

    @contextlib.contextmanager
    def stall(self, unit: str) -> Iterator[None]:
        """Time a wait for an update, and for how long the device has nothing to do meanwhile."""
        before = self._point("stall")
        with self.span("main", "stall", unit):
            yield
        self._stalls.append((before, self._point("stall")))

    def mark(self, what: MarkName) -> None:
        """Note a point of the window."""
        self._marks.append(self._point(what))

    def _point(self, what: MarkName) -> _Point:
        return what, time.perf_counter(), self._bus.mark(timed=True)

    def close_window(self) -> WindowTimes:
        """Return what was collected since the last call."""
        self.mark("end")
        with self._adding:
            spans, self._spans = self._spans, []
        marks, self._marks = self._marks, []
        stalls, self._stalls = self._stalls, []
        found = list(phases(marks))
        forwards, backwards = ([_between(a, b) for what, a, b in found if what == name] for name in _PHASES)
        inside = [stall for stall in stalls if any(a[1] <= stall[0][1] <= b[1] for _, a, b in found)]
        total = {lane: sum(s.seconds for s in spans if s.lane == lane) for lane in ("down", "host", "up")}
        main = {what: sum(s.seconds for s in spans if s.lane == "main" and s.what == what) for what in _ON_MAIN}
        end = marks[-1]
        step = next((mark for mark in marks if mark[0] == "step"), end)
        verdict = next((mark for mark in marks if mark[0] == "verdict"), step)
        return WindowTimes(
            # the thread comes to the step while the device still does the backward; from the verdict on they agree
            step_s=sum(forwards) + sum(backwards) + _between(step, verdict) + end[1] - verdict[1],
            forward_s=sum(forwards),
            backward_s=sum(backwards),
            first_forward_s=forwards[0] if forwards else 0.0,
            last_backward_s=backwards[-1] if backwards else 0.0,
            stall_s=main["stall"],
            idle_s=sum(_between(before, after) for before, after in inside),
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
_PHASES = ("forward", "backward")


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
        else:  # the next forward, the step, the verdict, or the end
            if ended is not None and backward_ended is not None:
                yield "backward", ended, backward_ended
                ended = backward_ended = None
            begun = mark if what == "forward" else None


def _between(first: _Point, last: _Point) -> float:
    """Return the seconds of the device's work between two points; of the thread where the device has no clock."""
    if first[2] is None or last[2] is None:
        return last[1] - first[1]
    last[2].synchronize()  # hardly waits: a window closes after its verdict, and the device was done with all before
    return float(first[2].elapsed_time(last[2])) / 1e3
