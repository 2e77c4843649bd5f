# SPDX-License-Identifier: Apache-2.0
"""One accumulation window: what a step takes from the user and gives back, and how far each unit has come in it.

The pipeline alone writes this state; fields that a lane sets and the training thread waits for are set under its lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.eager import Tuner
from meft_ds.offload.schedule.timing import WindowTimes
from meft_ds.offload.unit import Unit
from meft_ds.ops.adam import AdamHyper


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What an optimizer step takes from the user, now.

    `grad_scale` turns the summed payloads into the mean gradient: 1 / (world size * loss scale). `clip` is the largest
    global gradient norm, 0 for none.
    """

    hyper_of: Callable[[Unit], AdamHyper]
    grad_scale: float
    clip: float


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step decided: whether it was skipped, and the global gradient norm before clipping (inf if skipped).

    `times` are those of the window that the step closed.
    """

    overflow: bool
    grad_norm: float
    times: WindowTimes


Reached = Literal["measured", "updated"]
"""Fields of `UnitProgress` that a lane sets and the training thread waits for."""


@dataclass(eq=False)
class UnitProgress:
    """Where a unit is in the current window."""

    unit: Unit
    index: int
    steps: int = 0  # updates applied so far
    reliable: bool = True  # its payload can leave as soon as backward says so
    ready: bool = False  # backward said so in this window
    sent: bool = False
    late: bool = False  # a gradient came after it was sent
    again: bool = False  # what was sent has been forgotten since, and the window's end sends it anew
    measured: bool = False  # payload and its norm are on the host
    sq_norm: float = 0.0
    calibrates: bool = False  # see `Method.calibrates`
    early: bool = False  # updated without waiting for the verdict (eager)
    decided: bool = False  # early, and its own verdict is known
    finite: bool = True
    pending: bool = False  # an update was handed over and not yet applied
    updated: bool = False  # its reply is on the device
    up_mark: Any = None
    exposed: bool = True  # the program may have written into the parameters since the last payload left
    versions: tuple[int, ...] = ()  # the parameters' own, when the update was applied or the payload left

    def open_window(self) -> None:
        self.ready = self.sent = self.late = self.again = self.measured = self.early = self.decided = False
        self.finite = True
        self.calibrates = False


@dataclass
class Window:
    """What the current window has settled on."""

    send_order: list[UnitProgress]
    next_to_send: int = 0
    update_order: list[UnitProgress] = field(default_factory=list)
    next_to_update: int = 0
    settings: StepSettings | None = None
    begun: bool = False
    collected: bool = False  # a gradient has come
    touched: bool = False  # a gradient has come since the last backward began
    forgotten: BaseException | None = None  # what ended the backward or the step that this window begins again for
    sending: bool = False  # a payload is being handed to a lane
    in_backward: bool = False


class Forgotten(Exception):
    """A program had what the window collected forgotten."""


def clip_factor(clip: float, grad_norm: float) -> float:
    """Return the factor on gradients of global norm `grad_norm` that makes it at most `clip` (0 for no limit)."""
    return clip / (grad_norm + 1e-6) if clip > 0 and grad_norm > clip else 1.0


def agree(
    entries: Sequence[UnitProgress], tuner: Tuner, device: torch.device, ranks: Ranks
) -> tuple[float, list[UnitProgress]]:
    """Return the sum of squares over units and ranks, and the units that must be sent again. Collective.

    A unit is sent again when on some rank a gradient came after it had been sent, or when what was sent has been
    forgotten.

    Units with late gradients, or that a backward left unfinished on some rank, are `reliable` no longer; the tuner
    learns the ranks' mean times.
    """
    n = len(entries)
    learning = any(entry.ready for entry in entries)
    values = [entry.sq_norm for entry in entries]
    values += [float(entry.late) for entry in entries]
    values += [float(learning and not entry.ready) for entry in entries]
    values += [float(entry.again) for entry in entries]
    values += tuner.report()
    values = ranks.sum(values, device)
    late = [entry for entry, flag in zip(entries, values[n : 2 * n], strict=True) if flag]
    unfinished = [entry for entry, flag in zip(entries, values[2 * n : 3 * n], strict=True) if flag]
    again = [entry for entry, flag in zip(entries, values[3 * n : 4 * n], strict=True) if flag and entry not in late]
    for entry in [*late, *unfinished]:
        entry.reliable = False
    if not (late or again):
        tuner.agreed([value / ranks.world for value in values[4 * n :]])
    return sum(values[:n]), late + again
