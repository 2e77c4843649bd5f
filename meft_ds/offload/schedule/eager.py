# SPDX-License-Identifier: Apache-2.0
"""What the schedule decides: in which order the host updates run, and which mode suits a machine.

Pure functions of measured times, so that ranks that agree on the times agree on the decision. Per layer, f and b are
forward and backward, o the way down, p the host's norm and update, u the way up (LSP-Offload, arXiv 2406.10181,
section 4).
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from meft_ds.offload.schedule.timing import WindowTimes

Mode = Literal["serial", "exact", "eager", "auto"]

#: Windows measured before the first decision; the first ones pay for compilation and warm caches, so they count less
#: in a median.
MEASURED_WINDOWS = 4


@dataclass(frozen=True, kw_only=True)
class UnitTimes:
    """Measured seconds of one unit: arrival of its payload on the host after the backward began, and its o, p, u.

    p is all the host's work for the unit, its norm included: one worker does both.
    """

    arrival: float
    o: float
    p: float
    u: float


def transition(times: Sequence[UnitTimes], backward_s: float) -> int:
    """Return the first unit (shallowest = 0) that is served first come, first served; below it the last comes first.

    L - (T_B - (o + p + u)) / max(o, p, u) with the measured means: the deep units for which there is time before the
    backward ends. LSP-Offload, section 4.2.
    """
    units = len(times)
    o, p, u = (statistics.fmean(getattr(t, name) for t in times) for name in ("o", "p", "u"))
    slowest = max(o, p, u)
    if slowest <= 0:
        return 0
    in_time = (backward_s - (o + p + u)) / slowest
    return min(units, max(0, units - int(max(in_time, 0.0))))


def eager_order(times: Sequence[UnitTimes], first_fcfs: int) -> list[int]:
    """Return the order in which one host worker serves the units: run the two queues with the measured times.

    Units from `first_fcfs` on are served first come, first served; shallower ones last come, first served, and before
    any deep one that still waits. The order is fixed by the measured times instead of by who happens to come first, so
    that every rank and every run has the same one.
    """
    waiting = sorted(range(len(times)), key=lambda i: (times[i].arrival, -i))
    order: list[int] = []
    now = 0.0
    deep: list[int] = []
    shallow: list[int] = []
    while waiting or deep or shallow:
        while waiting and times[waiting[0]].arrival <= now:
            unit = waiting.pop(0)
            (deep if unit >= first_fcfs else shallow).append(unit)
        if not deep and not shallow:
            now = times[waiting[0]].arrival
            continue
        unit = shallow.pop() if shallow else deep.pop(0)
        order.append(unit)
        now += times[unit].p
    return order


def choose_mode(*, forward_s: float, host_s: float, up_s: float) -> Literal["exact", "eager"]:
    """Return `exact` where one forward hides updates and the way up, else `eager`, which also has the backward.

    Args:
        forward_s: the first micro-batch's forward, the only one that exact updates can hide behind.
        host_s, up_s: sums over all units; of the host the updates alone, as norms are taken before the step.
    """
    return "exact" if max(host_s, up_s) <= forward_s else "eager"


_logger = logging.getLogger("meft_ds")
_REFRESH = 16  # windows between two looks at the order of eager updates

_LANE_TIMES = {"down": "o", "host": "p", "up": "u"}  # p: the norm and the update, as one worker does both

_Means = dict[str, list[float]]


class Tuner:
    """What the modes "eager" and "auto" know about this run.

    Args:
        mode: as configured.
        names: of the units, in layer order.
    """

    def __init__(self, mode: Mode, names: Sequence[str]) -> None:
        self.mode = mode
        self.choice: Mode | None = None if mode == "auto" else mode
        self.last_norm: float | None = None
        self._names = list(names)
        self._index = {name: i for i, name in enumerate(names)}
        self._windows = 0
        self._history: deque[_Means] = deque(maxlen=MEASURED_WINDOWS)
        self._order: list[int] | None = None
        self.transition: int | None = None

    @property
    def eager_now(self) -> bool:
        """Whether updates may start before the verdict: once there is an order, and a norm to clip by."""
        return self.choice == "eager" and self._order is not None and self.last_norm is not None

    def order(self) -> list[int]:
        """Return the units in the order of their eager updates."""
        assert self._order is not None
        return self._order

    def saw_norm(self, grad_norm: float) -> None:
        """Note the global norm of a window; inf when it overflowed (the one before it is kept then)."""
        if math.isfinite(grad_norm):
            self.last_norm = grad_norm

    def saw(self, times: WindowTimes) -> None:
        """Note the measurements of a window."""
        self._windows += 1
        if self.mode in ("eager", "auto"):
            self._history.append(self._measure(times))

    def report(self) -> list[float]:
        """Return this rank's measured medians, as many on every rank; nothing in windows that decide nothing."""
        due = self._windows >= MEASURED_WINDOWS and (self._order is None or self._windows % _REFRESH == 0)
        if self.mode not in ("eager", "auto") or not due:
            return []
        keys = ("sums", "arrival", "o", "p", "u")
        return [statistics.median(window[key][i] for window in self._history) for key in keys for i in self._range(key)]

    def agreed(self, values: Sequence[float]) -> None:
        """Decide by the averages of all ranks' reports."""
        if not values:
            return
        n = len(self._names)
        forward, backward, updates = values[:3]
        arrival, o, p, u = (values[3 + k * n : 3 + (k + 1) * n] for k in range(4))
        if self.choice is None:
            self.choice = choose_mode(forward_s=forward, host_s=updates, up_s=sum(u))
            _logger.info(
                "schedule mode auto chose %s: per step the host updates take %.1f ms and the way up %.1f ms, "
                "the forward that can hide them %.1f ms",
                self.choice,
                updates * 1e3,
                sum(u) * 1e3,
                forward * 1e3,
            )
        times = [UnitTimes(arrival=arrival[i], o=o[i], p=p[i], u=u[i]) for i in range(n)]
        first_fcfs = transition(times, backward)
        if self._order is None and self.choice == "eager":
            _logger.info(
                "eager updates begin: they are clipped by the norm of the window before, and a unit that is "
                "not finite is left out alone; first come first served down to unit %d of %d",
                first_fcfs,
                n,
            )
        self.transition, self._order = first_fcfs, eager_order(times, first_fcfs)

    def state(self) -> dict[str, Any]:
        """Return what resuming needs, as JSON; the norm in hex, so that every bit is kept."""
        return {
            "choice": self.choice,
            "last_norm": None if self.last_norm is None else self.last_norm.hex(),
            "order": None if self._order is None else [self._names[i] for i in self._order],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave. A mode set by hand since then wins."""
        self.last_norm = None if state["last_norm"] is None else float.fromhex(state["last_norm"])
        if self.mode == "auto":
            self.choice = state["choice"] if state["choice"] in ("exact", "eager") else None
        if state["order"] is not None and sorted(state["order"]) == sorted(self._names):
            self._order = [self._index[name] for name in state["order"]]

    def _range(self, key: str) -> range:
        return range(3) if key == "sums" else range(len(self._names))

    def _measure(self, times: WindowTimes) -> _Means:
        n = len(self._names)
        means: _Means = {key: [0.0] * n for key in ("arrival", "o", "p", "u")}
        # exact updates are hidden by a forward, but not their norms, which are taken during backward
        updates = sum(s.seconds for s in times.spans if (s.lane, s.what) == ("host", "update"))
        means["sums"] = [times.first_forward_s, times.last_backward_s, updates]
        # a thread that launches is ahead of its device: all arrivals are later by the same time, which changes no order
        begun = next((at for what, at in reversed(times.marks) if what == "forward_end"), 0.0)
        for span in times.spans:
            if (key := _LANE_TIMES.get(span.lane)) is None:
                continue
            index = self._index[span.unit]
            means[key][index] += span.seconds
            if span.lane == "down":
                means["arrival"][index] = max(0.0, span.end - begun)
        return means
