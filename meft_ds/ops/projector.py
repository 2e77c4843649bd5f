# SPDX-License-Identifier: Apache-2.0
"""Sparse projectors: P in R^{m x d} with k nonzeros in each row, columns of length 1.

The d columns are cut into k strata whose sizes differ by at most one. Nonzero c of every row lies in stratum c, so no
row has a column twice. The columns of one stratum share no row, so they are exactly orthogonal. Rows are dealt evenly
over the columns of a stratum, so no column is empty while m >= d / k.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from meft_ds import ops

GatherList = tuple[Tensor, Tensor]
"""(index [o, w], value [o, w]) as the sketch kernels take it."""


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed made from names and numbers, the same on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True, eq=False)
class Projector:
    """P in R^{m x d}, immutable. All tensors lie on one device.

    Example:
        >>> p = Projector.draw(4096, 1024, 4, seed_of("mine", 0), torch.device("cpu"))
        >>> s = compress(grad, p, q)

    Attributes:
        row_index: int16 (uint16 bits) or int32 [m, k], ascending in each row: the columns of row i.
        row_value: float16 [m, k].
        dim: d.
    """

    row_index: Tensor
    row_value: Tensor
    dim: int
    _columns: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def draw(cls, m: int, d: int, k: int, seed: int, device: torch.device) -> Projector:
        """Return a projector with random positions and signs.

        Args:
            m, d, k: rows, columns, nonzeros of a row.
            seed: decides the draw, the same one on every kind of device.
            device: where the tensors lie.

        Raises:
            ValueError: unless 1 <= k <= d.
        """
        if not 1 <= k <= d:
            raise ValueError(f"a projector of dimension {d} cannot have {k} nonzeros in a row; lower nonzeros")
        # on the CPU, because generators of other devices draw other numbers from the same seed
        g = torch.Generator().manual_seed(seed)
        bounds = [d * c // k for c in range(k + 1)]
        at = torch.empty(m, k, dtype=torch.int64, device="cpu")
        for c in range(k):
            size = bounds[c + 1] - bounds[c]
            deal = torch.randperm(m, generator=g, device="cpu") % size
            at[:, c] = bounds[c] + torch.randperm(size, generator=g, device="cpu")[deal]
        sign = torch.randint(0, 2, (m, k), generator=g, device="cpu").to(torch.float32) * 2 - 1
        drawn = cls(_narrow(at, d).to(device), sign.half().to(device), d)
        return drawn.with_values(drawn.row_value.float())

    @property
    def m(self) -> int:
        """How many rows P has."""
        return self.row_index.shape[0]

    @property
    def k(self) -> int:
        """How many nonzeros each row has."""
        return self.row_index.shape[1]

    @property
    def positions(self) -> Tensor:
        """`row_index` unpacked: int64 [m, k]."""
        return ops.positions(self.row_index)

    @property
    def rows(self) -> GatherList:
        """The row view, each [m, k]."""
        return self.row_index, self.row_value

    @cached_property
    def columns(self) -> GatherList:
        """Return the column view [d, w]: rows of each column, ascending, and their values. Short columns are padded."""
        slots, index = self._slots()
        value = torch.zeros(index.shape, dtype=torch.float16, device=index.device)
        value.view(-1)[slots] = self.row_value.view(-1)
        return index, value

    def with_values(self, values: Tensor) -> Projector:
        """Return the same positions with values fp32 [m, k], scaled to columns of length 1. Empty columns stay 0."""
        value = self.normalised(values).half()
        # What fp16 cannot hold must stay present: a zero would hide an infinite gradient from the overflow check.
        lost = (value == 0) & (values != 0)
        return self.holding(torch.where(lost, torch.full_like(value, 2.0**-24), value).contiguous())

    def holding(self, value: Tensor) -> Projector:
        """Return the same positions with these values, float16 [m, k]."""
        return Projector(self.row_index, value, self.dim, self._slots())

    def normalised(self, values: Tensor) -> Tensor:
        """Return values fp32 [m, k], each divided by the length of its column."""
        length = self.column_sums(values.square()).sqrt()
        return values / torch.where(length > 0, length, torch.ones_like(length))[self.positions]

    def column_sums(self, values: Tensor) -> Tensor:
        """Return sums over columns, fp32 [d], of values fp32 [m, k] at the nonzeros; the same bits on every run."""
        slots, index = self._slots()
        padded = torch.zeros(index.numel(), device=values.device)
        padded[slots] = values.reshape(-1)
        return padded.view(index.shape).sum(1)

    def dense(self) -> Tensor:
        """Return P as float32 [m, d], for tests and small problems."""
        out = torch.zeros(self.m, self.dim, device=self.row_index.device)
        return out.scatter_(1, self.positions, self.row_value.float())

    def nbytes(self) -> int:
        """Return the bytes of both views."""
        return sum(t.numel() * t.element_size() for t in (*self.rows, *self.columns))

    def digest(self) -> str:
        """Return a hash of positions and values, to compare ranks by."""
        parts = [t.contiguous().cpu().view(torch.uint8).numpy().tobytes() for t in self.rows]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def _slots(self) -> tuple[Tensor, Tensor]:
        """Return where nonzero (i, c) lies in the flattened column view, and that view's index."""
        if self._columns is not None:
            return self._columns
        m, k, d = self.m, self.k, self.dim
        column = self.positions.view(-1)
        order = torch.argsort(column, stable=True)  # row-major before, so rows ascend within a column
        count = torch.bincount(column, minlength=d)
        first = torch.cumsum(count, 0) - count
        width = max(int(count.max()), 1)
        ranked = torch.empty_like(column)
        ranked[order] = torch.arange(m * k, device=column.device)
        slots = column * width + ranked - first[column]
        index = torch.zeros(d * width, dtype=torch.int64, device=column.device)
        index[slots] = torch.arange(m * k, device=column.device) // k
        return slots, _narrow(index.view(d, width), m)


def overlap(a: Projector, b: Projector) -> Tensor:
    """Return A^T B, float64 [d_a, d_b]; both have m rows. Sums are float32, each in one fixed order."""
    return ops.combine(b.dense(), *a.columns).double()


def block_diagonal(a: Projector, b: Projector) -> Projector:
    """Return [[A, 0], [0, B]]: one product for two halves side by side. Both have k nonzeros in a row."""
    dim = a.dim + b.dim
    at = torch.cat([a.positions, b.positions + a.dim])
    return Projector(_narrow(at, dim), torch.cat([a.row_value, b.row_value]), dim)


def compress(g: Tensor, p: Projector, q: Projector) -> Tensor:
    """Return S = P^T G Q, float32 [d_p, d_q], of a gradient [m, n] (LSP-Offload, eq. 4)."""
    return ops.combine(ops.sketch(g.contiguous(), *q.columns, torch.float32), *p.columns)


def expand(s: Tensor, p: Projector, q: Projector) -> Tensor:
    """Return P S Q^T, float32 [m, n]."""
    return ops.sketch(ops.combine(s.contiguous(), *p.rows), *q.rows)


def _narrow(at: Tensor, below: int) -> Tensor:
    """Return int64 positions below `below` in as few bytes as hold them; int16 holds uint16 bits."""
    if below > 1 << 16:
        return at.to(torch.int32)
    return torch.where(at >= 1 << 15, at - (1 << 16), at).to(torch.int16)
