# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meft_ds.offload.schedule.eager import MEASURED_WINDOWS, Tuner, UnitTimes, choose_mode, eager_order, transition
from meft_ds.offload.schedule.lanes import InlineLane, Lanes, ThreadLane
from meft_ds.offload.schedule.timing import Span, WindowTimes
from tests.offload.times import window_times


def uniform(n: int, *, b: float, o: float, p: float, u: float) -> list[UnitTimes]:
    """n like layers; the payload of the deepest arrives first."""
    return [UnitTimes(arrival=(n - i) * b + o, o=o, p=p, u=u) for i in range(n)]


@pytest.mark.parametrize(
    ("b", "p", "expected"),
    [(2.0, 1.0, 0), (1.0, 2.0, 7), (1.0, 100.0, 10)],
    ids=["all in time", "half in time", "none in time"],
)
def test_the_transition_layer_follows_the_papers_formula(b: float, p: float, expected: int) -> None:
    # L - (T_B - (o + p + u)) / max(o, p, u), e.g. 10 - (10 - 3) / 2 = 6.5: three whole units are in time
    assert transition(uniform(10, b=b, o=0.5, p=p, u=0.5), 10 * b) == expected


times = st.lists(
    st.builds(
        UnitTimes,
        arrival=st.floats(0, 10),
        o=st.floats(0, 3),
        p=st.floats(0.01, 3),
        u=st.floats(0, 3),
    ),
    min_size=1,
    max_size=12,
)


@given(times=times, first=st.integers(0, 12))
def test_an_eager_order_serves_every_unit_once_and_no_deep_unit_before_a_waiting_shallow_one(
    times: list[UnitTimes], first: int
) -> None:
    order = eager_order(times, first)
    assert sorted(order) == list(range(len(times)))
    now = 0.0
    served: set[int] = set()
    for unit in order:
        arrived = [
            i for i, t in enumerate(times) if t.arrival <= max(now, min_arrival(times, served)) and i not in served
        ]
        assert unit in arrived
        if unit >= first:
            assert not [i for i in arrived if i < first]
            assert unit == min((i for i in arrived), key=lambda i: (times[i].arrival, -i))
        else:
            assert unit == max((i for i in arrived if i < first), key=lambda i: (times[i].arrival, -i))
        now = max(now, times[unit].arrival) + times[unit].p
        served.add(unit)


def min_arrival(times: list[UnitTimes], served: set[int]) -> float:
    return min(t.arrival for i, t in enumerate(times) if i not in served)


def test_without_a_backlog_the_order_is_that_of_arrival_and_with_one_the_shallow_go_first() -> None:
    quick = uniform(6, b=2, o=0, p=1, u=0)
    assert eager_order(quick, transition(quick, 12)) == [5, 4, 3, 2, 1, 0]
    slow = uniform(6, b=1, o=0, p=3, u=0)
    assert eager_order(slow, transition(slow, 6)) == [5, 2, 0, 1, 3, 4]


def test_auto_picks_exact_only_where_one_forward_hides_updates_and_the_way_up() -> None:
    assert choose_mode(forward_s=1.0, host_s=0.9, up_s=1.0) == "exact"
    assert choose_mode(forward_s=1.0, host_s=1.1, up_s=0.1) == "eager"
    assert choose_mode(forward_s=1.0, host_s=0.1, up_s=1.1) == "eager"


def window(units: dict[str, float], *, forward: float, norm: float, update: float) -> WindowTimes:
    """Units by the seconds after the forward at which their payload is down; each goes up in a tenth of a second."""
    spans = []
    for name, arrival in units.items():
        down = forward + arrival
        spans += [
            Span("down", "send", name, down - 0.1, down),
            Span("host", "norm", name, 10.0, 10.0 + norm),
            Span("host", "update", name, 20.0, 20.0 + update),
            Span("up", "fetch", name, 30.0, 30.1),
        ]
    marks = [("forward", 0.0), ("forward_end", forward), ("backward_end", forward + 3.0), ("step", forward + 3.0)]
    return window_times(first_forward_s=forward, last_backward_s=3.0, spans=spans, marks=marks)


