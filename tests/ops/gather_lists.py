# SPDX-License-Identifier: Apache-2.0
"""Random sparse projectors for tests and benchmarks: both views of one, and the dense matrix that they stand for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Projector(NamedTuple):
    rows: tuple[Tensor, Tensor]  # row view: index, value [m, k]
    columns: tuple[Tensor, Tensor]  # column view: index, value [d, w], padded with index 0, value 0
    dense: Tensor  # float32 [m, d]


def projector(m: int, d: int, k: int, seed: int, dtype: torch.dtype = torch.int16, empty: int = 0) -> Projector:
    """k nonzeros in every row, at columns drawn freely: they differ in length, and the last `empty` have none."""
    g = torch.Generator().manual_seed(seed)
    at = torch.rand(m, d - empty, generator=g).argsort(1)[:, :k]
    value = (torch.randn(m, k, generator=g) + 2).half()
    dense = torch.zeros(m, d).scatter_(1, at, value.float())
    column, row = dense.t().nonzero().unbind(1)
    lengths = torch.bincount(column, minlength=d)
    place = torch.arange(column.numel()) - (lengths.cumsum(0) - lengths)[column]
    index, factor = torch.zeros(2, d, int(lengths.max()), dtype=torch.int64)
    index[column, place], factor = row, factor.half()
    factor[column, place] = dense[row, column].half()
    return Projector((at.to(dtype), value), (index.to(dtype), factor), dense)
