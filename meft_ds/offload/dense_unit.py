# SPDX-License-Identifier: Apache-2.0
"""The `dense` wire format: whole gradients of a layer's small tensors (routers, norms, biases, what the user trains).

Down goes the float32 gradient, accumulated in float32 on the device over the window; up comes the updated tensor in its
own dtype. Each rank holds master and moments of its 1/N of the layer's flattened tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from meft_ds.offload.flat_unit import Place
from meft_ds.offload.master_unit import MasterUnit
from meft_ds.offload.model.weights import numel_of


class DenseUnit(MasterUnit):
    """All trainable tensors of one layer, one dtype and one parameter group, flattened one after another."""

    wire = "dense"

    def __init__(self, place: Place) -> None:
        sizes = [numel_of(p) for _, p in place.params]
        super().__init__(place, numel=sum(sizes), state_bytes=4 + 2 * place.moments_dtype.itemsize)
        self._offsets = [sum(sizes[:index]) for index in range(len(sizes) + 1)]

    def allocate(self) -> None:
        """Take the memory; masters start as the parameters are now."""
        super().allocate()
        own = torch.empty(self._hi - self._lo, dtype=self._dtype, device="cpu")
        for index, (_, p) in enumerate(self.params):
            with self.weights.whole([p]):
                for first, part in self._own_parts(index, p.detach()):
                    own[first : first + part.numel()] = part
        self._start_from(own)

    def add_gradient(self, index: int, grad: Tensor) -> None:
        self._part(index, self._acc).add_(grad.reshape(-1))

    def change(self, reply: Tensor) -> None:
        for index, (_, p) in enumerate(self.params):
            self.weights.write(p, self._part(index, reply))

    def _part(self, index: int, flat: Tensor) -> Tensor:
        """Return parameter `index`'s part of a vector [numel], a view."""
        return flat[self._offsets[index] : self._offsets[index + 1]]

    def _own_parts(self, index: int, whole: Tensor) -> Iterator[tuple[int, Tensor]]:
        offset, end = self._offsets[index : index + 2]
        lo, hi = max(self._lo, offset), min(self._hi, end)
        if lo < hi:
            yield lo - self._lo, whole.reshape(-1)[lo - offset : hi - offset]

    def _show(self, index: int, flat: Tensor, whole: Tensor) -> None:
        whole.view(-1).copy_(self._part(index, flat))
