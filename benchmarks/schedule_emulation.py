# SPDX-License-Identifier: Apache-2.0
"""What `schedule.py` emulates, a link and a device that computes, and the units it moves: one layer's payload each.

Emulated work takes wall time by sleeping. A sleep ends late by an error that is measured here and subtracted; what is
left of it is carried over to the resource's next piece of work, so that errors do not add up over a step.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from meft_ds import ops
from meft_ds.offload.dense_unit import DenseUnit
from meft_ds.offload.flat_unit import Place
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.timing import Span
from meft_ds.ops.adam import AdamHyper

LATENCY_S = 10e-6  # of one transfer


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Seconds per layer: host update p, way down o, way up u, forward f, backward b."""

    p: float
    o: float
    u: float
    f: float
    b: float

    def scaled_to(self, p: float) -> LayerTimes:
        """The same ratios with another p."""
        k = p / self.p
        return LayerTimes(p=p, o=self.o * k, u=self.u * k, f=self.f * k, b=self.b * k)


class Sleeper:
    """A resource whose work takes wall time and nothing else."""

    def __init__(self) -> None:
        self._late = 0.0  # of the last piece of work; negative when it ended early
        self._ended = time.perf_counter()

    def take(self, seconds: float, *, begun: float | None = None, idle: float | None = None) -> None:
        """Be busy for `seconds` since `begun` (now).

        `idle` is how long the resource waited before (since the last work ended). Waiting uses lateness up: had the
        last piece ended in time, this one would have begun no earlier.
        """
        begun = time.perf_counter() if begun is None else begun
        idle = begun - self._ended if idle is None else idle
        if self._late > 0:
            self._late = max(0.0, self._late - idle)
        target = begun + seconds - self._late
        if (left := target - time.perf_counter() - sleep_error()) > 0:
            time.sleep(left)
        self._ended = time.perf_counter()
        self._late = self._ended - target


@functools.cache
def sleep_error() -> float:
    """By how much a sleep of some milliseconds ends late here (median)."""
    errors = []
    for _ in range(100):
        begun = time.perf_counter()
        time.sleep(2e-3)
        errors.append(time.perf_counter() - begun - 2e-3)
    return statistics.median(errors)


class EmulatedDevice:
    """Computes by sleeping on the thread that trains, and notes when."""

    def __init__(self) -> None:
        self._sleeper = Sleeper()
        self.spans: list[Span] = []

    def compute(self, what: str, unit: str, seconds: float, *, waited: float = 0.0) -> None:
        """One layer's forward or backward, after the device waited for its update."""
        begun = time.perf_counter()
        self._sleeper.take(seconds, begun=begun, idle=waited)
        self.spans.append(Span("compute", what, unit, begun, time.perf_counter()))


class EmulatedBus(Bus):
    """A link of its own speed each way. A transfer takes bytes / speed + latency, of which the real copy takes a part.

    Args:
        down_bytes_per_s, up_bytes_per_s: the link's speeds, which may be changed between steps.
    """

    def __init__(self, down_bytes_per_s: float = 12e9, up_bytes_per_s: float = 12e9) -> None:
        super().__init__(torch.device("cpu"))
        self.down_bytes_per_s, self.up_bytes_per_s = down_bytes_per_s, up_bytes_per_s
        self.overruns = 0  # transfers whose real copy alone took longer than the link was to take
        self._sleepers = {"down": Sleeper(), "up": Sleeper()}

    def set_speeds(self, payload_bytes: int, times: LayerTimes) -> None:
        """So that a payload takes `times.o` down and `times.u` up."""
        self.down_bytes_per_s = payload_bytes / (times.o - LATENCY_S)
        self.up_bytes_per_s = payload_bytes / (times.u - LATENCY_S)

    def _copy_down(self, host: Tensor, t: Tensor) -> None:
        self._carry("down", host, t, self.down_bytes_per_s)

    def _copy_up(self, dst: Tensor, src: Tensor) -> None:
        self._carry("up", dst, src, self.up_bytes_per_s)

    def _carry(self, direction: str, dst: Tensor, src: Tensor, bytes_per_s: float) -> None:
        begun = time.perf_counter()
        dst.copy_(src)
        nbytes = dst.numel() * min(dst.element_size(), src.element_size())  # the narrower dtype is what would cross
        seconds = nbytes / bytes_per_s + LATENCY_S
        self.overruns += time.perf_counter() - begun > seconds
        self._sleepers[direction].take(seconds, begun=begun)


class Stages(Protocol):
    """What both orders of a step need of a layer: those stages of a unit that move or update something."""

    name: str

    def collect(self) -> None: ...
    def send(self, bus: Bus) -> None: ...
    def host_step(self, hyper: AdamHyper, *, step: int, grad_scale: float) -> None: ...
    def fetch(self, bus: Bus, ranks: Ranks) -> None: ...
    def apply(self) -> None: ...