@pytest.mark.parametrize(("update", "choice"), [(0.9, "exact"), (1.5, "eager")])
def test_auto_decides_once_from_measured_windows_and_says_so(
    update: float, choice: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "meft_ds")
    tuner = Tuner("auto", ["a"])
    tuner.saw_norm(1.0)
    for n in range(1, 40):
        tuner.agreed(tuner.report())
        assert tuner.choice == (choice if n > MEASURED_WINDOWS else None)
        # an exact update's norm is taken during backward, so no forward has to hide it
        tuner.saw(window({"a": 1.0}, forward=1.0, norm=0.5, update=update))
    assert sum("auto chose" in record.getMessage() for record in caplog.records) == 1
    assert tuner.eager_now == (choice == "eager")
    again = Tuner("auto", ["a"])
    again.load_state(tuner.state())
    assert (again.choice, again.eager_now, again.last_norm) == (choice, choice == "eager", 1.0)


def test_eager_waits_for_a_measured_order_and_a_norm_to_clip_by_and_keeps_the_last_finite_one() -> None:
    tuner = Tuner("eager", ["a"])
    for _ in range(MEASURED_WINDOWS):
        assert not tuner.eager_now
        tuner.agreed(tuner.report())
        tuner.saw(window({"a": 1.0}, forward=1.0, norm=0.1, update=0.5))
    tuner.agreed(tuner.report())
    assert not tuner.eager_now, "no window had a finite norm yet"
    tuner.saw_norm(float("inf"))
    assert not tuner.eager_now
    tuner.saw_norm(2.5)
    tuner.saw_norm(float("inf"))
    assert tuner.eager_now and tuner.last_norm == 2.5


@pytest.mark.parametrize(("norm", "order"), [(0.0, ["c", "b", "a"]), (2.0, ["c", "a", "b"])])
def test_the_eager_order_counts_the_norms_as_work_of_the_host(norm: float, order: list[str]) -> None:
    tuner = Tuner("eager", ["a", "b", "c"])
    for _ in range(MEASURED_WINDOWS):
        tuner.saw(window({"c": 1.0, "b": 2.0, "a": 3.0}, forward=1.0, norm=norm, update=0.5))
    tuner.agreed(tuner.report())
    assert tuner.state()["order"] == order


def test_a_lane_runs_jobs_in_order_and_urgent_ones_before_those_that_wait() -> None:
    errors: list[BaseException] = []
    lane = ThreadLane("test", errors.append)
    done, gate = [], threading.Event()
    lane.submit(gate.wait)
    for i in range(3):
        lane.submit(lambda i=i: done.append(i))
    for i in (10, 11):
        lane.submit(lambda i=i: done.append(i), urgent=True)
    finished = threading.Event()
    lane.submit(finished.set)
    gate.set()
    assert finished.wait(5) and done == [10, 11, 0, 1, 2] and not errors
    lane.close()


@pytest.mark.parametrize("error", [ValueError("planted"), SystemExit(3), KeyboardInterrupt()])
def test_whatever_a_job_raises_is_reported_and_no_later_job_runs(error: BaseException) -> None:
    errors: list[BaseException] = []
    reported = threading.Event()
    lane = ThreadLane("test", lambda e: (errors.append(e), reported.set()))

    def fail() -> None:
        raise error

    ran: list[int] = []
    lane.submit(fail)
    assert reported.wait(5) and errors == [error]
    lane.submit(lambda: ran.append(1))
    lane.close()
    assert ran == []


def test_closing_a_lane_finishes_the_running_job_and_its_thread_ends() -> None:
    before = set(threading.enumerate())  # other tests' may still be alive
    lanes = Lanes.threads(lambda error: None)
    running, done = threading.Event(), []
    lanes.host.submit(lambda: (running.set(), time.sleep(0.1), done.append(1)))
    running.wait(5)
    lanes.close()
    assert done == [1]
    left = {t for t in threading.enumerate() if t.name in ("meft-down", "meft-host", "meft-up")} - before
    assert not left


def test_inline_lanes_raise_in_the_caller() -> None:
    def fail() -> None:
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        InlineLane().submit(fail)


def test_a_process_whose_lane_is_stuck_still_ends_with_its_own_exit_code() -> None:
    program = """
import sys, threading
import meft_ds.offload.schedule.lanes as lanes
lanes._PATIENCE_S = 0.2
lane = lanes.ThreadLane("test", lambda error: None)
lane.submit(threading.Event().wait)
sys.exit(5)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 5
