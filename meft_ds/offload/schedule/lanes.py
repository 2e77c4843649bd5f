# SPDX-License-Identifier: Apache-2.0
"""Lanes: where the stages of a step run. A lane is one thread that runs one job at a time, or, for the serial order,
the caller itself.

The threads are daemons that an exit handler stops: a job that is stuck in a collective whose peer has died must not
keep the process alive, and a job that is not stuck is finished first.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from meft_ds.offload.schedule.window import Reached, UnitProgress

_PATIENCE_S = 5.0  # how long an exit waits for the job that a lane is running

Job = Callable[[], None]


class Lane(Protocol):
    """Runs jobs one at a time, in the order they were submitted; urgent ones before all others that wait."""

    def submit(self, job: Job, *, urgent: bool = False) -> None:
        """Hand over a job."""

    def close(self) -> None:
        """Finish the running job, drop those that wait."""


class InlineLane:
    """Runs a job at once in the caller; what it raises reaches the caller."""

    def submit(self, job: Job, *, urgent: bool = False) -> None:
        job()

    def close(self) -> None:
        pass


class ThreadLane:
    """One worker thread.

    Args:
        name: of the thread.
        on_error: called on the worker with what a job raised; the worker then drops every later job.
        at_start: called on the worker before its first job.
    """

    def __init__(
        self, name: str, on_error: Callable[[BaseException], None], at_start: Callable[[], None] | None = None
    ) -> None:
        self.name = name
        self._queue = _Queue()
        started = threading.Event()
        self._thread = threading.Thread(
            target=_work, args=(self._queue, started, on_error, at_start), name=f"meft-{name}", daemon=True
        )
        self._thread.start()
        started.wait()
        self._stop = weakref.finalize(self, _stop, self._queue, self._thread)

    @property
    def closed(self) -> bool:
        return self._queue.closed

    def submit(self, job: Job, *, urgent: bool = False) -> None:
        self._queue.put(job, urgent=urgent)

    def close(self) -> None:
        self._stop()


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """The three lanes of a pipeline: payloads down, updates on the host, replies up."""

    down: Lane
    host: Lane
    up: Lane

    @classmethod
    def inline(cls) -> Lanes:
        """Everything in order in the caller: the serial schedule."""
        lane = InlineLane()
        return cls(down=lane, host=lane, up=lane)

    @classmethod
    def threads(
        cls, on_error: Callable[[BaseException], None], at_start: dict[str, Callable[[], None]] | None = None
    ) -> Lanes:
        """Make lanes of one thread each; `at_start` by lane name."""
        starts = at_start or {}
        return cls(**{name: ThreadLane(name, on_error, starts.get(name)) for name in ("down", "host", "up")})

    @property
    def closed(self) -> bool:
        """Whether a lane was stopped, so that what was handed over may never run."""
        return any(getattr(lane, "closed", False) for lane in (self.down, self.host, self.up))

    def behind(self, *, updates: bool) -> Iterator[threading.Event]:
        """Yield events to wait for one after another.

        Then all payloads that were handed over before are done and, if `updates`, all updates.
        """
        ways = [(self.down, False), (self.host, True)]  # in the order in which jobs go from one to the next
        if updates:
            ways += [(self.host, False), (self.up, False)]
        for lane, urgent in ways:
            done = threading.Event()
            lane.submit(done.set, urgent=urgent)
            yield done

    def close(self) -> None:
        """Stop all three."""
        for lane in (self.down, self.host, self.up):
            lane.close()


class _Queue:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._urgent: deque[Job] = deque()
        self._normal: deque[Job] = deque()
        self.closed = False

    def put(self, job: Job, *, urgent: bool) -> None:
        with self._changed:
            if not self.closed:
                (self._urgent if urgent else self._normal).append(job)
                self._changed.notify()

    def take(self) -> Job | None:
        with self._changed:
            while not (self.closed or self._urgent or self._normal):
                self._changed.wait()
            if self.closed:
                return None
            return (self._urgent or self._normal).popleft()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._urgent.clear()
            self._normal.clear()
            self._changed.notify_all()


def _work(
    queue: _Queue,
    started: threading.Event,
    on_error: Callable[[BaseException], None],
    at_start: Callable[[], None] | None,
) -> None:
    try:
        if at_start is not None:
            at_start()
    except BaseException as error:
        queue.close()
        on_error(error)
    finally:
        started.set()
    with torch.no_grad():
        while (job := queue.take()) is not None:
            try:
                job()
            except BaseException as error:  # whatever it is, the thread that trains must learn of it
                queue.close()
                on_error(error)
            job = None  # do not hold the last job's tensors while waiting


def _stop(queue: _Queue, thread: threading.Thread) -> None:
    queue.close()
    if thread is not threading.current_thread():
        thread.join(_PATIENCE_S)


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

    def tell(self, entry: UnitProgress, what: Reached) -> None:
        """Set `entry`'s field `what`; called on a lane."""
        with self._changed:
            setattr(entry, what, True)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Keep the error that ended a lane's job, for the training thread's next call; called on a lane."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def give_up_in(self, seconds: float) -> None:
        """Let waits end with an error from then on."""
        self._deadline = time.monotonic() + seconds

    def wait_for(self, entries: Sequence[UnitProgress], what: Reached) -> None:
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


def call_at_exit(method: Callable[[], None]) -> Callable[[], None]:
    """Call a bound method when the interpreter exits, if its object still lives then; returns what cancels that.

    The newest call comes first, and before whatever was to end at exit already: register after what the method needs
    (lanes, writers) was made.
    """
    found = weakref.WeakMethod(method)

    def call() -> None:
        if (alive := found()) is not None:
            alive()

    atexit.register(call)
    return partial(atexit.unregister, call)
