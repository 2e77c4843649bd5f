# SPDX-License-Identifier: Apache-2.0
"""The `blocks` wire format: gradients of the chosen tiles go down, their new values come up and go into the weights.

No whole gradient is ever made where a linear layer hands over its activations; a stacked expert tensor's is made by
autograd, read and dropped at once. Of a partitioned weight (ZeRO-3) each rank writes the tiles in its own slice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meft_ds.offload.flat_unit import MOMENTS, FlatUnit
from meft_ds.offload.host.adam import FlatAdam
from meft_ds.offload.model.capture import tap, untap
from meft_ds.offload.model.weights import WHOLE, Weights
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.unit import AdamHyper
from meft_ds.sparse_matrix.tiles import Tiles


class TilesUnit(FlatUnit):
    """The chosen tiles of one layer's weights of one dtype and one parameter group.

    Args:
        name, layer, params, group, ranks, on_device, weights, device: as in `FlatUnit`.
        matrices: in the order of their parts of the payload; every parameter has at least one.
        modules: by parameter: the linear layer whose activations give the gradient; None where autograd does.
        wire_dtype: dtype of the gradients on the bus.
        moments_dtype: float32 or bfloat16.
    """

    wire = "blocks"

    def __init__(
        self,
        *,
        name: str,
        layer: int,
        params: list[tuple[str, nn.Parameter]],
        matrices: list[Tiles],
        modules: list[nn.Module | None],
        group: int,
        ranks: Ranks,
        wire_dtype: torch.dtype,
        moments_dtype: torch.dtype,
        on_device: bool,
        weights: Weights = WHOLE,
        device: torch.device | None = None,
    ) -> None:
        self._original_bytes = params[0][1].dtype.itemsize
        super().__init__(
            name=name,
            layer=layer,
            params=params,
            group=group,
            ranks=ranks,
            numel=sum(matrix.numel for matrix in matrices),
            wire_dtype=wire_dtype,
            state_bytes=4 + 2 * moments_dtype.itemsize + self._original_bytes,
            on_device=on_device,
            weights=weights,
            device=device,
        )
        self.matrices, self._modules = matrices, modules
        self._of_param = [[m for m in matrices if m.param == index] for index in range(len(params))]
        self._moments_dtype = moments_dtype
        self._adam: FlatAdam | None = None

    def allocate(self) -> None:
        """Also take master, moments and the original values, and start listening to the modules."""
        super().allocate()
        where = self._device if self.on_device else torch.device("cpu")
        self.original = self.values()[self._lo : self._hi].to(where, copy=True)
        self._adam = FlatAdam(
            self.original.float() if self._dtype != torch.float32 else self.original.clone(),
            self._reply,
            self._moments_dtype,
        )
        self.after_load()
        for index, module in enumerate(self._modules):
            if module is not None:
                (blocks,) = self._of_param[index]
                tap(module, self, index, blocks.keep, self.weights.anchor)

    def release(self) -> None:
        """Stop listening to parameters and modules. The weights keep what was learned."""
        super().release()
        for module in self._modules:
            if module is not None:
                untap(module, self)

    @property
    def state_bytes(self) -> int:
        """Bytes of this rank's master and moments."""
        return (self._hi - self._lo) * (self._state_bytes - self._original_bytes)

    # -- gradients -----------------------------------------------------------------------------------------------------

    def tapped(self, index: int, x: Tensor, dy: Tensor) -> None:
        """A backward came by a linear layer: x [..., kept], dy [..., out]."""
        self._begin()
        (blocks,) = self._of_param[index]
        blocks.add_product(blocks.part(self._acc), x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))
        self._received(index)

    def add_gradient(self, index: int, grad: Tensor) -> None:
        """Autograd made a whole gradient: of a stacked expert tensor, or of a weight read outside its layer."""
        for blocks in self._of_param[index]:
            blocks.add_gradient(blocks.part(self._acc), blocks.matrix(grad))

    # -- stages --------------------------------------------------------------------------------------------------------

    def update(self, grad: Tensor, reply: Tensor, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        assert self._adam is not None
        self._adam.step(grad, hyper, step=step, grad_scale=grad_scale)

    def change(self, reply: Tensor) -> None:
        for index, (_, p) in enumerate(self.params):
            for blocks in self._of_param[index]:
                for piece in self.weights.pieces(p, blocks.expert, write_only=True):
                    blocks.write(piece, blocks.part(reply))
            self.weights.changed(p)

    @torch.no_grad()
    def adopt_one(self, p: Tensor) -> None:
        assert self._adam is not None
        index = next(i for i, (_, q) in enumerate(self.params) if q is p)
        for blocks in self._of_param[index]:
            lo, hi = self._owned(blocks)
            if lo < hi:
                now = blocks.read(self._matrix(blocks))[lo - blocks.offset : hi - blocks.offset]
                self._adam.adopt(now.to(self._reply.device), self._reply, lo - self._lo)

    # -- values --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def values(self) -> Tensor:
        """Read the tiles from the weights: flat [numel] in their dtype, on the device.

        Collective where weights are partitioned.
        """
        parts = []
        for index, (_, p) in enumerate(self.params):
            with self.weights.whole([p]):
                parts += [blocks.read(self._matrix(blocks)) for blocks in self._of_param[index]]
        return torch.cat(parts)

    def originals(self) -> Tensor:
        """What the tiles were before training, flat [numel] in the weights' dtype, on the device. Collective."""
        return self.gathered(self.original)

    def full(self, index: int) -> Tensor:
        assert self._adam is not None
        return self._with_tiles(super().full(index), index, self._adam.master)

    @torch.no_grad()
    def set_full(self, index: int, value: Tensor) -> None:
        super().set_full(index, value)
        self._take_tiles(self._adam_state()["master"], index, self._checked(index, value))
        self.after_load()

    def full_moment(self, index: int, key: str) -> Tensor:
        return self._with_tiles(torch.zeros_like(super().full(index)), index, self._moment(index, key))

    @torch.no_grad()
    def set_full_moment(self, index: int, value: Tensor, key: str) -> None:
        self._take_tiles(self._moment(index, key), index, self._checked(index, value))

    def _moment(self, index: int, key: str) -> Tensor:
        if key not in MOMENTS:
            raise ValueError(self._no_moment(index, key))
        return self._adam_state()[key]

    def _adam_state(self) -> dict[str, Tensor]:
        assert self._adam is not None
        return self._adam.tensors()

    def _with_tiles(self, whole: Tensor, index: int, own: Tensor) -> Tensor:
        """`whole` [m, n] with the tiles' values of a vector of which this rank has its slice. Collective."""
        flat = self.gathered(own).float()
        for blocks in self._of_param[index]:
            for piece in WHOLE.pieces(whole, blocks.expert):
                blocks.write(piece, blocks.part(flat))
        return whole

    def _take_tiles(self, own: Tensor, index: int, value: Tensor) -> None:
        """Write the tiles of `value` [m, n] into this rank's slice of a vector, as far as they lie in it."""
        for blocks in self._of_param[index]:
            lo, hi = self._owned(blocks)
            if lo < hi:
                tiles = blocks.read(blocks.matrix(value))[lo - blocks.offset : hi - blocks.offset]
                own[lo - self._lo : hi - self._lo] = tiles.to(own)

    def _owned(self, blocks: Tiles) -> tuple[int, int]:
        """What of a matrix's payload is this rank's, in the unit's."""
        return max(self._lo, blocks.offset), min(self._hi, blocks.offset + blocks.numel)

    def _matrix(self, blocks: Tiles) -> Tensor:
        return blocks.matrix(self.params[blocks.param][1].detach())

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        assert self._adam is not None
        return {**self._adam.tensors(), "original": self.original}

    def after_load(self) -> None:
        assert self._adam is not None
        self._reply.copy_(self._adam.master)
