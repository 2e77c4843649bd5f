# SPDX-License-Identifier: Apache-2.0
"""The `blocks` wire format: gradients of the chosen tiles go down, their new values come up and go into the weights.

No whole gradient is ever made where a linear layer hands over its activations; a stacked expert tensor's is made by
autograd, read and dropped at once. Of a partitioned weight (ZeRO-3) each rank writes the tiles in its own slice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from meft_ds.offload.flat_unit import Place
from meft_ds.offload.master_unit import MasterUnit
from meft_ds.offload.model.capture import as_matrices
from meft_ds.offload.model.weights import WHOLE
from meft_ds.sparse_matrix.tiles import Tiles


class TilesUnit(MasterUnit):
    """The chosen tiles of one layer's weights of one dtype and one parameter group.

    Args:
        place: where it stands.
        matrices: the tiles of each matrix, in the order of the payload; every parameter has at least one.
        modules: by parameter: the linear layer whose activations give the gradient; None where autograd does.
    """

    wire = "blocks"
    weight_state = frozenset({"master", "original"})

    def __init__(self, place: Place, *, matrices: list[Tiles], modules: list[nn.Module | None]) -> None:
        self._original_bytes = place.params[0][1].dtype.itemsize
        super().__init__(
            place,
            numel=sum(matrix.numel for matrix in matrices),
            state_bytes=4 + 2 * place.moments_dtype.itemsize + self._original_bytes,
            modules=modules,
        )
        self.matrices = matrices
        self._of_param = [[m for m in matrices if m.param == index] for index in range(len(place.params))]

    def allocate(self) -> None:
        """Take the memory, and keep the tiles' values as their originals."""
        super().allocate()
        where = self._device if self.on_device else torch.device("cpu")
        self.original = self.values()[self._lo : self._hi].to(where, copy=True)
        self._start_from(self.original)

    @property
    def state_bytes(self) -> int:
        """Return the bytes of this rank's masters and moments."""
        return (self._hi - self._lo) * (self._state_bytes - self._original_bytes)

    # -- gradients -----------------------------------------------------------------------------------------------------

    def tapped(self, index: int, x: Tensor, dy: Tensor) -> None:
        self._begin()
        (tiles,) = self._of_param[index]
        tiles.add_product(tiles.part(self._acc), *as_matrices(x, dy))
        self._received(index)

    def _kept(self, index: int) -> Tensor | None:
        (tiles,) = self._of_param[index]
        return tiles.keep

    def add_gradient(self, index: int, grad: Tensor) -> None:
        """Add the tiles' part of a whole gradient that autograd made.

        It makes one of a stacked expert tensor, and of a weight that the program reads outside its layer.
        """
        for tiles in self._of_param[index]:
            tiles.add_gradient(tiles.part(self._acc), tiles.matrix(grad))

    # -- stages --------------------------------------------------------------------------------------------------------

    def change(self, reply: Tensor) -> None:
        for index, (_, p) in enumerate(self.params):
            for tiles in self._of_param[index]:
                for piece in self.weights.pieces(p, tiles.expert, write_only=True):
                    tiles.write(piece, tiles.part(reply))
            self.weights.changed(p)

    # -- values --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def values(self) -> Tensor:
        """Read the tiles from the weights: flat [numel] in their dtype, on the device.

        Collective where weights are partitioned.
        """
        parts = []
        for index, (_, p) in enumerate(self.params):
            with self.weights.whole([p]):
                parts += [tiles.read(tiles.matrix(p.detach())) for tiles in self._of_param[index]]
        return torch.cat(parts)

    def originals(self) -> Tensor:
        """Return what the tiles were before training: flat [numel] in their dtype, on the device. Collective."""
        return self.gathered(self.original)

    def _show(self, index: int, flat: Tensor, whole: Tensor) -> None:
        for tiles in self._of_param[index]:
            for piece in WHOLE.pieces(whole, tiles.expert):
                tiles.write(piece, tiles.part(flat))

    def _own_parts(self, index: int, whole: Tensor) -> Iterator[tuple[int, Tensor]]:
        for tiles in self._of_param[index]:
            lo, hi = max(self._lo, tiles.offset), min(self._hi, tiles.offset + tiles.numel)
            if lo < hi:
                yield lo - self._lo, tiles.read(tiles.matrix(whole))[lo - tiles.offset : hi - tiles.offset]

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        return {**super().state_tensors(), "original": self.original}
