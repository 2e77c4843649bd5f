# SPDX-License-Identifier: Apache-2.0
"""The pipeline carries a format that it has never heard of: signs and one scale, written against `Unit` alone."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from meft_ds.offload import update_gates
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.model.capture import hand_over
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.ranks import LaneRanks, Ranks, owned_range
from meft_ds.offload.schedule.window import StepSettings, clip_factor
from meft_ds.offload.unit import AdamHyper, Footprint, Unit
from tests.forked import Forge
from tests.offload.overlap import make_late

STEPS, CLIP = 20, 0.5
HYPER = AdamHyper(lr=0.2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)


def mean_size(part: Tensor) -> Tensor:
    """The mean of absolute values; 0 of the empty slice that a rank has of a small weight."""
    return part.abs().sum() / max(part.numel(), 1)


class SignUnit(Unit):
    """One weight, of whose summed gradient each rank sends down its slice as signs (int8) and their mean size.

    The host keeps the slice's master and takes a step of plain SGD.
    """

    wire = "signs"

    def __init__(self, name: str, layer: int, p: nn.Parameter, ranks: Ranks) -> None:
        self.name, self.layer, self.group, self.params = name, layer, 0, [(name, p)]
        self._p, self._acc, self._reply = p, torch.zeros(p.numel()), torch.zeros(p.numel())
        self._lo, self._hi = owned_range(p.numel(), ranks)
        self.master = p.detach().reshape(-1)[self._lo : self._hi].clone()
        self._hook = hand_over(p, self, 0)

    def take(self, index: int, grad: Tensor) -> None:
        assert self.listener is not None
        self.listener.gradient(self)
        self._acc += grad.reshape(-1)
        self.listener.complete(self)

    def release(self) -> None:
        self._hook.remove()

    def footprint(self) -> Footprint:
        own = self._hi - self._lo
        return Footprint(host_private=8 * own, payload=own + 4, device=8 * len(self._acc), down=own + 4, up=4 * own)

    def collect(self) -> None:
        self._payload = self._acc.clone()

    def reduce(self, ranks: Ranks) -> None:
        if ranks.world > 1:
            dist.all_reduce(self._payload, group=ranks.group)

    def send(self, bus: Bus) -> None:
        own = self._payload[self._lo : self._hi]
        parts = (own.sign().to(torch.int8), mean_size(own).reshape(1))
        self._signs, self._scale = (bus.send(t, t.dtype, self.wire, key=(self.name, i)) for i, t in enumerate(parts))

    def sq_norm(self) -> float:
        return float(self._scale.double().square()) * len(self._signs)

    def host_step(self, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        self.master -= hyper.lr * grad_scale * self._scale * self._signs.float()

    def fetch(self, bus: Bus, ranks: Ranks) -> None:
        self._reply.zero_()
        self._reply[self._lo : self._hi] = self.master
        if ranks.world > 1:
            dist.all_reduce(self._reply, group=ranks.group)
        bus.count(self.wire, up=self.master.nbytes)

    @torch.no_grad()
    def apply(self) -> None:
        self._p.copy_(self._reply.view_as(self._p))
        self.forget()

    def forget(self) -> None:
        self._acc.zero_()

    def discard(self) -> None:
        self.forget()

    def state_tensors(self) -> dict[str, Tensor]:
        return {"master": self.master}

    def state_range(self) -> tuple[int, int, int]:
        return self._lo, self._hi, len(self._acc)

    def after_load(self) -> None:
        pass


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def loss_of(model: nn.Module, rank: int, world: int) -> Tensor:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(7)).chunk(world)[rank]
    return (model(x).squeeze(1) - x.sum(1)).square().mean()


def train(mode: Any, late: int | None = None, rank: int = 0, world: int = 1) -> tuple[list[float], list[Tensor]]:
    """The losses of this rank, and the weights at the end."""
    model, bus = small(), Bus(torch.device("cpu"))
    ranks = Ranks(rank=rank, world=world, group=dist.group.WORLD if world > 1 else None)
    units: list[Unit] = [SignUnit(name, at, p, ranks) for at, (name, p) in enumerate(model.named_parameters())]
    lanes = LaneRanks.apart(ranks, bus.device) if world > 1 else None
    pipeline = Pipeline(units, bus, ranks, mode=mode, lane_ranks=lanes)
    pipeline.settings = lambda: StepSettings(hyper_of=lambda unit: HYPER, grad_scale=1.0 / world, clip=CLIP)
    update_gates.install(model, units, pipeline)
    if late is not None:
        make_late(pipeline, late)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model, rank, world)
        loss.backward()
        assert not pipeline.step().overflow
        losses.append(loss.item())
    pipeline.flush()
    footprints = [unit.footprint() for unit in units]
    counts = {"down": STEPS * sum(f.down for f in footprints), "up": STEPS * sum(f.up for f in footprints)}
    assert bus.close_window().by_channel() == {"signs": counts}
    pipeline.close()
    return losses, [p.detach().clone() for p in model.parameters()]


def plain(world: int = 1) -> list[Tensor]:
    """The weights after the same steps, written as one loop without units, lanes or ranks."""
    model = small()
    for _ in range(STEPS):
        sums = [torch.zeros_like(p) for p in model.parameters()]
        for rank in range(world):
            grads = torch.autograd.grad(loss_of(model, rank, world), [*model.parameters()])
            for total, grad in zip(sums, grads, strict=True):
                total += grad
        moves = []
        for total in sums:
            slices = [owned_range(total.numel(), Ranks(rank=k, world=world)) for k in range(world)]
            parts = [total.reshape(-1)[lo:hi] for lo, hi in slices]
            moves.append(torch.cat([part.sign() * mean_size(part) for part in parts]).view_as(total))
        norm = math.sqrt(sum(float(move.double().square().sum()) for move in moves)) / world
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p -= HYPER.lr * clip_factor(CLIP, norm) / world * move
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("late", [1, 2, 3])
def test_a_format_that_only_tests_have_trains_as_a_plain_loop_and_exact_equals_serial(late: int) -> None:
    serial, weights = train("serial")
    exact, again = train("exact", late)
    assert serial == exact and all(map(torch.equal, weights, again))
    assert serial[-1] < 0.7 * serial[0]
    for p, want in zip(weights, plain(), strict=True):
        torch.testing.assert_close(p, want, rtol=1e-4, atol=1e-5)


def on_ranks(folder: Path, mode: str, late: int | None = None) -> list[Any]:
    """What each of two ranks does."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    losses, weights = train(mode, None if late is None else late + rank, rank, 2)
    return [losses, [p.tolist() for p in weights]]


def test_on_two_ranks_it_trains_as_a_plain_loop_over_both_halves(forge: Forge, tmp_path: Path) -> None:
    serial = forge.results(on_ranks, tmp_path, mode="serial")
    exact = forge.results(on_ranks, tmp_path, mode="exact", late=5)
    assert serial == exact and serial[0][1] == serial[1][1]
    for p, want in zip(serial[0][1], plain(world=2), strict=True):
        torch.testing.assert_close(torch.tensor(p), want, rtol=1e-4, atol=1e-5)
