# SPDX-License-Identifier: Apache-2.0
"""The pipeline carries a format that it has never heard of: signs and one scale, written against `Unit` alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from meft_ds.offload import update_gates
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.model.capture import hand_over
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.window import StepSettings
from meft_ds.offload.unit import AdamHyper, Footprint, Unit
from tests.offload.overlap import make_late

STEPS = 20
HYPER = AdamHyper(lr=0.2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)


class SignUnit(Unit):
    """One weight whose gradient goes down as signs (int8) and its mean size; the host keeps the master and does SGD."""

    wire = "signs"

    def __init__(self, name: str, layer: int, p: nn.Parameter) -> None:
        self.name, self.layer, self.group, self.params = name, layer, 0, [(name, p)]
        self._p, self.master = p, p.detach().clone()
        self._acc = torch.zeros_like(self.master)
        self._reply = torch.zeros_like(self.master)
        self._hook = hand_over(p, self, 0)

    def take(self, index: int, grad: Tensor) -> None:
        assert self.listener is not None
        self.listener.gradient(self)
        self._acc += grad
        self.listener.complete(self)

    def release(self) -> None:
        self._hook.remove()

    def footprint(self) -> Footprint:
        n = self._p.numel()
        return Footprint(host_private=8 * n, payload=4 * n, device=4 * n, down=n + 4, up=4 * n)

    def collect(self) -> None:
        self._signs, self._scale = self._acc.sign().to(torch.int8), self._acc.abs().mean().reshape(1)

    def reduce(self, ranks: Ranks) -> None:
        if ranks.world > 1:
            for t in (self._signs, self._scale):
                dist.all_reduce(t, group=ranks.group)

    def send(self, bus: Bus) -> None:
        self._host = [bus.send(t, t.dtype, self.wire, key=(self.name, i)) for i, t in enumerate(self._encoded())]

    def _encoded(self) -> tuple[Tensor, Tensor]:
        return self._signs.reshape(-1), self._scale

    def sq_norm(self) -> float:
        return float(self._host[1].double().square()) * self._p.numel()

    def host_step(self, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        signs, scale = self._host
        self.master -= hyper.lr * grad_scale * (signs.float() * scale).view_as(self.master)

    def fetch(self, bus: Bus, ranks: Ranks) -> None:
        self._reply.copy_(self.master)
        bus.count(self.wire, up=self._reply.nbytes)

    @torch.no_grad()
    def apply(self) -> None:
        self._p.copy_(self._reply)
        self.forget()

    def forget(self) -> None:
        self._acc.zero_()

    def discard(self) -> None:
        self.forget()

    def state_tensors(self) -> dict[str, Tensor]:
        return {"master": self.master}

    def state_range(self) -> tuple[int, int, int]:
        return 0, len(self.master), len(self.master)

    def after_load(self) -> None:
        pass


def pipeline_of(model: nn.Module, mode: Any, bus: Bus) -> Pipeline:
    units: list[Unit] = [SignUnit(name, layer, p) for layer, (name, p) in enumerate(model.named_parameters())]
    pipeline = Pipeline(units, bus, Ranks(), mode=mode)
    pipeline.settings = lambda: StepSettings(hyper_of=lambda unit: HYPER, grad_scale=1.0, clip=0.5)
    update_gates.install(model, units, pipeline)
    return pipeline


@pytest.mark.parametrize("late", [1, 2, 3])
def test_a_format_that_only_tests_have_trains_and_exact_equals_serial(late: int) -> None:
    found = []
    for mode in ("serial", "exact"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        bus = Bus(torch.device("cpu"))
        pipeline = pipeline_of(model, mode, bus)
        if mode == "exact":
            make_late(pipeline, late)
        x, losses = torch.randn(32, 6, generator=torch.Generator().manual_seed(7)), []
        for _ in range(STEPS):
            loss = (model(x).squeeze(1) - x.sum(1)).square().mean()
            loss.backward()
            assert pipeline.step().grad_norm > 0
            losses.append(loss.item())
        pipeline.flush()
        n = sum(p.numel() for p in model.parameters())
        counts = {"down": STEPS * (n + 4 * len(pipeline.units)), "up": STEPS * 4 * n}
        assert bus.close_window().by_channel() == {"signs": counts}
        found.append((losses, [p.detach().clone() for p in model.parameters()]))
        pipeline.close()
    (serial, weights), (exact, again) = found
    assert serial == exact and all(map(torch.equal, weights, again))
    assert serial[-1] < 0.7 * serial[0]
