# SPDX-License-Identifier: Apache-2.0
"""What the schedule decides: in which order the host updates run, and which mode suits a machine.

Pure functions of measured times, so that ranks that agree on the times agree on the decision. Per layer, f and b are
forward and backward, o the way down, p the host's norm and update, u the way up (LSP-Offload, arXiv 2406.10181,
section 4).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    """The first unit (shallowest = 0) that is served first come, first served; those below it last come first.

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
    """The order in which one host worker serves the units, by a run of the two queues with the measured times.

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
    """`exact` where one forward hides the updates and the way up, else `eager`, which also has the backward for them.

    Args:
        forward_s: the first micro-batch's forward, the only one that exact updates can hide behind.
        host_s, up_s: sums over all units; of the host the updates alone, as norms are taken before the step.
    """
    return "exact" if max(host_s, up_s) <= forward_s else "eager"
