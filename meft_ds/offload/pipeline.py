# SPDX-License-Identifier: Apache-2.0
"""The pipeline: carries every unit through one optimizer step, knowing wire formats only by their contract.

One code path for all modes; they differ in where the stages run and in what an update waits for:

* `serial`: every stage in order in the caller. The reference that the others are tested against.
* `exact`: a unit's payload goes down as soon as backward is done with it. The step waits for all of them, takes one
  norm and one verdict, hands the host updates over in forward order and returns; a layer's forward waits only for its
  own update. Bit for bit the results of `serial`.
* `eager`: a unit's update starts as soon as its payload is down (docs/explanation/schedule.md says what that means
  for clipping and overflow).

Collectives run on lanes, each lane with process groups of its own, and in an order that is the same on every rank:
deepest unit first on the way down, and on the way up the order of the updates.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd import Variable

from meft_ds.offload.broken_windows import Windows
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.method import Method
from meft_ds.offload.model.gradient_checkpointing import inside_backward
from meft_ds.offload.ranks import LaneRanks, Ranks
from meft_ds.offload.schedule.eager import Mode, Tuner
from meft_ds.offload.schedule.lanes import Lanes, Progress, call_at_exit
from meft_ds.offload.schedule.timing import Timeline, WindowTimes
from meft_ds.offload.schedule.window import StepResult, StepSettings, UnitProgress, Window, agree, clip_factor
from meft_ds.offload.unit import Unit

_logger = logging.getLogger("meft_ds")
_PATIENCE_S = 10.0  # how long an exit waits for updates under way


class Pipeline(Windows):
    """Runs units through windows.

    Args:
        units: in layer order.
        bus: transfers and their counters.
        ranks: data-parallel ranks.
        settings: called when a window's first update needs them; may be set before the first window.
        mode: "serial", "exact", "eager" or "auto".
        lanes: made by the caller for tests; else threads, or in line for "serial".
        lane_ranks: needed with several ranks unless the lanes are in line.
        closes_window: whether the backward that now runs is the window's last; may be set like `settings`.
        at_start: by lane name, called on its thread before its first job.
        methods: whose units may calibrate.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        bus: Bus,
        ranks: Ranks,
        settings: Callable[[], StepSettings] | None = None,
        *,
        mode: Mode = "serial",
        lanes: Lanes | None = None,
        lane_ranks: LaneRanks | None = None,
        closes_window: Callable[[], bool] = lambda: True,
        at_start: dict[str, Callable[[], None]] | None = None,
        methods: Sequence[Method] = (),
    ) -> None:
        self.bus, self.ranks, self.methods = bus, ranks, methods
        self.overlaps = mode != "serial"
        self._mode, self.settings, self.closes_window = mode, settings, closes_window
        self._take_on(units)
        self._ranks_of = lane_ranks if lane_ranks is not None else LaneRanks.shared(ranks)
        self._progress = Progress()
        self._one_applies = threading.RLock()
        if lanes is None and not self.overlaps:
            lanes = Lanes.inline()
        elif lanes is None:
            lanes = Lanes.threads(_failing(weakref.ref(self)), at_start)
        self._lanes = self._progress.lanes = lanes
        self._cancel_exit = call_at_exit(self.finish_at_exit)

    def admit(self, units: Sequence[Unit]) -> None:
        """Carry more units from the next window on; only before the first update."""
        assert not any(entry.steps for entry in self._entries)
        self._take_on(sorted([*self.units, *units], key=lambda unit: (unit.layer, unit.name)))

    def _take_on(self, units: Sequence[Unit]) -> None:
        self.units = list(units)
        self._entries = [UnitProgress(unit, index) for index, unit in enumerate(self.units)]
        self._of = {id(entry.unit): entry for entry in self._entries}
        shallowest = min((unit.layer for unit in self.units), default=0)
        self.timeline = Timeline(self.bus, [unit.name for unit in self.units if unit.layer == shallowest])
        self.tuner = Tuner(self._mode, [unit.name for unit in self.units])
        self.bus.reserve({unit.name: unit.footprint().payload for unit in self.units})
        self._window = Window(self._send_order())
        for unit in self.units:
            unit.listener = self

    # -- what units report, on the thread that trains (or autograd's) --------------------------------------------------

    def gradient(self, unit: Unit) -> None:
        """Note that a gradient of `unit` is about to be added to the window.

        Raises:
            RuntimeError: when it was computed with weights that wait for their update, or comes after the update.
        """
        entry = self._of[id(unit)]
        if entry.pending or (entry.early and entry.sent):
            self._progress.check()
            raise RuntimeError(
                f"meft-ds: a gradient reached {unit.name} "
                + ("after its update had begun" if entry.early else "while an update of it was still to be applied")
                + '; the model uses its parameters outside their modules. Set meft_offload.schedule.mode to "serial"'
            )
        entry.late = entry.late or (entry.sent and not entry.again)
        self._window.collected = self._window.touched = True
        if not self._window.in_backward and inside_backward():
            self._window.in_backward = True
            Variable._execution_engine.queue_callback(self._backward_ended)

    def complete(self, unit: Unit) -> None:
        """Send `unit`'s payload down if this is the window's last backward, which is done with the unit."""
        entry = self._of[id(unit)]
        if not self.overlaps or (entry.sent and not entry.again) or not self.closes_window():
            return
        self._progress.check()
        entry.ready = True
        window = self._window
        while window.next_to_send < len(window.send_order) and window.send_order[window.next_to_send].ready:
            self._send(window.send_order[window.next_to_send])
            window.next_to_send += 1

    def _backward_ended(self) -> None:
        self._window.in_backward = False
        self.timeline.mark("backward_end")

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self) -> StepResult:
        """Take one optimizer step over all units.

        Any non-finite value in any payload skips the step for all units, in every precision (in `eager` mode: for the
        units that have one).

        Raises:
            ValueError: for hyperparameters that AdamW is not defined for; the window is as it was.
            RuntimeError: when a backward of the window, or the step that was to end it, has ended half way.
        """
        self.timeline.mark("step")
        self._progress.check()
        settings = self._settings_now()  # of all units, before anything is handed over
        self.check_whole()
        self.handed_over = False
        try:
            return self._step(settings)
        except BaseException as error:
            if self.handed_over:
                self.fail(error)
            else:
                self.broke(error, in_step=True)
            raise

    def _step(self, settings: StepSettings) -> StepResult:
        self._end_calibration()
        self._adopt_late_edits()
        self._send_the_rest()
        total = self._agreed_sq_norm()
        self.timeline.mark("verdict")
        self.handed_over = True
        finite = math.isfinite(total)
        grad_norm = math.sqrt(total) * settings.grad_scale if finite else math.inf
        scale = settings.grad_scale * clip_factor(settings.clip, grad_norm)
        if finite and self._calibrating:
            for method in self.methods:
                method.keep_calibration()
        written = self.bus.mark()  # edits of the program and moments for new projectors; payloads came before
        for entry in self._entries:
            if entry.early and entry.finite:
                continue
            if finite:
                self._update(entry, settings, scale, written)
            else:
                entry.unit.discard()
        if not self.overlaps:
            self.flush()
        self._hold()
        self.bus.enter()
        self.tuner.saw_norm(grad_norm)
        times = self.timeline.close_window()
        self.tuner.saw(times)
        for entry in self._entries:
            entry.open_window()
        self._window = Window(self._send_order())
        return StepResult(overflow=not finite, grad_norm=grad_norm, times=times)

    def flush(self) -> None:
        """Apply every update that is under way; afterwards weights and host state are those of the serial order.

        Raises:
            RuntimeError: inside an update, where only a signal handler can call it: it would be applied twice.
        """
        self._progress.check()
        with self._one_applies:
            self._refuse_inside_apply()
            for entry in self._entries:
                entry.exposed = True
                if entry.pending:
                    self._apply(entry)

    def close(self, *, exiting: bool = False) -> None:
        """Stop the lanes and stop listening to the model. Updates under way are applied unless a lane has failed.

        `exiting`: leave connections to the end of the process, because peers may still need them.
        """
        usable = not (self._progress.failure or self._progress.torn or self._lanes.closed)
        try:
            if usable:
                self.flush()
        finally:
            self._cancel_exit()
            self._lanes.close()
            for unit in self.units:
                unit.unhold()
                unit.release()
                unit.listener = None
            if usable and not exiting:
                self._ranks_of.close()
                self._ranks_of = LaneRanks.shared(self.ranks)  # who refers to a group keeps its threads

    def finish_at_exit(self) -> None:
        """Let what is under way end before the interpreter takes tensors away, but do not wait for dead peers."""
        self._progress.give_up_in(_PATIENCE_S)
        try:
            self.close(exiting=True)
        except RuntimeError as error:
            _logger.warning("%s", error)

    @property
    def window_begun(self) -> bool:
        """Whether the open window has seen a forward that may train."""
        return self._window.begun

    def begin_forward(self, *, training: bool) -> None:
        """Prepare for a forward: leave nothing under way to an evaluation or a window that calibrates.

        `training`: whether gradients may come of it. May be called several times in one forward.
        """
        self._progress.check()
        if self.is_broken:
            self.drop_alone()
        if training:
            with torch._C.DisableTorchFunctionSubclass():  # whether a gradient is there does not wait for an update
                for unit in self.units:
                    unit.clear_gradients()
        begins = training and not self._window.begun
        calibrates = [method.calibrates(self._steps) for method in self.methods] if begins else []
        if not training or any(at_rest for _, at_rest in calibrates):
            self.flush()
        self._begin_calibration([self._of[id(unit)] for units, _ in calibrates for unit in units])
        if begins:
            self._window.begun = True  # last, or an interrupt would leave it half begun

    def publish(self) -> None:
        """Show the model host state that was just loaded. Collective; nothing may be under way."""
        for unit in self.units:
            unit.fetch(self.bus, self._ranks_of.up)
            unit.apply()

    def pass_over(self) -> WindowTimes:
        """End a window that was only watched: nothing is updated."""
        self.timeline.mark("step")
        self.give_up_window()
        return self.timeline.close_window()

    def state(self) -> dict[str, Any]:
        """Return what resuming needs beside the units' own state, as JSON."""
        return {"steps": self._steps, "tuner": self.tuner.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        for entry in self._entries:
            entry.steps = int(state["steps"][entry.unit.name])
        self.tuner.load_state(state["tuner"])

    # -- the way down --------------------------------------------------------------------------------------------------

    def _send_the_rest(self) -> None:
        for entry in self._entries:
            if entry.pending and not entry.early:
                self._apply(entry)  # no forward asked for it in the whole window
        for entry in self._window.send_order[self._window.next_to_send :]:
            self._send(entry)
        self._window.next_to_send = len(self._entries)

    def _adopt_late_edits(self) -> None:
        """Adopt what the program has written into weights after their payload left."""
        for entry in self._entries:
            if not entry.sent or entry.versions == entry.unit.versions():
                continue
            if entry.early:
                raise RuntimeError(
                    f"meft-ds: the program wrote into the weights of {entry.unit.name} after backward and before "
                    "engine.step(), when their update had begun. Write them after step(), or set "
                    'meft_offload.schedule.mode to "exact"'
                )
            entry.unit.adopt()

    def _send(self, entry: UnitProgress) -> None:
        early = self.tuner.eager_now and entry.reliable and not entry.calibrates
        versions = entry.unit.versions()
        if versions and (entry.exposed or versions != entry.versions):
            entry.unit.adopt()
        entry.exposed, entry.versions = False, versions
        if early:
            self._settings_now()
            if not self._window.update_order:
                self._window.update_order = [self._entries[i] for i in self.tuner.order()]
        self._window.sending = True
        entry.sent, entry.measured, entry.late, entry.again, entry.early = True, False, False, False, early
        with self.timeline.span("main", "collect", entry.unit.name):
            entry.unit.collect()
        self._lanes.down.submit(partial(self._down_job, entry, self.bus.mark(), self.bus.of_window()))
        self._window.sending = False

    def _down_job(self, entry: UnitProgress, after: Any, bus: Bus) -> None:
        unit = entry.unit
        with self.timeline.span("down", "send", unit.name, on=bus.lane("down", after)):
            unit.reduce(self._ranks_of.down)
            unit.send(bus)
        # norms go first: the verdict over all units waits for them
        self._lanes.host.submit(partial(self._norm_job, entry), urgent=True)

    def _norm_job(self, entry: UnitProgress) -> None:
        with self.timeline.span("host", "norm", entry.unit.name):
            entry.sq_norm = entry.unit.sq_norm()
        if entry.early:
            (total,) = self._ranks_of.host.sum([entry.sq_norm], self.bus.device)
            entry.finite, entry.decided = math.isfinite(total), True
            self._update_early()  # before the step may hand over any other update: the order must be every rank's
        self._progress.tell(entry, "measured")

    def _agreed_sq_norm(self) -> float:
        """Return the sum of squares over all units and ranks, once all ranks know that nothing came late."""
        while True:
            with self.timeline.span("main", "norm"):
                self._progress.wait_for(self._entries, "measured")
                total, late = agree(self._entries, self.tuner, self.bus.device, self._ranks_of.down)
            if not late:
                return total
            for entry in reversed(late):  # deepest first
                self._send(entry)

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _settings_now(self) -> StepSettings:
        """Taken once per window, so that an early update and a late one use the same."""
        if self._window.settings is None:
            assert self.settings is not None, "whoever drives the pipeline sets them"
            self._window.settings = self.settings()
        return self._window.settings


def _failing(pipeline: weakref.ref[Pipeline]) -> Callable[[BaseException], None]:
    # weak, or the lanes' threads would keep the pipeline and all its memory alive
    def on_error(error: BaseException) -> None:
        if (alive := pipeline()) is not None:
            alive._progress.fail(error)

    return on_error
