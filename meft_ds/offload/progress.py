# SPDX-License-Identifier: Apache-2.0
"""How the thread that trains learns from the lanes: what is done, and that one of them has failed."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence

from meft_ds.offload.lanes import Lanes
from meft_ds.offload.window import Entry

_LOOK_S = 1.0  # how often a wait looks whether there is still somebody to wait for


class Progress:
    """Fields of entries that lanes set, and the first error of a lane.

    Attributes:
        lanes: that are waited for; None before they are there, when they can fail already.
        failure: of the lane that failed first, for good.
        torn: what left weights or state half changed on the thread that trains; loading a checkpoint mends it.
    """

    def __init__(self) -> None:
        self.lanes: Lanes | None = None
        self._changed = threading.Condition()
        self._deadline = math.inf
        self.failure: BaseException | None = None
        self.torn: BaseException | None = None

    def tell(self, entry: Entry, what: str) -> None:
        """Called on a lane: set `entry`'s field `what`."""
        with self._changed:
            setattr(entry, what, True)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Called on a lane: the thread that trains learns of it at its next call."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def give_up_in(self, seconds: float) -> None:
        """Let waits end with an error from then on."""
        self._deadline = time.monotonic() + seconds

    def wait_for(self, entries: Sequence[Entry], what: str) -> None:
        """Return once the field `what` of all of them is set.

        Raises:
            RuntimeError: when a lane has failed or there are none, or after the time that `give_up_in` set.
        """
        with self._changed:
            while not (self.failure or self.torn or all(getattr(entry, what) for entry in entries)):
                if self.lanes is not None and self.lanes.closed:
                    raise RuntimeError("meft-ds: the engine was taken down while an update was under way")
                if not self._changed.wait(_LOOK_S) and time.monotonic() > self._deadline:
                    raise RuntimeError("meft-ds: the program ends, but an update under way does not")
        self.check()

    def wait_for_lanes(self, *, updates: bool, patience: float = math.inf) -> None:
        """Return once the lanes have done what they were given: payloads and, if `updates`, those and all replies.

        Raises:
            RuntimeError: when a lane has failed, or is not done after `patience` seconds.
        """
        assert self.lanes is not None
        deadline = time.monotonic() + patience
        for done in self.lanes.behind(updates=updates):
            while not done.wait(_LOOK_S) and not self.lanes.closed:
                if time.monotonic() > min(deadline, self._deadline):
                    raise RuntimeError(
                        "meft-ds: what is under way does not end, because ranks were interrupted at different places; "
                        "end all of them and resume from the last checkpoint"
                    )
        self.check_lanes()

    def check(self) -> None:
        """Raise what a lane failed with, or what left things torn, as a RuntimeError that says what to do."""
        if self.torn is not None:
            raise RuntimeError(
                f"meft-ds: an update ended half way ({type(self.torn).__name__}: {self.torn}), and weights and state "
                "are those of no step; resume from the last checkpoint"
            ) from self.torn
        self.check_lanes()

    def check_lanes(self) -> None:
        """Raise what a lane failed with, for good."""
        if self.failure is not None:
            raise RuntimeError(
                f"meft-ds: a worker failed ({type(self.failure).__name__}: {self.failure}); "
                "resume from the last checkpoint"
            ) from self.failure
