# SPDX-License-Identifier: Apache-2.0
"""The `dense` wire format: whole gradients of a layer's small tensors (routers, norms, biases, what the user trains).

Down goes the float32 gradient, accumulated in float32 on the device over the window; up comes the updated tensor in its
own dtype. Each rank holds master and moments of its 1/N of the layer's flattened tensors.
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meft_ds import ops
from meft_ds.offload.bus import Bus
from meft_ds.offload.host_adam import FlatAdam
from meft_ds.offload.partition import Ranks, owned_range
from meft_ds.offload.wire import AdamHyper, Footprint, Unit


class DenseUnit(Unit):
    """All trainable tensors of one layer, one dtype and one parameter group, flattened one after another.

    Args:
        name: unit name, e.g. "layer3.dense".
        layer: position in layer order.
        params: (name, parameter) pairs on the device, all of one dtype.
        group: index of the user's parameter group.
        ranks: data-parallel ranks.
        moments_dtype: float32 or bfloat16.
    """

    wire = "dense"

    def __init__(
        self,
        *,
        name: str,
        layer: int,
        params: list[tuple[str, nn.Parameter]],
        group: int,
        ranks: Ranks,
        moments_dtype: torch.dtype,
    ) -> None:
        self.name, self.layer, self.group, self._ranks = name, layer, group, ranks
        self.params = params
        self._moments_dtype = moments_dtype
        self.numel = sum(p.numel() for _, p in params)
        self._lo, self._hi = owned_range(self.numel, ranks)
        self._dtype, self._device = params[0][1].dtype, params[0][1].device
        self._on_host = self._device.type == "cpu"
        self._payload: Tensor | None = None
        self._host_payload: Tensor | None = None
        self._adam: FlatAdam | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._waiting: set[int] = set()

    def allocate(self) -> None:
        """Take the memory that `footprint` announced and start collecting gradients."""
        flat = torch.cat([p.detach().reshape(-1) for _, p in self.params])
        own = flat[self._lo : self._hi].cpu()
        world = self._ranks.world
        self._reply = torch.empty(own.shape, dtype=self._dtype, pin_memory=not self._on_host)
        self._adam = FlatAdam(own.float().clone(), self._reply, self._moments_dtype)
        self._reply.copy_(own)
        self._acc = torch.zeros(self.numel, dtype=torch.float32, device=self._device)
        # the sum over ranks must not replace the gradient: more of it may come, and then it is summed again
        self._sum = torch.empty_like(self._acc) if world > 1 else None
        # one row per rank, as long as the longest slice, because not every backend gathers slices of different sizes
        longest = max(hi - lo for lo, hi in self._slices())
        self._replies = None
        if world > 1 or not self._on_host:
            rows = world + 1 if world > 1 else 1  # the last one is what this rank gives
            self._replies = torch.zeros(rows, longest, dtype=self._dtype, device=self._device)
        self._await_all()
        offset = 0
        for index, (_, p) in enumerate(self.params):
            self._hooks.append(p.register_post_accumulate_grad_hook(_Taker(self, index, offset)))
            offset += p.numel()

    def release(self) -> None:
        """Stop collecting gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def footprint(self) -> Footprint:
        own, size = self._hi - self._lo, self._dtype.itemsize
        several = self._ranks.world > 1
        moments = 2 * self._moments_dtype.itemsize
        return Footprint(
            host_private=own * (4 + moments + size + 4),
            payload=own * 4,
            device=self.numel * (4 + (4 if several else 0) + (size if several or not self._on_host else 0)),
            down=own * 4,
            up=own * size,
        )

    def collect(self) -> None:
        self._payload = self._acc

    def reduce(self, ranks: Ranks) -> None:
        assert self._payload is not None
        if self._sum is not None:
            self._sum.copy_(self._payload)
            dist.all_reduce(self._sum, group=ranks.group)
            self._payload = self._sum[self._lo : self._hi]

    def send(self, bus: Bus) -> None:
        assert self._payload is not None
        self._host_payload = bus.send(self._payload, torch.float32, "dense", key=self.name)
        self._payload = None

    def sq_norm(self) -> float:
        assert self._host_payload is not None
        return ops.sq_norm(self._host_payload)

    def host_step(self, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        assert self._adam is not None and self._host_payload is not None
        self._adam.step(self._host_payload, hyper, step=step, grad_scale=grad_scale)

    def fetch(self, bus: Bus, ranks: Ranks) -> None:
        if self._replies is None:
            bus.count("dense", up=self._reply.numel() * self._reply.element_size())
            return
        *everyone, mine = self._replies.unbind(0)
        bus.up_into(mine[: self._reply.numel()], self._reply, "dense")
        if everyone:
            dist.all_gather(everyone, mine, group=ranks.group)

    @torch.no_grad()
    def apply(self) -> None:
        rows = [self._reply] if self._replies is None else list(self._replies[: self._ranks.world].unbind(0))
        parts = [row[: hi - lo] for row, (lo, hi) in zip(rows, self._slices(), strict=True)]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        offset = 0
        for _, p in self.params:
            # not p.data: a forward that read the old weights and has yet to run backward must fail, not be wrong
            p.copy_(flat[offset : offset + p.numel()].view_as(p))
            offset += p.numel()
        self.discard()

    def discard(self) -> None:
        self._acc.zero_()
        self._payload = self._host_payload = None
        self._await_all()

    def state_tensors(self) -> dict[str, Tensor]:
        assert self._adam is not None
        return self._adam.tensors()

    def state_range(self) -> tuple[int, int, int]:
        return self._lo, self._hi, self.numel

    def after_load(self) -> None:
        assert self._adam is not None
        self._reply.copy_(self._adam.master)

    def take(self, index: int, offset: int, p: Tensor) -> None:
        """Add a parameter's gradient to the window."""
        assert p.grad is not None
        if self.listener is not None:
            self.listener.gradient(self)
        self._acc[offset : offset + p.numel()].add_(p.grad.reshape(-1))
        p.grad = None  # consumed: it must not be added a second time by the next micro-batch
        self._waiting.discard(index)
        if not self._waiting:
            self._await_all()
            if self.listener is not None:
                self.listener.complete(self)

    def _await_all(self) -> None:
        self._waiting = set(range(len(self.params)))

    def _slices(self) -> list[tuple[int, int]]:
        world = self._ranks.world
        return [owned_range(self.numel, Ranks(rank=k, world=world)) for k in range(world)]


class _Taker:
    """A parameter's hook. It holds its unit weakly: a model that outlives its engine must not keep the state alive."""

    def __init__(self, unit: DenseUnit, index: int, offset: int) -> None:
        self._unit, self._index, self._offset = weakref.ref(unit), index, offset

    def __call__(self, p: Tensor) -> None:
        if (unit := self._unit()) is not None:
            unit.take(self._index, self._offset, p)
