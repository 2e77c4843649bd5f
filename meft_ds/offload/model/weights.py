# SPDX-License-Identifier: Apache-2.0
"""The model's weights as units see them: whole on every rank, or partitioned over ranks (ZeRO-3).

A partitioned parameter is empty between the forwards and backwards that read it; its shape is in `ds_shape`, and each
rank holds a contiguous slice of it, flattened. `meft_ds.plugin.zero3` knows how to get at those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def shape_of(p: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, partitioned or not."""
    return getattr(p, "ds_shape", p.shape)


def numel_of(p: Tensor) -> int:
    """Return the elements of the whole parameter."""
    return shape_of(p).numel()


@dataclass(frozen=True, eq=False)
class Piece:
    """A rectangle of a matrix [m, n] that this rank writes.

    Attributes:
        weight: [rows, cols], a view of what the rank holds.
        rows, cols: where the rectangle lies in the matrix.
        first: number of its first element in the matrix, row by row; None where the piece is the whole matrix.
    """

    weight: Tensor
    rows: slice
    cols: slice
    first: int | None = None


class Weights:
    """Parameters that are whole on every rank.

    Attributes:
        partitioned: whether ranks hold slices, and parameters may be read only inside `whole` or their module's forward
            and backward.
        anchor: a tensor that requires grad, in the place of the weights of tapped layers under ZeRO-3. Those must not
            require grad themselves, because their storage is swapped; a layer's output is tied to this tensor instead,
            so that autograd still comes by.
    """

    partitioned = False
    anchor: Tensor | None = None

    @contextlib.contextmanager
    def whole(self, params: Sequence[Tensor], *, change: bool = False) -> Iterator[None]:
        """Show `params` whole inside; with `change` every rank may write the same into them. Collective."""
        yield

    def partition_again(self) -> None:
        """Take back to slices what is still gathered: a forward or backward that an exception ended holds its own."""

    def pieces(self, p: Tensor, expert: int | None = None, *, write_only: bool = False) -> Iterator[Piece]:
        """Yield the rectangles of `p` [m, n], or of matrix `expert` of `p` [experts, m, n], that this rank writes.

        The caller writes them in place under `no_grad` and calls `changed` after the last one. With `write_only` it
        does not read them, so they may lie on another device than the model.
        """
        # detached, not .data: a forward that read the old weights and has yet to run backward must fail, not be wrong
        whole = p.detach() if expert is None else p.detach()[expert]
        yield Piece(whole, slice(0, whole.shape[0]), slice(0, whole.shape[1]))

    def changed(self, p: Tensor) -> None:
        """Say that pieces of `p` were written; nobody reads the parameter now."""

    def write(self, p: Tensor, flat: Tensor) -> None:
        """Give a parameter all new values, flat [numel]; under no_grad."""
        # not p.data: a forward that read the old weights and has yet to run backward must fail, not be wrong
        p.copy_(flat.view_as(p))


WHOLE = Weights()


def rectangles(lo: int, hi: int, n: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Yield elements [lo, hi) of a row-major matrix with n columns as at most three rectangles.

    Each holds elements that follow each other: (first element, end, rows, columns).
    """
    while lo < hi:
        row, col = divmod(lo, n)
        whole = (hi - lo) // n if col == 0 else 0
        if whole:
            end = lo + whole * n
            yield lo, end, slice(row, row + whole), slice(0, n)
        else:
            end = min(hi, (row + 1) * n)
            yield lo, end, slice(row, row + 1), slice(col, col + end - lo)
        lo = end
