# SPDX-License-Identifier: Apache-2.0
"""The pipeline: carries every unit through one optimizer step, knowing wire formats only by their contract.

This is the serial order, the reference that any overlapping schedule must equal bit for bit: all payloads down in
backward order, one norm and one overflow verdict over all of them, then host updates and uploads in forward order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.profiler import record_function

from meft_ds.offload.bus import Bus
from meft_ds.offload.partition import Ranks, all_reduce_sum
from meft_ds.offload.wire import AdamHyper, Unit


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step decided: whether it was skipped, and the global gradient norm before clipping (inf if skipped)."""

    overflow: bool
    grad_norm: float


class Pipeline:
    """Runs units through windows.

    Args:
        units: in layer order.
        bus: transfers and their counters.
        ranks: data-parallel ranks.
    """

    def __init__(self, units: Sequence[Unit], bus: Bus, ranks: Ranks) -> None:
        self.units = list(units)
        self.bus, self.ranks = bus, ranks

    def step(
        self,
        hyper_of: Callable[[Unit], AdamHyper],
        *,
        step: int,
        grad_scale: float,
        clip: float,
    ) -> StepResult:
        """One optimizer step over all units.

        Args:
            hyper_of: AdamW's numbers for a unit, now.
            step: number of this update, counting applied ones from 1.
            grad_scale: what turns the summed payloads into the mean gradient: 1 / (world size * loss scale).
            clip: largest global gradient norm, 0 for none.

        Any non-finite value in any payload skips the step for all units, in every precision.
        """
        with record_function("meft.down"):
            for unit in reversed(self.units):
                unit.collect()
                unit.reduce()
                unit.send(self.bus)
        with record_function("meft.norm"):
            grad_norm = self._global_norm(grad_scale)
        if not math.isfinite(grad_norm):
            for unit in self.units:
                unit.discard()
            return StepResult(overflow=True, grad_norm=grad_norm)
        if clip > 0 and grad_norm > clip:
            grad_scale *= clip / (grad_norm + 1e-6)
        with record_function("meft.host_step"):
            for unit in self.units:
                unit.host_step(hyper_of(unit), step=step, grad_scale=grad_scale)
        with record_function("meft.up"):
            self.ranks.barrier()  # a rank may fetch what another one updated only after it did
            for unit in self.units:
                unit.apply(self.bus)
        return StepResult(overflow=False, grad_norm=grad_norm)

    def _global_norm(self, grad_scale: float) -> float:
        # Units are added in layer order on each rank and ranks by one reduction: the same number everywhere, every run.
        total = sum(unit.sq_norm() for unit in self.units)
        (total,) = all_reduce_sum([total], self.bus.device, self.ranks)
        return math.sqrt(total) * grad_scale if math.isfinite(total) else math.inf
