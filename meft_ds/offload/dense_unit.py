# SPDX-License-Identifier: Apache-2.0
"""The `dense` wire format: whole gradients of a layer's small tensors (routers, norms, biases, what the user trains).

Down goes the float32 gradient, accumulated in float32 on the device over the window; up comes the updated tensor in its
own dtype. Each rank holds master and moments of its 1/N of the layer's flattened tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meft_ds.offload.flat_unit import MOMENTS, FlatUnit
from meft_ds.offload.host.adam import FlatAdam
from meft_ds.offload.model.weights import WHOLE, Weights, numel_of, shape_of
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.unit import AdamHyper


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
        own = torch.cat([self._own_part(p, offset) for (_, p), offset in zip(self.params, self._offsets, strict=True)])
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
    def adopt_one(self, p: Tensor) -> None:
        assert self._adam is not None
        offset = next(at for (_, q), at in zip(self.params, self._offsets, strict=True) if q is p)
        lo, hi = self._own_range(p, offset)
        now = p.detach().reshape(-1)[lo:hi].cpu()
        self._adam.adopt(now, self._reply, max(offset - self._lo, 0))

    def full(self, index: int) -> Tensor:
        assert self._adam is not None
        return self._of(index, self.gathered(self._adam.master))

    @torch.no_grad()
    def set_full(self, index: int, value: Tensor) -> None:
        assert self._adam is not None
        self._put(index, self._adam.master, self._checked(index, value))
        super().set_full(index, value)
        self.after_load()

    def full_moment(self, index: int, key: str) -> Tensor:
        return self._of(index, self.gathered(self._moment(index, key)).float())

    @torch.no_grad()
    def set_full_moment(self, index: int, value: Tensor, key: str) -> None:
        self._put(index, self._moment(index, key), self._checked(index, value))

    def _moment(self, index: int, key: str) -> Tensor:
        if key not in MOMENTS:
            raise ValueError(self._no_moment(index, key))
        return self.state_tensors()[key]

    def _of(self, index: int, flat: Tensor) -> Tensor:
        """Parameter `index`'s part of a vector [numel], in its shape."""
        _, p = self.params[index]
        return flat[self._offsets[index] : self._offsets[index] + numel_of(p)].view(shape_of(p)).clone()

    def _put(self, index: int, own: Tensor, value: Tensor) -> None:
        """Write parameter `index`'s value into this rank's slice `own` of a vector, as far as it lies in it."""
        offset, n = self._offsets[index], value.numel()
        lo, hi = max(self._lo, offset), min(self._hi, offset + n)
        if lo < hi:
            own[lo - self._lo : hi - self._lo] = value.reshape(-1)[lo - offset : hi - offset].to(own)

    def _own_part(self, p: nn.Parameter, offset: int) -> Tensor:
        """What this rank owns of a parameter, as it is now, on the host."""
        lo, hi = self._own_range(p, offset)
        with self.weights.whole([p]):
            return p.detach().reshape(-1)[lo:hi].cpu()

    def _own_range(self, p: Tensor, offset: int) -> tuple[int, int]:
        """[lo, hi) of a flattened parameter's elements that this rank owns."""
        lo, hi = (min(max(edge - offset, 0), numel_of(p)) for edge in (self._lo, self._hi))
        return lo, hi

    def state_tensors(self) -> dict[str, Tensor]:
        assert self._adam is not None
        return self._adam.tensors()

    def after_load(self) -> None:
        assert self._adam is not None
        self._reply.copy_(self._adam.master)
