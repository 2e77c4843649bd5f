# SPDX-License-Identifier: Apache-2.0
"""`Runtime`: what one engine runs. `meft_ds.plugin.build` makes it; the engine's overrides work with it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from meft_ds.offload import update_gates
from meft_ds.offload.method import Method, Run
from meft_ds.offload.model.gradient_checkpointing import inside_backward
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.schedule.window import StepResult
from meft_ds.offload.unit import Unit
from meft_ds.plugin import full_params
from meft_ds.plugin.replaced import Places
from meft_ds.plugin.telemetry import Plan, Telemetry
from meft_ds.plugin.zero3 import PartitionedWeights, guard_gathers

_log = logging.getLogger("meft_ds")


class Runtime:
    """The methods of a block at work on a model.

    Attributes:
        run: what was settled on before anything was built.
        methods: of the block, prepared.
        plan: what the run holds and moves at most.
        pipeline: carries the units.
        telemetry: measures windows.
        closing: whether the open window's last backward has come.
        busy_with: what has begun and has not ended, such as "a step"; None if nothing has.
    """

    def __init__(
        self, *, run: Run, methods: Sequence[Method], plan: Plan, pipeline: Pipeline, telemetry: Telemetry
    ) -> None:
        self.run, self.methods, self.plan = run, methods, plan
        self.pipeline, self.telemetry = pipeline, telemetry
        self.closing = False
        self.busy_with: str | None = None
        self._gates: list[Any] = []
        self._told = ""  # the last warning that nothing was trained
        self._guard()
        full_params.attach(run.model, pipeline)

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank, which logs."""
        return self.run.ranks.rank == 0

    def release(self) -> None:
        """Take everything out of the model that listens to it. May be called several times."""
        while self._gates:
            self._gates.pop().remove()
        full_params.detach(self.run.model)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def check_places(self) -> None:
        """Raise ValueError when the program has replaced a parameter that trains."""
        self._places.check()

    def begin_step(self) -> bool | None:
        """Begin a step. Return None when it trains; where methods only watch, whether its window counts. Collective."""
        self.check_places()
        # modules whose backward did not end in a hook still hold their weights, and slices are about to change
        self.run.weights.partition_again()
        watching = [method for method in self.methods if method.observing]
        # what they have seen is about to change in a step that trains nothing
        self.pipeline.handed_over = bool(watching)
        return None if not watching else all([method.end_observed_window() for method in watching])

    def end_step(self, result: StepResult, *, samples: int, loss_factor: float) -> None:
        """Note what the step did, let methods that have seen enough begin to train, and open the next window.

        Args:
            result: of the pipeline.
            samples: trained on before this step.
            loss_factor: as in `open_window`.
        """
        self.telemetry.close_window(result, samples)
        for method in self.methods:
            if method.observing and (units := method.observed(self.run)) is not None:
                self.admit(method, units)
        self.open_window(loss_factor)

    def open_window(self, loss_factor: float) -> None:
        """Begin an accumulation window, whose losses are multiplied by `loss_factor` before their backward."""
        self.closing = False
        for method in self.methods:
            method.end_window(loss_factor)

    def forget_window(self) -> None:
        """Drop what the open window has collected."""
        self.pipeline.drop()
        for method in self.methods:
            method.forget_window()
        self.closing = False

    def backward_failed(self, error: BaseException) -> None:
        """Forget the window in which a backward ended with `error`: what that added cannot be told from the rest."""
        forgot = self.pipeline.backward_failed(error)
        for p in self.run.model.parameters():
            p.grad = None  # of hooks that never ran
        for method in self.methods:
            method.forget_window()
        self.run.weights.partition_again()
        if forgot:
            _log.warning(
                "a backward ended half way (%s: %s); what its accumulation window had collected is forgotten",
                type(error).__name__,
                error,
            )

    def admit(self, method: Method, units: list[Unit]) -> None:
        """Let `method`, which has only watched so far, train with `units` from the next window on."""
        self.pipeline.give_up_window()
        self.pipeline.admit(units)
        self._guard()
        if self.is_first:
            _log.info("%s; training begins", method.summary())

    def flush(self, samples: int) -> None:
        """Apply the updates that are still under way. `samples` were trained on so far."""
        self.pipeline.flush()
        self.telemetry.write(samples)

    # -- what must not be interrupted ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def busy(self, what: str, *, refuses: str = "") -> Iterator[None]:
        """Inside, weights and state are those of no step, and a signal handler may come into the middle.

        Raises:
            RuntimeError: with `refuses`, the name of what is called, when this is such a handler's own call.
        """
        if refuses:
            self.refuse_inside_step(refuses)
        before, self.busy_with = self.busy_with, what
        try:
            yield
        finally:
            self.busy_with = before

    def refuse_inside_step(self, what: str) -> None:
        """Raise RuntimeError if something has begun and not ended, because `what` would save a state of no step."""
        doing = self.busy_with
        if doing is None and (
            self.pipeline.has_begun
            or self.pipeline.applying
            or inside_backward()
            or update_gates.inside_forward(self.run.model)
        ):
            doing = "a step"
        if doing is not None:
            raise RuntimeError(
                f"meft-ds: {what} was called in the middle of {doing}, from a signal handler perhaps. Let the handler "
                "set a flag, and save after engine.step() has returned"
            )

    # -- nothing to save -----------------------------------------------------------------------------------------------

    def warn_untrained(self, applied_steps: int, *, at_end: bool = False) -> None:
        """Warn whoever saves the model, or ends, while methods have only watched: once at a save, and once at the end.

        `applied_steps` is how many steps have updated something.
        """
        if not self.is_first or self.telemetry.steps == 0 or (self._told and not at_end):
            return
        for method in self.methods:
            why = method.untrained(applied_steps)
            if why and why != self._told:
                _log.warning(why)
                self._told = why

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _guard(self) -> None:
        """Let no forward read what is being updated, and notice parameters that are replaced."""
        while self._gates:
            self._gates.pop().remove()
        model, weights, units = self.run.model, self.run.weights, self.pipeline.units
        if isinstance(weights, PartitionedWeights):
            self._gates += guard_gathers(model, units, self.pipeline, weights)
        self._gates += update_gates.install(model, units, self.pipeline)
        self._places = Places(model, units)
