# SPDX-License-Identifier: Apache-2.0
"""The chosen tiles of one matrix: where they lie in it and in a flat payload, and their gradients.

Tiles that share their columns (or their rows, whichever gives fewer) form a *group* of scattered rows and columns. Each
group is one GEMM, one read and one write, so nothing loops over tiles. A matrix whose tiles are all chosen is one
group: its gradient costs what the dense one does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meft_ds.offload.model.weights import Piece

Range = tuple[int, int]
RowsCols = tuple[Range, Range]
_Index = Tensor | slice


@dataclass(frozen=True, eq=False)
class TileGroup:
    """Tiles whose union is rows x cols.

    Attributes:
        row_ranges, col_ranges: of the tiles.
        shape: number of rows and columns.
        offset: where the group's values [rows, cols] begin in the matrix's payload.
        rows, cols: indices of them all in the matrix; slices where they follow each other.
        inputs: indices of the group's input features among those that the matrix keeps.
    """

    row_ranges: tuple[Range, ...]
    col_ranges: tuple[Range, ...]
    shape: tuple[int, int]
    offset: int
    rows: _Index
    cols: _Index
    inputs: _Index

    def of(self, flat: Tensor) -> Tensor:
        """Return the group's values [rows, cols] in the matrix's payload, a view."""
        return flat[self.offset : self.offset + self.shape[0] * self.shape[1]].view(self.shape)

    def read(self, weight: Tensor) -> Tensor:
        """Return the group's values [rows, cols] in a weight [m, n]."""
        if isinstance(self.rows, slice) and isinstance(self.cols, slice):
            return weight[self.rows, self.cols]
        return _take(_take(weight, self.rows, 0), self.cols, 1)

    def write(self, weight: Tensor, values: Tensor) -> None:
        """Put the group's values into a weight [m, n]."""
        values = values.to(weight.device)  # what ZeRO-3's offload_param holds is on the host
        if isinstance(self.rows, slice) and isinstance(self.cols, slice):
            weight[self.rows, self.cols].copy_(values)
        elif isinstance(self.rows, slice):
            weight[self.rows].index_copy_(1, self.cols, values)  # type: ignore[arg-type]
        elif isinstance(self.cols, slice):
            weight[:, self.cols].index_copy_(0, self.rows, values)
        else:
            weight.index_put_((self.rows[:, None], self.cols[None, :]), values)

    def within(self, piece: Piece) -> _Part | None:
        """Return what of the group lies in a piece of the weight; None where that is nothing."""
        a, b = (_count(self.row_ranges, edge) for edge in (piece.rows.start, piece.rows.stop))
        c, d = (_count(self.col_ranges, edge) for edge in (piece.cols.start, piece.cols.stop))
        if a == b or c == d:
            return None
        inside = replace(
            self,
            shape=(b - a, d - c),
            rows=_from(self.rows, a, b, piece.rows.start, piece.weight.device),
            cols=_from(self.cols, c, d, piece.cols.start, piece.weight.device),
        )
        return self, inside, slice(a, b), slice(c, d)


# a group, the part of it that lies in a piece with indices counted there, and which of the group's values that part has
_Part = tuple[TileGroup, TileGroup, slice, slice]


