# SPDX-License-Identifier: Apache-2.0
"""When projectors change: a check every `refit_interval` updates, in the first backward of a window.

A checked unit keeps what its gradients are made of until its layer is done, then takes one matrix
after another: build the gradient, sum it over ranks, measure the bias, decide, and compute S from it. Only one matrix's
gradient is dense at a time (with `gradient_side: "weight"`, those that autograd made of one layer). The first half of
the tokens is what a fit sees, the other half is held out; a new pair is taken only if it does better there.

Collectives run in an order that is the same on every rank even if a rank's backward does not reach some modules (an
expert without tokens): units from the deepest up, matrices as in the model, zeros for what a rank has not seen.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from meft_ds.offload.ranks import Ranks
from meft_ds.ops.projector import Projector, compress, seed_of
from meft_ds.subspace.config import SubspaceConfig
from meft_ds.subspace.fit import bias_of, fit
from meft_ds.subspace.matrix import Matrix, Side
from meft_ds.subspace.unit import SubspaceUnit

_logger = logging.getLogger("meft_ds")


def first_draw(config: SubspaceConfig, name: str, m: int, d: int, step: int, device: torch.device) -> Projector:
    """Draw the projector that side `name` starts from in the window after `step` updates, from these alone."""
    return Projector.draw(m, d, config.nonzeros, seed_of(config.seed, name, step), device)


class Calibrator:
    """Decide when and how the projectors of one engine's units change. The method owns it.

    Attributes:
        checks: checks so far.
        seconds: spent in them.
    """

    def __init__(self, config: SubspaceConfig, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self._open: list[SubspaceUnit] = []  # of this window, in the order they are taken in
        self._complete: set[int] = set()
        self._step = 0  # updates so far of the unit that is taken
        self._decided: set[int] = set()  # sides that this check has decided on
        self._spent, self._gave_up, self._overflow = 0.0, False, False
        self._counted = False  # this window is among the checks
        self.checks, self.seconds = 0, 0.0

    # -- order ---------------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Return whether the window after `step` updates calibrates."""
        interval = self._config.refit_interval
        if step == 0:
            return self._config.projectors == "learned"
        return interval > 0 and step % interval == 0

    def begin(self, units: Sequence[SubspaceUnit], steps: Mapping[str, int]) -> None:
        """Begin a window, or begin it again: nothing of one that was given up is left.

        A unit that is due checks all of its matrices. Another one fits those that wait once they have a gradient.

        Args:
            units: that calibrate.
            steps: by a unit's name: its updates so far.
        """
        self._complete.clear()
        self._decided.clear()
        self._spent, self._gave_up, self._overflow = 0.0, False, False
        self._counted = False
        for unit in units:
            step = steps[unit.name]
            due = self.due(step)
            unit.capture(unit.matrices if due else unit.awaited, step=step)
            if due:
                self._count()
            else:  # what this window sums of the others is of the projectors that they have
                self._decided.update(id(matrix.right) for matrix in unit.matrices if matrix not in unit.asked)
        self._open = sorted(units, key=lambda u: ([-x for x in u.depth], u.name))

    def arriving(self, unit: SubspaceUnit) -> None:
        """Take deeper units: a gradient of `unit` is about to be added."""
        # a deeper one that has seen nothing is not done: `unit` holds something that runs late but is named early
        while (first := self._first) is not None and first.depth > unit.depth and first.captured:
            self._take(first)

    def received(self, unit: SubspaceUnit) -> None:
        """Take what can be taken: `unit` has all gradients of the backward that runs."""
        self._complete.add(id(unit))
        while (first := self._first) is not None and id(first) in self._complete:
            self._take(first)
        if unit in self._open and self._ranks.world == 1 and not self.due(unit.step):
            self._take(unit)  # not after a deeper one that may never get a gradient

    def end(self) -> None:
        """Take all that is left: no more gradients come."""
        while (first := self._first) is not None:
            self._take(first)

    @property
    def _first(self) -> SubspaceUnit | None:
        while self._open and not self._open[0].asked:  # its window was given up
            self._open.pop(0)
        return self._open[0] if self._open else None

    def _take(self, unit: SubspaceUnit) -> None:
        self._open.remove(unit)
        self._step = unit.step
        reached = self._reached(unit)
        for matrix, did in zip(unit.asked, reached, strict=True):
            if not did:
                unit.add_captured(matrix)
                continue
            start = time.monotonic()
            self._calibrate(unit, matrix)
            seconds = time.monotonic() - start
            self._spent += seconds
            self.seconds += seconds
        if any(reached):
            self._count()
            if self._ranks.world > 1:
                self._compare(unit)
        unit.calibrated(complete=id(unit) in self._complete)

    def _reached(self, unit: SubspaceUnit) -> list[bool]:
        """Return which of its asked matrices to calibrate.

        In a check all; in other windows those that got a gradient on any rank, so that a part of the model which gets
        none costs one small sum.
        """
        if self.due(unit.step):
            return [True] * len(unit.asked)
        if self._ranks.world == 1 and not unit.captured:
            return [False] * len(unit.asked)
        found = unit.reached()
        self._sum(found)
        return [count > 0 for count in found.tolist()]

    def _count(self) -> None:
        self.checks += not self._counted
        self._counted = True

    # -- one matrix ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _calibrate(self, unit: SubspaceUnit, matrix: Matrix) -> None:
        fitted, held = unit.gradients(matrix)
        self._sum(fitted)
        if held is not None:
            self._sum(held)
        verdict = self._decide(matrix, fitted, held) if self._ranks.rank == 0 else None
        self._share(matrix, verdict)
        if self._ranks.rank == 0:
            # of the summed gradient, so only once: ranks sum S later
            whole = fitted if held is None else fitted.add_(held)
            unit.add(matrix, compress(whole, matrix.left.projector, matrix.right.projector))

    def _decide(self, matrix: Matrix, g: Tensor, held: Tensor | None) -> tuple[bool, bool]:
        """Let the matrix have new projectors or keep them; returns which sides (left, right) changed."""
        config, fresh = self._config, g if held is None else held
        left, right = matrix.left, matrix.right
        before = bias_of(fresh, left.projector, right.projector)
        if not math.isfinite(before):
            self._overflow = True  # the step will be skipped, and the check comes again
        if before == 0.0:  # no gradient: nothing to measure or to fit
            self._decided.add(id(right))
            return False, False
        followed = left.before is not None or right.before is not None  # the side it shares has just changed
        matrix.bias = {"step": self._step, "before": before, "held_out": before}
        learned = config.projectors == "learned"
        if self._overflow or (learned and matrix.fitted and not followed and before <= config.refit_threshold):
            self._decided.add(id(right))  # its S is of this Q, so siblings that come later must not change it
            return False, False
        free = id(right) not in self._decided  # a right side that a sibling has decided on stays, and P is fitted to it
        deadline = time.monotonic() + config.fit_seconds - self._spent
        if learned and config.fit_seconds <= self._spent:
            self._warn_of_time(matrix)
            return False, False
        p, q = self._redrawn(left), self._redrawn(right) if free else right.projector
        if learned:
            found = fit(g, p, q, steps=config.fit_steps, lr=config.fit_lr, fix_q=not free, deadline=deadline)
            if found.timed_out:
                self._warn_of_time(matrix)
            after = bias_of(fresh, found.p, found.q)
            matrix.bias |= {"fit": found.bias, "held_out": min(after, before)}
            if not after < before:
                self._decided.add(id(right))
                return False, False
            p, q = found.p, found.q
        else:
            matrix.bias["held_out"] = bias_of(fresh, p, q)
        _switch(left, p)
        if free:
            _switch(right, q)
        self._decided.add(id(right))
        return True, free

    def _redrawn(self, side: Side) -> Projector:
        if self._step == 0:
            return side.projector  # drawn for this step when the unit was made
        current = side.projector
        return first_draw(self._config, side.name, current.m, current.dim, self._step, current.row_value.device)

    def _warn_of_time(self, matrix: Matrix) -> None:
        if not self._gave_up:
            _logger.warning(
                "fitting projectors reached subspace.fit_seconds = %g at %s; matrices left keep what they "
                "have, and this run cannot be repeated bit for bit. Raise fit_seconds or lower fit_steps",
                self._config.fit_seconds,
                matrix.name,
            )
            self._gave_up = True

    # -- ranks ---------------------------------------------------------------------------------------------------------

    def _sum(self, g: Tensor) -> None:
        if self._ranks.world > 1:
            dist.all_reduce(g, group=self._ranks.group)

    def _share(self, matrix: Matrix, verdict: tuple[bool, bool] | None) -> None:
        """Rank 0's verdict and values become everybody's. Positions are drawn by each rank itself."""
        if self._ranks.world == 1:
            return
        changed, matrix.bias, self._overflow = self._ranks.from_first(lambda: (verdict, matrix.bias, self._overflow))
        assert changed is not None, "the first rank has decided"
        for side, did in zip((matrix.left, matrix.right), changed, strict=True):
            if not did:
                continue
            if self._ranks.rank == 0:
                value = side.projector.row_value
            else:
                drawn = self._redrawn(side)
                value = torch.empty_like(drawn.row_value)
            dist.broadcast(value.view(torch.uint8), src=self._ranks.first, group=self._ranks.group)
            if self._ranks.rank != 0:
                _switch(side, drawn.holding(value))

    def _compare(self, unit: SubspaceUnit) -> None:
        mine = [side.projector.digest() for side in unit.sides]
        if any(theirs != mine for theirs in self._ranks.gather(mine)):
            raise RuntimeError(f"meft-ds: ranks disagree on the projectors of {unit.name}; resume from a checkpoint")


def _switch(side: Side, new: Projector) -> None:
    side.before = side.before or side.projector
    side.projector = new
