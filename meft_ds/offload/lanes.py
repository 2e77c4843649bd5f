# SPDX-License-Identifier: Apache-2.0
"""Lanes: where the stages of a step run. A lane is one thread that runs one job at a time, or, for the serial order,
the caller itself.

The threads are daemons that an exit handler stops: a job that is stuck in a collective whose peer has died must not
keep the process alive, and a job that is not stuck is finished first.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

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
        """One thread each; `at_start` by lane name."""
        starts = at_start or {}
        return cls(**{name: ThreadLane(name, on_error, starts.get(name)) for name in ("down", "host", "up")})

    @property
    def closed(self) -> bool:
        """Whether a lane was stopped, so that what was handed over may never run."""
        return any(getattr(lane, "closed", False) for lane in (self.down, self.host, self.up))

    def behind(self, *, updates: bool) -> Iterator[threading.Event]:
        """Events to wait for one after another: then all payloads that were handed over before are done and, if
        `updates`, all updates."""
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
