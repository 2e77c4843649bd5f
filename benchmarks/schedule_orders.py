# SPDX-License-Identifier: Apache-2.0
"""Drives emulated layers through steps, layer-wise by the real pipeline or in ZeRO-Offload's order; their bounds."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from benchmarks.schedule_emulation import EmulatedBus, EmulatedDevice, LayerTimes, PayloadUnit, Stages
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.eager import MEASURED_WINDOWS, Mode
from meft_ds.offload.schedule.host_threads import HostThreads, allowed_cpus, enter
from meft_ds.offload.schedule.lanes import ThreadLane
from meft_ds.offload.schedule.timing import LaneName, Span
from meft_ds.offload.schedule.window import StepResult, StepSettings
from meft_ds.ops.adam import AdamHyper

HYPER = AdamHyper(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
CLIP = 1.0


@dataclass(kw_only=True)
class Run:
    """Measured steps. `begins` has one more entry than there are steps: where the last one ended."""

    begins: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)
    overruns: int = 0  # transfers, those of the warm-up included, whose real copy took longer than the link was to

    @property
    def step_s(self) -> float:
        """Median seconds from the beginning of a step to that of the next, waiting included."""
        return statistics.median(b - a for a, b in zip(self.begins, self.begins[1:], strict=False))

    def seconds_of(self, lane: str, what: str) -> float:
        """Median of the spans of a kind in the measured steps, 0 if there are none."""
        found = [s.seconds for s in self.spans if (s.lane, s.what) == (lane, what) and s.start >= self.begins[0]]
        return statistics.median(found) if found else 0.0


def layerwise_bound(times: LayerTimes, layers: int) -> float:
    """The busiest lane of a step, and what cannot be hidden of the first layer (docs: the layer-wise schedule)."""
    busiest = max(times.f + times.b, times.o, times.p, times.u)
    return layers * busiest + times.o + times.p + times.u


def after_backward_bound(times: LayerTimes, layers: int) -> float:
    """ZeRO-Offload's order: only the way down overlaps, with the backward."""
    return layers * (times.f + max(times.b, times.o) + times.p + times.u)


def run_layerwise(
    units: Sequence[PayloadUnit], bus: EmulatedBus, times: LayerTimes, mode: Mode, *, warmup: int, steps: int
) -> Run:
    """Steps of the real pipeline, clipping on."""
    host, link = cores()
    pipeline = Pipeline(
        units,
        bus,
        Ranks(),
        lambda: StepSettings(hyper_of=lambda unit: HYPER, grad_scale=1.0, clip=CLIP),
        mode=mode,
        at_start={"host": partial(enter, host), "down": partial(enter, link), "up": partial(enter, link)},
    )
    device, run, overruns = EmulatedDevice(), Run(), bus.overruns
    if mode == "eager":
        warmup += MEASURED_WINDOWS
    try:
        for number in _steps(run, warmup, steps):
            result = _layerwise_step(pipeline, units, device, times)
            assert not result.overflow and result.grad_norm > CLIP
            if number >= warmup:
                run.results.append(result)
                run.spans += result.times.spans
        pipeline.flush()
        run.spans += pipeline.timeline.close_window().spans
    finally:
        pipeline.close()
    run.spans += device.spans
    run.overruns = bus.overruns - overruns
    return run


def _layerwise_step(
    pipeline: Pipeline, units: Sequence[PayloadUnit], device: EmulatedDevice, times: LayerTimes
) -> StepResult:
    pipeline.begin_forward(training=True)
    pipeline.timeline.mark("forward")
    for unit in units:
        begun = time.perf_counter()
        pipeline.needed(unit)
        device.compute("forward", unit.name, times.f, waited=time.perf_counter() - begun)
    pipeline.timeline.mark("forward_end")
    for unit in reversed(units):
        device.compute("backward", unit.name, times.b)
        pipeline.gradient(unit)
        pipeline.complete(unit)
    pipeline.timeline.mark("backward_end")
    return pipeline.step()


def run_after_backward(units: Sequence[Stages], bus: EmulatedBus, times: LayerTimes, *, warmup: int, steps: int) -> Run:
    """Steps in ZeRO-Offload's order. Norm and clipping cost nothing here, which is in its favour."""
    device, run, overruns = EmulatedDevice(), Run(), bus.overruns
    failures: list[BaseException] = []
    lane = ThreadLane("down", failures.append, partial(enter, cores()[1]))
    try:
        for number in _steps(run, warmup, steps):
            _after_backward_step(units, bus, device, times, lane, number + 1, run.spans, failures)
    finally:
        lane.close()
    run.spans += device.spans
    run.overruns = bus.overruns - overruns
    return run


def _after_backward_step(
    units: Sequence[Stages],
    bus: EmulatedBus,
    device: EmulatedDevice,
    times: LayerTimes,
    lane: ThreadLane,
    step: int,
    spans: list[Span],
    failures: list[BaseException],
) -> None:
    for unit in units:
        device.compute("forward", unit.name, times.f)
    for unit in reversed(units):
        device.compute("backward", unit.name, times.b)
        unit.collect()
        lane.submit(partial(_timed, spans, "down", "send", unit.name, partial(unit.send, bus)))
    all_down = threading.Event()
    lane.submit(all_down.set)
    while not all_down.wait(1.0):
        if failures:
            raise failures[0]
    for unit in units:
        _timed(spans, "host", "update", unit.name, partial(unit.host_step, HYPER, step=step, grad_scale=1.0))
    for unit in units:
        _timed(spans, "up", "fetch", unit.name, partial(unit.fetch, bus, Ranks()))
        unit.apply()


def _steps(run: Run, warmup: int, steps: int) -> Iterator[int]:
    """Numbers of all steps from 0; notes where those after the warm-up begin, and where the last one ends."""
    for number in range(warmup + steps):
        if number >= warmup:
            run.begins.append(time.perf_counter())
        yield number
    run.begins.append(time.perf_counter())


def _timed(spans: list[Span], lane: LaneName, what: str, unit: str, work: Callable[[], None]) -> None:
    begun = time.perf_counter()
    work()
    spans.append(Span(lane, what, unit, begun, time.perf_counter()))


def cores() -> tuple[HostThreads, HostThreads]:
    """Those of the host update, and the one that the link's copies have to themselves.

    A bus copies without a core. Were the copies to run beside the update's threads, the update would wait for the
    slowest of these and take twice as long, which no real link does to it.
    """
    allowed = allowed_cpus()
    host, link = (allowed[:-1], allowed[-1:]) if len(allowed) > 1 else (allowed, allowed)
    return HostThreads(threads=len(host), cpus=host), HostThreads(threads=1, cpus=link)
