# SPDX-License-Identifier: Apache-2.0
"""The `dense` wire format: whole gradients of a layer's small tensors (routers, norms, biases, what the user trains).

Down goes the float32 gradient, accumulated in float32 on the device over the window; up comes the updated tensor in its
own dtype. Each rank holds master and moments of its 1/N of the layer's flattened tensors.
"""

from __future__ import annotations

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
        self._payload: Tensor | None = None
        self._host_payload: Tensor | None = None
        self._adam: FlatAdam | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def allocate(self) -> None:
        """Take the memory that `footprint` announced and start collecting gradients."""
        flat = torch.cat([p.detach().reshape(-1) for _, p in self.params])
        own = flat[self._lo : self._hi].cpu()
        pin = self._device.type != "cpu"
        self._reply = torch.empty(own.shape, dtype=self._dtype, pin_memory=pin)
        self._adam = FlatAdam(own.float().clone(), self._reply, self._moments_dtype)
        self._reply.copy_(own)
        self._acc = torch.zeros(self.numel, dtype=torch.float32, device=self._device)
        offset = 0
        for _, p in self.params:
            self._hooks.append(p.register_post_accumulate_grad_hook(_accumulate_into(self._acc, offset)))
            offset += p.numel()

    def release(self) -> None:
        """Stop collecting gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def footprint(self) -> Footprint:
        own = self._hi - self._lo
        moments = 2 * self._moments_dtype.itemsize
        return Footprint(
            host_private=own * (4 + moments + self._dtype.itemsize) + (0 if self._device.type == "cpu" else own * 4),
            device=self.numel * 4,
            down=own * 4,
            up=own * self._dtype.itemsize,
        )

    def collect(self) -> None:
        self._payload = self._acc

    def reduce(self) -> None:
        assert self._payload is not None
        if self._ranks.world > 1:
            dist.all_reduce(self._payload, group=self._ranks.group)
        self._payload = self._payload[self._lo : self._hi]

    def send(self, bus: Bus) -> None:
        assert self._payload is not None
        self._host_payload = bus.down(self._payload, "dense", key=self.name)
        self._payload = None

    def sq_norm(self) -> float:
        assert self._host_payload is not None
        return ops.sq_norm(self._host_payload)

    def host_step(self, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        assert self._adam is not None and self._host_payload is not None
        self._adam.step(self._host_payload, hyper, step=step, grad_scale=grad_scale)

    def apply(self, bus: Bus) -> None:
        self._push_params(bus)
        self.discard()

    def discard(self) -> None:
        self._acc.zero_()
        self._payload = self._host_payload = None

    def state_tensors(self) -> dict[str, Tensor]:
        assert self._adam is not None
        return self._adam.tensors()

    def state_range(self) -> tuple[int, int, int]:
        return self._lo, self._hi, self.numel

    def after_load(self, bus: Bus) -> None:
        assert self._adam is not None
        self._reply.copy_(self._adam.master)
        self._push_params(bus)

    def _push_params(self, bus: Bus) -> None:
        own = bus.up(self._reply, "dense")
        if self._ranks.world > 1:
            sizes = [owned_range(self.numel, Ranks(rank=k, world=self._ranks.world)) for k in range(self._ranks.world)]
            parts = [torch.empty(hi - lo, dtype=own.dtype, device=own.device) for lo, hi in sizes]
            _all_gather_uneven(parts, own, self._ranks)
            own = torch.cat(parts)
        offset = 0
        for _, p in self.params:
            p.data.copy_(own[offset : offset + p.numel()].view_as(p))
            offset += p.numel()


def _accumulate_into(acc: Tensor, offset: int):  # type: ignore[no-untyped-def]
    def hook(p: Tensor) -> None:
        assert p.grad is not None
        acc[offset : offset + p.numel()].add_(p.grad.reshape(-1))
        p.grad = None  # consumed: it must not be added a second time by the next micro-batch

    return hook


def _all_gather_uneven(parts: list[Tensor], own: Tensor, ranks: Ranks) -> None:
    # not every backend gathers slices of different sizes, so pad them to the longest
    longest = max(p.numel() for p in parts)
    padded = torch.zeros(longest, dtype=own.dtype, device=own.device)
    padded[: own.numel()] = own
    gathered = [torch.empty_like(padded) for _ in parts]
    dist.all_gather(gathered, padded, group=ranks.group)
    for part, whole in zip(parts, gathered, strict=True):
        part.copy_(whole[: part.numel()])
