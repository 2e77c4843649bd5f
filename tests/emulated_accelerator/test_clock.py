# SPDX-License-Identifier: Apache-2.0
"""The clock: streams take time and overlap, causes of idleness are told apart, and costs are those of the roofline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.emulated_accelerator.profiles import Profile
from tests.forked import Forge

Ask = Callable[..., Any]
RTX4090 = Profile.load("rtx4090")
CLOSE = dict(rel=0.03, abs=3e-4)


@pytest.fixture
def ask(emulated_forge: Forge, tmp_path: Path) -> Ask:
    """Runs a function of `clock_checks.py` in a process of its own and returns its result."""

    def run(name: str, **arguments: Any) -> Any:
        call = f"tests.emulated_accelerator.clock_checks:{name}"
        return emulated_forge.results(call, tmp_path, world=1, **arguments)[0]

    return run


@pytest.mark.slow
def test_streams_take_time_and_overlap(ask: Ask) -> None:
    took = ask("streams")
    assert took["in order"] == pytest.approx(0.03, **CLOSE)
    assert took["side by side"] == pytest.approx(0.02, **CLOSE)
    assert took["one after the other"] == pytest.approx(0.03, **CLOSE)
    assert took["between events"] == pytest.approx(0.02, abs=1e-6)
    assert (took["reached at once"], took["reached after"]) == (0.0, 1.0)


@pytest.mark.slow
def test_the_clock_stands_still_while_the_emulation_works(ask: Ask) -> None:
    took = ask("pause")
    assert took["stands still"] == 0.0
    assert took["sleeper, wall"] > 0.55


@pytest.mark.slow
def test_idle_time_has_its_cause(ask: Ask) -> None:
    found = ask("idle")
    copy = found.pop("expected")["copy"]
    for what, cause, seconds in (
        ("blocking copy", "sync", copy),
        ("copy on another stream", "bus", copy - 0.001),
        ("gate", "host", 0.002),
        ("launches", "launch", 100 * 20e-6),
    ):
        assert found[what][cause] == pytest.approx(seconds, rel=0.05, abs=1e-4), what
        assert sum(found[what].values()) - found[what][cause] < 2e-4, what


@pytest.mark.slow
def test_a_threads_own_work_delays_what_it_launches(ask: Ask) -> None:
    took = ask("python")
    assert took["2.0"] == pytest.approx(0.1, rel=0.2)
    assert took["0.0"] < 0.02


@pytest.mark.slow
def test_whole_numbers_are_right_and_values_are_noise(ask: Ask) -> None:
    seen = ask("values")
    assert seen["counted in memory that held values"] == [1, 1, 1]
    assert seen["whole numbers"] == [16, 19, 22, 25, 28]
    assert (seen["loss"], seen["finite"], seen["same twice"]) == (1.0, True, True)
    assert seen["spread"] == pytest.approx(1.0, rel=0.1)
    assert seen["chosen"] > 50 and seen["chosen by bits"] > 50


@pytest.mark.slow
def test_operators_cost_their_arithmetic_or_their_bytes(ask: Ask) -> None:
    p = RTX4090
    for name, (seconds, flops, nbytes) in ask("costs").items():
        arithmetic = flops / (p.matmul_flops * 2048 / (2048 + p.half_size))
        assert seconds == pytest.approx(p.kernel_s + max(arithmetic, nbytes / p.bytes_per_s), rel=1e-6), name


@pytest.mark.parametrize("name", ["rtx4090", "rtx3050-laptop-4gb", "a10g", "h100"])
def test_every_profile_says_where_its_numbers_come_from(name: str) -> None:
    profile = Profile.load(name)
    assert profile.matmul_flops > profile.fp32_flops > 0
    assert all(profile.pcie[key] > 0 for key in ("pinned_down", "pinned_up", "pageable_down", "pageable_up"))


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no profile 'rtx9'; there are a10g, h100"):
        Profile.load("rtx9")


def test_the_profile_of_the_review_gives_its_rates() -> None:
    p = RTX4090
    for tokens, flops in ((2048, 130e12), (512, 105e12)):
        assert 2 * tokens * 4096**2 / p.matmul(tokens, 4096, 4096) == pytest.approx(flops, rel=0.01)


@pytest.mark.long  # on a quiet machine
@pytest.mark.parametrize(
    ("bound", "times"),
    [
        ("device", {"f": 0.008, "b": 0.016, "o": 0.008, "u": 0.008, "p": 0.004}),
        ("bus", {"f": 0.004, "b": 0.008, "o": 0.020, "u": 0.012, "p": 0.004}),
    ],
)
def test_the_schedule_benchmark_agrees(ask: Ask, bound: str, times: dict[str, float]) -> None:
    """Both drive the real pipeline; that one with threads that sleep, and with a real host update, which is short here.

    The clock's device has what that one leaves out, sums and copies in its own memory: some tens of microseconds.
    """
    from benchmarks.schedule_emulation import EmulatedBus, LayerTimes, payload_units, update_seconds
    from benchmarks.schedule_orders import HYPER, run_layerwise

    numel, layers = 1 << 20, 6
    bus, units = EmulatedBus(), payload_units(layers, numel)
    real = {**times, "p": update_seconds(units, HYPER, bus, rounds=3)}
    wanted = LayerTimes(**real)
    bus.set_speeds(4 * numel, wanted)
    run = run_layerwise(units, bus, wanted, "exact", warmup=1, steps=5)
    found = ask("schedule", times=real, layers=layers, numel=numel)
    assert found == pytest.approx(run.step_s, rel=0.1), bound