class Tiles:
    """Chosen tiles of one matrix.

    Args:
        param: index of the weight in its unit.
        expert: index along the first dimension of a stacked weight, or None.
        tiles: ((row lo, row hi), (col lo, col hi)) of each, without overlap.
        input_first: the weight is [in, out].
        features: size of its input dimension.
        offset: of the matrix's values in its unit's payload.
        device: where the weight is.
    """

    def __init__(
        self,
        *,
        param: int,
        expert: int | None,
        tiles: Iterable[RowsCols],
        input_first: bool,
        features: int,
        offset: int,
        device: torch.device,
    ) -> None:
        self.param, self.expert, self.input_first, self.offset = param, expert, input_first, offset
        grouped = _grouped(list(tiles))
        used = sorted({r for rows, cols in grouped for r in (rows if input_first else cols)})
        kept = torch.zeros(features, dtype=torch.bool, device="cpu")
        for lo, hi in used:
            kept[lo:hi] = True
        self.keep: Tensor | None = None if bool(kept.all()) else kept.nonzero()[:, 0].to(device)
        among_kept = kept.cumsum(0) - 1
        self.groups: list[TileGroup] = []
        self._parts: dict[tuple[int, int, int, int], list[_Part]] = {}
        self.numel = 0
        for row_ranges, col_ranges in grouped:
            rows, cols = _indices(row_ranges), _indices(col_ranges)
            self.groups.append(
                TileGroup(
                    row_ranges=row_ranges,
                    col_ranges=col_ranges,
                    shape=(len(rows), len(cols)),
                    offset=self.numel,
                    rows=_as_slice(rows, device),
                    cols=_as_slice(cols, device),
                    inputs=_as_slice(among_kept[rows if input_first else cols], device),
                )
            )
            self.numel += len(rows) * len(cols)

    def part(self, flat: Tensor) -> Tensor:
        """Return the matrix's part of its unit's payload, a view."""
        return flat[self.offset : self.offset + self.numel]

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the matrix [m, n] in its weight, a view."""
        return weight if self.expert is None else weight[self.expert]

    def add_product(self, acc: Tensor, x: Tensor, dy: Tensor) -> None:
        """Add the tiles' gradient dY^T X to the payload `acc` (float32) of this matrix.

        x [tokens, kept], dy [tokens, out], of one dtype.
        """
        for group in self.groups:
            given = _take(x, group.inputs, 1)
            if self.input_first:
                _add_mm(group.of(acc), given, _take(dy, group.cols, 1))
            else:
                _add_mm(group.of(acc), _take(dy, group.rows, 1), given)

    def add_gradient(self, acc: Tensor, grad: Tensor) -> None:
        """Add the tiles' gradient to the payload `acc` (float32) of this matrix, from a whole gradient [m, n]."""
        for group in self.groups:
            group.of(acc).add_(group.read(grad))

    def read(self, weight: Tensor) -> Tensor:
        """Return the tiles' values in a weight [m, n], flat [numel]."""
        return torch.cat([group.read(weight).reshape(-1) for group in self.groups])

    def write(self, piece: Piece, flat: Tensor) -> None:
        """Put the tiles' values, flat [numel], into a piece of the weight, as far as they lie in it."""
        if piece.first is None:
            for group in self.groups:
                group.write(piece.weight, group.of(flat))
            return
        where = piece.rows.start, piece.rows.stop, piece.cols.start, piece.cols.stop
        if where not in self._parts:  # a rank's pieces are the same in every step
            self._parts[where] = [part for group in self.groups if (part := group.within(piece)) is not None]
        for group, inside, rows, cols in self._parts[where]:
            inside.write(piece.weight, group.of(flat)[rows, cols])

    def tiles(self, flat: Tensor) -> Iterator[tuple[RowsCols, Tensor]]:
        """Yield each tile with its values in the matrix's payload, a view."""
        for group in self.groups:
            values, at = group.of(flat), 0
            for rows in group.row_ranges:
                below, left = at + rows[1] - rows[0], 0
                for cols in group.col_ranges:
                    right = left + cols[1] - cols[0]
                    yield (rows, cols), values[at:below, left:right]
                    left = right
                at = below


def _grouped(tiles: list[RowsCols]) -> list[tuple[tuple[Range, ...], tuple[Range, ...]]]:
    """Return the groups (row ranges, column ranges) that cover the tiles exactly."""
    by_rows = _merged(tiles)
    by_cols = _merged([(cols, rows) for rows, cols in tiles])
    if len(by_cols) < len(by_rows):
        return sorted((rows, cols) for cols, rows in by_cols)
    return by_rows


def _merged(tiles: list[RowsCols]) -> list[tuple[tuple[Range, ...], tuple[Range, ...]]]:
    cols_of: dict[Range, list[Range]] = defaultdict(list)
    for rows, cols in sorted(tiles):
        cols_of[rows].append(cols)
    rows_of: dict[tuple[Range, ...], list[Range]] = defaultdict(list)
    for rows, all_cols in cols_of.items():
        rows_of[tuple(all_cols)].append(rows)
    return sorted((tuple(all_rows), cols) for cols, all_rows in rows_of.items())


def _indices(ranges: Iterable[Range]) -> Tensor:
    return torch.cat([torch.arange(lo, hi, device="cpu") for lo, hi in ranges])


def _as_slice(index: Tensor, device: torch.device) -> _Index:
    """Return a slice where the indices follow each other: a view is cheaper than a copy."""
    first, count = int(index[0]), len(index)
    if bool((index == torch.arange(first, first + count, device="cpu")).all()):
        return slice(first, first + count)
    return index.to(device)


def _count(ranges: Iterable[Range], edge: int) -> int:
    """Return how many indices of the ranges are below an edge."""
    return sum(min(max(edge - lo, 0), hi - lo) for lo, hi in ranges)


def _from(index: _Index, first: int, end: int, origin: int, device: torch.device) -> _Index:
    """Return the indices [first, end) of `index`, counted from `origin`, on a device."""
    if isinstance(index, slice):
        return slice(index.start + first - origin, index.start + end - origin)
    return (index[first:end] - origin).to(device)


def _take(t: Tensor, index: _Index, dim: int) -> Tensor:
    if isinstance(index, slice):
        return t[:, index] if dim == 1 else t[index]
    return t.index_select(dim, index)


def _add_mm(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a^T b to `acc`, in float32."""
    if a.dtype == torch.float32:
        acc.addmm_(a.t(), b)
    else:
        acc.add_(a.t() @ b)