class PayloadUnit(DenseUnit):
    """A layer's compressed payload: float32 down, real AdamW, float32 up.

    The device is emulated, so what it would do in its own memory takes part of f and b and is left out here: the
    accumulated gradient keeps its (random) contents, and `apply` copies nothing.
    """

    def __init__(self, layer: int, parameter: nn.Parameter) -> None:
        super().__init__(Place(name=f"layer{layer}.payload", layer=layer, params=[("payload", parameter)]))

    def allocate(self) -> None:
        super().allocate()
        self._acc.normal_()
        self._replies = torch.zeros(1, self.numel)  # on a CPU device nothing would go up otherwise

    def apply(self) -> None:
        self.discard()

    def discard(self) -> None:
        self._payload = self._host_payload = None


def payload_units(layers: int, numel: int) -> list[PayloadUnit]:
    """Units with memory of their own, shallowest first. The parameters are the device's, hence views of one tensor."""
    values = torch.randn(numel) * 0.02
    units = [PayloadUnit(layer, nn.Parameter(values)) for layer in range(layers)]
    for unit in units:
        unit.allocate()
    return units


class FullUnit:
    """A layer's full gradient as ZeRO-Offload moves it: bf16 down, AdamW on float32, bf16 up.

    The cast to float32 on the host is part of the transfer's time, which is in ZeRO-Offload's favour.
    """

    def __init__(self, layer: int, shelf: FullShelf, place: int) -> None:
        self.name = f"layer{layer}.full"
        self._shelf, self._place = shelf, place

    def collect(self) -> None:
        pass

    def send(self, bus: Bus) -> None:
        bus._copy_down(self._shelf.grads[self._place], self._shelf.device_grad)

    def host_step(self, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        self._shelf.update(self._place, hyper, step)

    def fetch(self, bus: Bus, ranks: Ranks) -> None:
        bus._copy_up(self._shelf.device_weight, self._shelf.masters[self._place])

    def apply(self) -> None:
        pass


class FullShelf:
    """Memory that the layers of full size share: each of `places` sets is far larger than a core's cache, and 32 of
    them would not fit. DeepSpeedCPUAdam updates them, or our kernel where it cannot be built."""

    def __init__(self, numel: int, places: int, hyper: AdamHyper) -> None:
        self.masters = [nn.Parameter(torch.randn(numel) * 0.02) for _ in range(places)]
        self.grads = [torch.randn(numel) * 1e-3 for _ in range(places)]
        self.device_grad = self.grads[0].bfloat16()
        self.device_weight = torch.empty(numel, dtype=torch.bfloat16)
        self._deepspeed = _deepspeed_adam(self.masters, hyper)
        self._moments: list[tuple[Tensor, Tensor]] = []
        if self._deepspeed is None:
            self._moments = [(torch.zeros(numel), torch.zeros(numel)) for _ in range(places)]

    @property
    def optimizer(self) -> str:
        return "meft_ds.ops.adamw_" if self._deepspeed is None else "DeepSpeedCPUAdam"

    def units(self, layers: int) -> list[FullUnit]:
        """Shallowest first; layers take turns with the memory."""
        return [FullUnit(layer, self, layer % len(self.masters)) for layer in range(layers)]

    def update(self, place: int, hyper: AdamHyper, step: int) -> None:
        """The real update of one layer."""
        master, grad = self.masters[place], self.grads[place]
        if self._deepspeed is None:
            ops.adamw_(master.data, *self._moments[place], grad, hyper, step=step, grad_scale=1.0)
            return
        master.grad = grad
        self._deepspeed.step()
        master.grad = None


def _deepspeed_adam(masters: list[nn.Parameter], hyper: AdamHyper) -> torch.optim.Optimizer | None:
    with contextlib.suppress(ImportError, RuntimeError):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(
            masters,
            lr=hyper.lr,
            betas=(hyper.beta1, hyper.beta2),
            eps=hyper.eps,
            weight_decay=hyper.weight_decay,
        )
    return None


def update_seconds(units: list[PayloadUnit] | list[FullUnit], hyper: AdamHyper, bus: Bus, rounds: int) -> float:
    """Median seconds of one layer's real host update with nothing beside it; the first round warms up."""
    return statistics.median(_updates(units, hyper, bus, rounds))


def _updates(units: list[PayloadUnit] | list[FullUnit], hyper: AdamHyper, bus: Bus, rounds: int) -> Iterator[float]:
    for number in range(rounds + 1):
        for unit in units:
            if isinstance(unit, PayloadUnit):
                unit.collect()
                unit.send(bus)
            begun = time.perf_counter()
            unit.host_step(hyper, step=number + 1, grad_scale=1.0)
            if number:
                yield time.perf_counter() - begun
