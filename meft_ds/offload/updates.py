# SPDX-License-Identifier: Apache-2.0
"""The way of updates through a pipeline: handed to the host, fetched, and applied before anybody reads a weight."""

from __future__ import annotations

import threading
import weakref
from abc import abstractmethod
from functools import partial
from typing import Any

import torch

from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.model.gradient_checkpointing import inside_backward
from meft_ds.offload.ranks import LaneRanks
from meft_ds.offload.schedule.eager import Tuner
from meft_ds.offload.schedule.lanes import Lanes, Progress
from meft_ds.offload.schedule.timing import Timeline
from meft_ds.offload.schedule.window import StepSettings, UnitProgress, Window, clip_factor
from meft_ds.offload.unit import Unit
from meft_ds.ops.adam import AdamHyper


class Updates:
    """The part of a pipeline that carries updates.

    Attributes:
        applying: an update is being waited for or put into the weights.
    """

    bus: Bus
    timeline: Timeline
    tuner: Tuner
    applying = False

    _entries: list[UnitProgress]
    _of: dict[int, UnitProgress]
    _window: Window
    _progress: Progress
    _lanes: Lanes
    _ranks_of: LaneRanks
    _one_applies: threading.RLock  # the thread that trains, or one that touched a weight

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Refuse everything until a checkpoint has been loaded: state is that of no step."""

    @abstractmethod
    def _settings_now(self) -> StepSettings:
        """Return what the user has set, taken once per window."""

    # -- asked for by whoever reads weights ----------------------------------------------------------------------------

    def needed(self, unit: Unit) -> None:
        """Wait for `unit`'s update, if one is under way, and apply it: its weights are about to be read.

        Does nothing when backward runs a forward again (gradient checkpointing): that must see what the first saw.
        """
        entry = self._of[id(unit)]
        if entry.pending and not inside_backward():
            self._apply(entry)

    def touched(self, unit: Unit) -> None:
        """Apply the update that is under way: the program itself is about to read or write `unit`'s parameters.

        Raises:
            RuntimeError: inside an update, where only a signal handler can touch them.
        """
        entry = self._of[id(unit)]
        entry.exposed = True
        with self._one_applies:
            self._refuse_inside_apply()
            if entry.pending:
                self._apply(entry)
            else:
                unit.unhold()

    def _hold(self) -> None:
        """Let whatever touches the parameters of updates under way wait for them."""
        for entry in self._entries:
            if entry.pending:
                entry.unit.hold(partial(_touched, weakref.ref(self), weakref.ref(entry.unit)))

    # -- stages --------------------------------------------------------------------------------------------------------

    def _update(self, entry: UnitProgress, settings: StepSettings, scale: float, after: Any = None) -> None:
        """Hand over an update. Where the state is on the device, it waits for what was written there before `after`."""
        hyper = settings.hyper_of(entry.unit)
        entry.pending, entry.updated = True, False
        entry.steps += 1
        self._lanes.host.submit(partial(self._host_job, entry, hyper, entry.steps, scale, after, self.bus.of_window()))

    def _host_job(self, entry: UnitProgress, hyper: AdamHyper, step: int, scale: float, after: Any, bus: Bus) -> None:
        with self.timeline.span("host", "update", entry.unit.name):
            entry.unit.host_step(hyper, step=step, grad_scale=scale)
        self._lanes.up.submit(partial(self._up_job, entry, after, bus))

    def _up_job(self, entry: UnitProgress, after: Any, bus: Bus) -> None:
        with self.timeline.span("up", "fetch", entry.unit.name, on=bus.lane("up", after)):
            entry.unit.fetch(bus, self._ranks_of.up)
            entry.up_mark = bus.mark()
        self._progress.tell(entry, "updated")

    def _update_early(self) -> None:
        """Hand over the updates whose turn it is; runs on the host lane only."""
        settings, order = self._settings_now(), self._window.update_order
        while self._window.next_to_update < len(order):
            entry = order[self._window.next_to_update]
            if entry.reliable and not entry.calibrates and not entry.decided:
                return
            self._window.next_to_update += 1
            if entry.early and entry.finite:
                norm = self.tuner.last_norm
                assert norm is not None
                self._update(entry, settings, settings.grad_scale * clip_factor(settings.clip, norm))

    def _apply(self, entry: UnitProgress) -> None:
        with self._one_applies:
            self.applying = True
            try:
                if not entry.pending:  # another thread or a signal handler came in between
                    return
                with self.bus.training():
                    if not entry.updated:
                        with self.timeline.stall(entry.unit.name):
                            self._progress.wait_for([entry], "updated")
                    with self.timeline.span("main", "apply", entry.unit.name):
                        self.bus.wait(entry.up_mark)
                        try:
                            with torch._C.DisableTorchFunctionSubclass():  # parameters still wait, for other threads
                                entry.unit.apply()
                            entry.pending = entry.updated = False
                            entry.versions = entry.unit.versions()
                            entry.unit.unhold()
                        except BaseException as error:  # an interrupt too: half of the update may be in the weights
                            self.fail(error)
                            raise
            finally:
                self.applying = False

    def _refuse_inside_apply(self) -> None:
        """Another thread waits for the lock, so only a signal handler on this one comes here inside an update."""
        if self.applying:
            raise RuntimeError(
                "meft-ds: weights or state were asked for while an update was being applied, from a signal handler "
                "perhaps. Let the handler set a flag, and do this after engine.step() has returned"
            )


def _touched(pipeline: weakref.ref[Updates], unit: weakref.ref[Unit]) -> None:
    # weak: a model that outlives its engine must not keep the engine's memory alive
    found = unit()
    if found is None:
        return
    if (alive := pipeline()) is not None:
        alive.touched(found)
    else:
        found.unhold()
