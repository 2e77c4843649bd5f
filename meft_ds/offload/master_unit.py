# SPDX-License-Identifier: Apache-2.0
"""Units with float32 masters: a rank holds masters and AdamW's moments of its slice, and the masters, rounded, come up.

A format adds where the elements of the vector lie in its parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from meft_ds.offload.flat_unit import FlatUnit
from meft_ds.offload.host.adam import FlatAdam
from meft_ds.offload.model.weights import shape_of
from meft_ds.offload.unit import MOMENTS
from meft_ds.ops.adam import AdamHyper


class MasterUnit(FlatUnit):
    """One layer's elements that train in their own shape."""

    weight_state = frozenset({"master"})
    _adam: FlatAdam

    def _start_from(self, own: Tensor) -> None:
        """Take masters with the values `own` [own], where they are, and moments of 0."""
        self._adam = FlatAdam(own.to(torch.float32, copy=True), self._reply, self._moments_dtype)
        self.after_load()

    def update(self, grad: Tensor, reply: Tensor, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        assert reply is self._adam.replica
        self._adam.step(grad, hyper, step=step, grad_scale=grad_scale)

    @torch.no_grad()
    def adopt_one(self, p: Tensor) -> None:
        index = next(i for i, (_, q) in enumerate(self.params) if q is p)
        for first, now in self._own_parts(index, p.detach()):
            self._adam.adopt(now.to(self._reply.device), self._reply, first)

    # -- where elements lie --------------------------------------------------------------------------------------------

    @abstractmethod
    def _own_parts(self, index: int, whole: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield this rank's parts of `whole`, in the shape of parameter `index`, and where each begins in its slice."""

    @abstractmethod
    def _show(self, index: int, flat: Tensor, whole: Tensor) -> None:
        """Write a vector [numel] into `whole`, in the shape of parameter `index`, as far as it lies in there."""

    # -- state in the shapes of parameters -----------------------------------------------------------------------------

    def full(self, index: int) -> Tensor:
        whole = super().full(index)
        self._show(index, self.gathered(self._adam.master), whole)
        return whole

    @torch.no_grad()
    def set_full(self, index: int, value: Tensor) -> None:
        super().set_full(index, value)
        self._take(self._adam.master, index, value)
        self.after_load()

    def full_moment(self, index: int, key: str) -> Tensor:
        moment = self._moment(index, key)
        whole = torch.zeros(shape_of(self.params[index][1]), device=self._device)
        self._show(index, self.gathered(moment).float(), whole)
        return whole

    @torch.no_grad()
    def set_full_moment(self, index: int, value: Tensor, key: str) -> None:
        self._take(self._moment(index, key), index, value)

    def _moment(self, index: int, key: str) -> Tensor:
        if key not in MOMENTS:
            raise ValueError(self._no_moment(index, key))
        return self._adam.tensors()[key]

    def _take(self, own: Tensor, index: int, value: Tensor) -> None:
        for first, part in self._own_parts(index, self._checked(index, value)):
            own[first : first + part.numel()] = part.to(own)

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        return self._adam.tensors()

    def after_load(self) -> None:
        self._reply.copy_(self._adam.master)
