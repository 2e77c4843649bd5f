# SPDX-License-Identifier: Apache-2.0
"""Windows that end in no step: dropped by the program, broken by an exception, or given up for other state.

An exception leaves one of three things. Before a step has handed anything over, a *broken* window: what it collected is
forgotten, by itself if nobody asks, and training goes on. After it, a *torn* state, that of no step: everything refuses
until a checkpoint has been loaded. A lane that failed is the end.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence

from meft_ds.offload.method import Method
from meft_ds.offload.model.gradient_checkpointing import inside_backward
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.eager import Mode, Tuner
from meft_ds.offload.schedule.window import Forgotten, UnitProgress, Window
from meft_ds.offload.unit import Unit
from meft_ds.offload.updates import Updates

_OUT_OF_STEP_S = 60.0  # how long a load waits for other ranks' part in what is under way


class Windows(Updates):
    """The part of a pipeline that opens windows.

    Attributes:
        handed_over: what a step changes has begun to change, so that an exception leaves it half done.
    """

    units: list[Unit]
    methods: Sequence[Method]
    ranks: Ranks
    handed_over = False

    _mode: Mode
    _broken: BaseException | None = None  # what ended a backward or a step whose window is to be forgotten

    @abstractmethod
    def flush(self) -> None:
        """Apply every update that is under way."""

    @abstractmethod
    def _send_the_rest(self) -> None:
        """Send the payloads of the open window that have not been sent."""

    @property
    def has_begun(self) -> bool:
        """Whether updates of the open window may be under way already, ahead of its step."""
        return any(entry.early and entry.sent for entry in self._entries)

    def give_up_window(self) -> None:
        """Drop what the open window has collected so far: the units are about to become others."""
        self._progress.wait_for([entry for entry in self._entries if entry.sent], "measured")
        self.flush()
        self._reopen(begun=False)

    def _reopen(self, *, begun: bool) -> None:
        calibrating = self._calibrating if begun else []
        for entry in self._entries:
            if not entry.pending:  # else it has collected nothing, and its update is under way
                entry.unit.discard()
            entry.open_window()
        self._window = Window(self._send_order(), begun=begun)
        self._begin_calibration(calibrating)

    def drop(self) -> None:
        """Forget what the open window has collected, payloads that have been sent included; updates of earlier windows
        stay under way. Where nothing was collected, nothing is done. Every rank calls it, wherever its backward is.

        Raises:
            RuntimeError: when updates of this window have begun (eager); nothing has been done then.
        """
        window, alone = self._window, self.ranks.world == 1
        calibrating = self._calibrating
        # other ranks may be in the middle of a calibration, which takes all
        if not (window.collected or self.is_broken or (calibrating and not alone)):
            return
        if self.has_begun:
            raise RuntimeError(
                "meft-ds: updates of this window have begun, as they do in the eager schedule, and what it collected "
                'can no longer be forgotten; load a checkpoint, or set meft_offload.schedule.mode to "exact"'
            )
        begun, why = window.begun and self._broken is None, self._broken
        self._broken = why or Forgotten()  # if this is interrupted, the next call goes on
        if alone:
            self._progress.wait_for_lanes(updates=False)
            self._reopen(begun=begun)
            self._window.forgotten = why
        else:
            # payloads are collectives: every rank sends all of a window's once, and then anew what was forgotten
            self._end_calibration()
            for entry in self._entries:
                if not entry.pending:
                    entry.unit.forget()
                entry.again, entry.ready = entry.sent, False
            self._begin_calibration(calibrating)
            window.collected = window.in_backward = False
        self._broken = None

    @property
    def is_broken(self) -> bool:
        """Whether the open window holds half a backward, or a step that ended before it had handed anything over."""
        # a backward that ended well has taken its mark back
        amid = self._window.in_backward and not inside_backward()
        return amid or self._broken is not None

    def check_whole(self) -> None:
        """Raise where a step would end a window that an exception has emptied."""
        why = self._broken or (None if self._window.collected else self._window.forgotten)
        if why is not None or self.is_broken:
            raise RuntimeError(
                "meft-ds: a backward or a step ended half way, and what its window had collected is forgotten; run "
                "forward and backward again before engine.step()"
            ) from why

    def broke(self, error: BaseException, *, in_step: bool = False) -> None:
        """Note that a backward, or a step that has handed nothing over, ended with `error`: its window goes."""
        if self.has_begun or (self.ranks.world > 1 and (in_step or self._window.sending)):
            self.fail(error)  # half of it is in the weights, or the ranks are out of step
        else:
            self._broken = self._broken or error

    def backward_begins(self) -> None:
        """Note that what comes next is one backward's."""
        self._window.touched = False

    def backward_failed(self, error: BaseException) -> bool:
        """Forget the window of a backward that ended with `error`; return whether anything was forgotten.

        What the backward added cannot be told from the rest of its window.
        """
        if not self._window.touched:
            return False
        self.broke(error)
        if self._progress.torn is not None or not self._drops_alone:
            return False
        self.drop()
        return True

    def drop_alone(self) -> None:
        """Forget a broken window of which other ranks may know nothing.

        Raises:
            RuntimeError: where that takes them.
        """
        if not self._drops_alone:
            raise RuntimeError(
                "meft-ds: a backward ended half way while ranks fitted projectors together; let all ranks call "
                "engine.zero_grad(), or resume from the last checkpoint"
            ) from self._broken
        self.drop()

    @property
    def _drops_alone(self) -> bool:
        return self.ranks.world == 1 or not self._calibrating

    @property
    def _calibrating(self) -> list[UnitProgress]:
        return [entry for entry in self._entries if entry.calibrates]

    @property
    def _steps(self) -> dict[str, int]:
        return {entry.unit.name: entry.steps for entry in self._entries}

    def _begin_calibration(self, entries: Sequence[UnitProgress]) -> None:
        for entry in entries:
            entry.calibrates = True
        if entries:
            for method in self.methods:
                method.begin_calibration(self._steps)

    def _end_calibration(self) -> None:
        calibrating = self._calibrating
        for entry in calibrating:
            if entry.pending:
                self._apply(entry)  # by what it was encoded with, which a calibration may change
        if calibrating:
            for method in self.methods:
                method.end_calibration()

    def rest(self) -> None:
        """End what is under way before other state is loaded. Every rank calls it.

        Raises:
            RuntimeError: when a lane has failed, or ranks wait for each other.
        """
        self._progress.check_lanes()
        self._progress.wait_for_lanes(updates=True, patience=_OUT_OF_STEP_S)
        if self._progress.torn is not None:
            return
        if self.ranks.world > 1:  # ranks may have sent different parts of the window
            self._end_calibration()
            self._send_the_rest()
            self._progress.wait_for_lanes(updates=True, patience=_OUT_OF_STEP_S)
        self.flush()

    @contextlib.contextmanager
    def replaced(self, *, whole: bool) -> Iterator[None]:
        """Inside, other state is loaded into the model and the units, after `rest`; nothing of what was is left.

        `whole`: all of the state, so that it does not matter whether the one before was torn.
        """
        torn, self._progress.torn = self._progress.torn, None
        for entry in self._entries:
            entry.pending = entry.updated = False
            entry.unit.unhold()
            entry.reliable = entry.reliable or whole
        if whole:
            self.tuner = Tuner(self._mode, [unit.name for unit in self.units])
        self.handed_over, self._broken = False, None
        self._reopen(begun=False)
        try:
            yield
        except BaseException as error:
            if torn is not None or not isinstance(error, Exception):
                self.fail(torn or error)
            raise
        if torn is not None and not whole:
            self.fail(torn)

    def fail(self, error: BaseException) -> None:
        """Refuse to train or save until a checkpoint is loaded: `error` left weights or state half changed."""
        self._progress.torn = self._progress.torn or error

    def _send_order(self) -> list[UnitProgress]:
        """Deepest first; units that backward does not always finish come last, or the others would wait for them."""
        return sorted(self._entries, key=lambda entry: (not entry.reliable, -entry.index))
