# SPDX-License-Identifier: Apache-2.0
"""Times on an accelerator, whose streams have a clock of their own: a made-up device, and a made-up host clock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.schedule import timing
from meft_ds.offload.schedule.eager import Tuner
from meft_ds.offload.schedule.timing import Timeline


class Machine:
    """A host at time `now`, and streams that are busy until some time. Stands in for a device's module of torch."""

    def __init__(self, *, blocking: bool = True) -> None:
        self.now = 0.0
        self.asked: list[bool] = []  # of events that a lane waits for: whether the thread sleeps
        machine = self

        class Stream:
            def __init__(self, device: torch.device | None = None) -> None:
                self.until = 0.0

            def wait_event(self, event: Event) -> None:
                self.until = max(self.until, event.at)

        class Event:
            def __init__(self, *, enable_timing: bool = False, **options: bool) -> None:
                if options and not blocking:
                    raise TypeError("unexpected keyword")
                machine.asked.append(options.get("blocking", False))
                self.timed = enable_timing

            def record(self, stream: Stream) -> None:
                self.at = stream.until = max(stream.until, machine.now)

            def synchronize(self) -> None:
                machine.now = max(machine.now, self.at)

            def elapsed_time(self, end: Event) -> float:
                assert self.timed and end.timed
                assert end.at <= machine.now, "nobody waited for it"
                return (end.at - self.at) * 1e3

        self.Stream, self.Event = Stream, Event
        self._current = Stream()

    def current_stream(self, device: torch.device | None = None) -> Any:
        return self._current

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    def work(self, seconds: float) -> None:
        """Queue work on the current stream."""
        self._current.until = max(self._current.until, self.now) + seconds

    def forward(self, timeline: Timeline, seconds: float) -> None:
        timeline.mark("forward")
        self.work(seconds)
        timeline.mark("forward_end")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return plugged_in(Machine(), monkeypatch)


def plugged_in(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(torch, "get_device_module", lambda device: machine)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: machine.now))
    return machine


def bus_of(machine: Machine) -> Bus:
    return Bus(torch.device("meta"))


def test_a_copy_takes_what_it_takes_on_its_stream_and_not_since_backward_was_launched(machine: Machine) -> None:
    bus = bus_of(machine)
    timeline = Timeline(bus, ["layer0"])
    machine.forward(timeline, 1.0)
    machine.work(9.0)  # a backward, launched at once
    timeline.mark("backward_end")
    with timeline.span("down", "send", "layer0", on=bus.lane("down", bus.mark())):
        machine.work(2.0)
    assert machine.now == 12.0
    with timeline.span("up", "fetch", "layer0", on=bus.lane("up")):
        machine.work(3.0)
    timeline.mark("step")
    timeline.mark("verdict")
    times = timeline.close_window()
    assert (times.down_s, times.up_s, times.tail_s, times.backward_s) == (2.0, 3.0, 5.0, 9.0)
    assert [(span.start, span.end) for span in times.spans] == [(10.0, 12.0), (12.0, 15.0)]
    tuner = Tuner("auto", ["layer0"])
    for _ in range(4):
        tuner.saw(times)
    sums, (arrival, o, p, u) = tuner.report()[:3], tuner.report()[3:]
    assert sums == [1.0, 9.0, 0.0] and (arrival, o, p, u) == (12.0, 2.0, 0.0, 3.0)


def test_a_step_is_not_counted_twice_where_the_thread_is_ahead_of_the_device(machine: Machine) -> None:
    bus = bus_of(machine)
    timeline = Timeline(bus)
    machine.forward(timeline, 1.0)
    machine.work(4.0)
    timeline.mark("backward_end")
    timeline.mark("step")  # the device has not begun
    with timeline.span("main", "norm"), timeline.span("down", "send", on=bus.lane("down", bus.mark())):
        machine.work(0.5)
    timeline.mark("verdict")
    machine.now += 0.25  # updates are handed over
    times = timeline.close_window()
    assert times.step_s == 1.0 + 4.0 + 0.5 + 0.25
    assert times.norm_wait_s == 5.5


@pytest.mark.parametrize(("busy", "idle"), [(4.0, 0.0), (1.0, 2.0)])
def test_a_thread_that_waits_makes_the_device_idle_only_when_that_runs_out_of_work(
    machine: Machine, busy: float, idle: float
) -> None:
    timeline = Timeline(bus_of(machine))
    timeline.mark("forward")
    machine.work(busy)
    with timeline.stall("layer1"):
        machine.now += 3.0
    machine.work(1.0)
    timeline.mark("forward_end")
    machine.work(2.0)
    timeline.mark("backward_end")
    timeline.mark("step")
    machine.now = 20.0  # the payloads are down
    timeline.mark("verdict")
    times = timeline.close_window()
    assert (times.stall_s, times.idle_s) == (3.0, idle)
    assert times.compute_s == busy + 1.0 + 2.0


def test_closing_a_window_does_not_wait_for_what_was_launched_after_its_verdict(machine: Machine) -> None:
    timeline = Timeline(bus_of(machine))
    machine.forward(timeline, 1.0)
    timeline.mark("backward_end")
    timeline.mark("step")
    machine.now = 2.0
    timeline.mark("verdict")
    machine.work(50.0)  # an overflow clears gradients
    timeline.close_window()
    assert machine.now == 2.0


def test_a_thread_that_waits_for_a_copy_sleeps_where_the_device_has_such_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for blocking in (True, False):
        machine = plugged_in(Machine(blocking=blocking), monkeypatch)
        with bus_of(machine).lane("down") as took:
            machine.work(2.0)
        assert took.seconds == 2.0 and machine.now == 2.0
        assert machine.asked == [blocking] * 2


def test_on_a_host_the_thread_is_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    host = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: host.now))
    bus = Bus(torch.device("cpu"))
    timeline = Timeline(bus)
    with timeline.stall("layer0"):  # a flush of the program's, before the forward
        host.now += 5.0
    timeline.mark("forward")
    host.now += 1.0
    with timeline.stall("layer1"):
        host.now += 2.0
    timeline.mark("forward_end")
    host.now += 4.0
    timeline.mark("backward_end")
    with timeline.span("down", "send", "layer1", on=bus.lane("down")):
        host.now += 0.5
    timeline.mark("step")
    host.now += 0.25
    timeline.mark("verdict")
    host.now += 0.25
    times = timeline.close_window()
    assert (times.stall_s, times.idle_s, times.compute_s) == (7.0, 2.0, 5.0)
    assert (times.step_s, times.down_s) == (7.5, 0.5)
