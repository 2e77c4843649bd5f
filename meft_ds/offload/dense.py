# SPDX-License-Identifier: Apache-2.0
"""The `dense` wire format: whole gradients of a layer's small tensors (routers, norms, biases, what the user trains).

Down goes the float32 gradient, accumulated in float32 on the device over the window; up comes the updated tensor in its
own dtype. Each rank holds master and moments of its 1/N of the layer's flattened tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meft_ds.offload.flat import FlatUnit
from meft_ds.offload.host_adam import FlatAdam
from meft_ds.offload.partition import Ranks
from meft_ds.offload.weights import WHOLE, Weights, numel_of
from meft_ds.offload.wire import AdamHyper


class DenseUnit(FlatUnit):
    """All trainable tensors of one layer, one dtype and one parameter group, flattened one after another.

    Args:
        name, layer, params, group, ranks, weights, device: as in `FlatUnit`.
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
        weights: Weights = WHOLE,
        device: torch.device | None = None,
    ) -> None:
        sizes = [numel_of(p) for _, p in params]
        super().__init__(
            name=name,
            layer=layer,
            params=params,
            group=group,
            ranks=ranks,
            numel=sum(sizes),
            wire_dtype=torch.float32,
            state_bytes=4 + 2 * moments_dtype.itemsize,
            weights=weights,
            device=device,
        )
        self._moments_dtype = moments_dtype
        self._offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self._adam: FlatAdam | None = None

    def allocate(self) -> None:
        """Also take master and moments; the master starts as the parameters are now."""
        super().allocate()
        own = self._own_values()
        self._adam = FlatAdam(own.float().clone(), self._reply, self._moments_dtype)
        self._reply.copy_(own)

    def add_gradient(self, index: int, grad: Tensor) -> None:
        offset = self._offsets[index]
        self._acc[offset : offset + grad.numel()].add_(grad.reshape(-1))

    def update(self, grad: Tensor, reply: Tensor, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        assert self._adam is not None and reply is self._adam.replica
        self._adam.step(grad, hyper, step=step, grad_scale=grad_scale)

    def change(self, reply: Tensor) -> None:
        for (_, p), offset in zip(self.params, self._offsets, strict=True):
            self.weights.write(p, reply[offset : offset + numel_of(p)])

    @torch.no_grad()
    def adopt(self) -> None:
        assert self._adam is not None
        self._adam.adopt(self._own_values(), self._reply)

    def _own_values(self) -> Tensor:
        """What this rank owns, as the parameters are now, on the host. Collective where they are partitioned."""
        return torch.cat([self._own_part(p, offset) for (_, p), offset in zip(self.params, self._offsets, strict=True)])

    def _own_part(self, p: nn.Parameter, offset: int) -> Tensor:
        """What this rank owns of a parameter, as it is now, on the host."""
        lo, hi = (min(max(edge - offset, 0), numel_of(p)) for edge in (self._lo, self._hi))
        with self.weights.whole([p]):
            return p.detach().reshape(-1)[lo:hi].cpu()

    def state_tensors(self) -> dict[str, Tensor]:
        assert self._adam is not None
        return self._adam.tensors()

    def after_load(self) -> None:
        assert self._adam is not None
        self._reply.copy_(self._adam.master)
