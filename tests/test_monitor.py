# SPDX-License-Identifier: Apache-2.0
"""What is written to DeepSpeed's monitor, and when."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.schedule.timing import WindowTimes
from meft_ds.offload.schedule.window import StepResult
from meft_ds.plugin.telemetry import TAG, Event, Plan, Telemetry
from tests.offload.times import window_times


class Writer:
    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.calls: list[list[Event]] = []

    def write_events(self, event_list: list[Event]) -> None:
        assert self.enabled, "the monitor is off"
        self.calls.append(event_list)

    def values(self) -> dict[str, float]:
        (events,) = self.calls
        return {tag.removeprefix(TAG): value for tag, value, _ in events}


class Untouchable(WindowTimes):
    """No figure may be computed while the monitor is off."""

    @property
    def bound_s(self) -> float:
        raise AssertionError("bound_s")


def step_result(*, overflow: bool = False, **times: float) -> StepResult:
    all_times = window_times(payloads=4, **times)
    return StepResult(overflow=overflow, grad_norm=math.inf if overflow else 2.5, times=all_times)


def telemetry(writer: Writer, bus: Bus) -> Telemetry:
    plan = Plan(host=0, device=0, down=0, up=0, dense_names=(), dense_parameters=0, dense_device=0)
    return Telemetry(pipeline=SimpleNamespace(bus=bus), methods=(), plan=plan, writer=writer)  # type: ignore[arg-type]


@pytest.fixture
def bus() -> Bus:
    return Bus(torch.device("cpu"))


def test_bytes_that_go_up_after_the_step_are_written_with_the_window_they_belong_to(bus: Bus) -> None:
    writer = Writer()
    monitor = telemetry(writer, bus)
    bus.count("rows", down=100, up=10)
    late = bus.of_window()
    monitor.close_window(step_result(), 0)
    assert writer.calls == []
    late.count("dense", up=7)
    bus.count("rows", up=1000)  # the next window's
    monitor.write(32)
    assert writer.values()["bytes_down"] == 100 and writer.values()["bytes_up"] == 17
    assert {samples for _, _, samples in writer.calls[0]} == {32}


def test_rows_that_an_evaluation_fetched_are_not_counted(bus: Bus) -> None:
    writer = Writer()
    monitor = telemetry(writer, bus)
    bus.count("eval_rows", up=5)
    bus.count("rows", up=3)
    monitor.close_window(step_result(), 0)
    monitor.write(1)
    assert writer.values()["bytes_up"] == 3


def test_every_time_of_the_window_is_written_in_seconds(bus: Bus) -> None:
    writer = Writer()
    monitor = telemetry(writer, bus)
    times = {"step_s": 4.0, "forward_s": 1.5, "stall_s": 0.5, "norm_wait_s": 0.25, "host_update_s": 2.0, "tail_s": 1.0}
    monitor.close_window(step_result(**times), 0)
    monitor.write(1)
    assert writer.values() == {
        "bytes_down": 0.0,
        "bytes_up": 0.0,
        "step_s": 4.0,
        "bound_s": 3.0,  # the busiest lane is the host, and the first layer cannot be hidden
        "efficiency": 0.75,
        "stall_s": 0.5,
        "norm_wait_s": 0.25,
        "host_update_s": 2.0,
        "payloads": 4.0,
        "grad_norm": 2.5,
    }


def test_a_window_is_written_once(bus: Bus) -> None:
    writer = Writer()
    monitor = telemetry(writer, bus)
    monitor.write(0)
    monitor.close_window(step_result(), 0)
    monitor.write(1)
    monitor.write(1)
    assert len(writer.calls) == 1


def test_a_skipped_step_has_no_gradient_norm(bus: Bus) -> None:
    writer = Writer()
    monitor = telemetry(writer, bus)
    monitor.close_window(step_result(overflow=True), 0)
    monitor.write(1)
    assert "grad_norm" not in writer.values() and "bytes_up" in writer.values()


def test_a_monitor_that_is_off_gets_no_call_and_no_figure_is_computed(bus: Bus) -> None:
    monitor = telemetry(Writer(enabled=False), bus)
    result = step_result()
    monitor.close_window(replace(result, times=Untouchable(**vars(result.times))), 0)
    monitor.write(1)
