# SPDX-License-Identifier: Apache-2.0
"""The `mask` wire format: gradients of the chosen elements go down, their new values come up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from meft_ds.offload.flat_unit import Place
from meft_ds.offload.master_unit import MasterUnit


class MaskUnit(MasterUnit):
    """The chosen elements of one layer's weights, one weight after another.

    Args:
        place: where it stands.
        chosen: by parameter: which of its elements, flattened, int64.
    """

    wire = "mask"

    def __init__(self, place: Place, chosen: list[Tensor]) -> None:
        sizes = [len(elements) for elements in chosen]
        super().__init__(place, numel=sum(sizes), state_bytes=4 + 2 * place.moments_dtype.itemsize)
        self._chosen, self._offsets = chosen, [sum(sizes[:index]) for index in range(len(sizes) + 1)]

    def allocate(self) -> None:
        """Take the memory; masters start as the elements are now."""
        super().allocate()
        own = torch.empty(self._hi - self._lo, dtype=self._dtype, device="cpu")
        for index, (_, p) in enumerate(self.params):
            for first, part in self._own_parts(index, p.detach()):
                own[first : first + len(part)] = part
        self._start_from(own)

    def add_gradient(self, index: int, grad: Tensor) -> None:
        self._part(index, self._acc).add_(grad.reshape(-1)[self._chosen[index]])

    def change(self, reply: Tensor) -> None:
        for index, (_, p) in enumerate(self.params):
            p.view(-1)[self._chosen[index]] = self._part(index, reply)

    def _part(self, index: int, flat: Tensor) -> Tensor:
        return flat[self._offsets[index] : self._offsets[index + 1]]

    def _own_parts(self, index: int, whole: Tensor) -> Iterator[tuple[int, Tensor]]:
        lo, hi = max(self._lo, self._offsets[index]), min(self._hi, self._offsets[index + 1])
        if lo < hi:
            mine = self._chosen[index][lo - self._offsets[index] : hi - self._offsets[index]]
            yield lo - self._lo, whole.reshape(-1)[mine]

    def _show(self, index: int, flat: Tensor, whole: Tensor) -> None:
        whole.view(-1)[self._chosen[index]] = self._part(index, flat)
