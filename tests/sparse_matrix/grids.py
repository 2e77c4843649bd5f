# SPDX-License-Identifier: Apache-2.0
"""Sites made by hand, and every tile of them by brute force."""

from __future__ import annotations

import torch
from torch import nn

from meft_ds.sparse_matrix.choice.choice import Tile
from meft_ds.sparse_matrix.discover import Site


def cuts(*sizes: int, side: int) -> tuple[tuple[int, int], ...]:
    found, start = [], 0
    for size in sizes:
        found += [(low, min(low + side, start + size)) for low in range(start, start + size, side)]
        start += size
    return tuple(found)


def site(
    name: str,
    shape: tuple[int, ...],
    side: int = 4,
    parts: dict[str, int] | None = None,
    input_first: bool = False,
    layer: int | None = 0,
) -> Site:
    """`parts`: role -> size along the output dimension; by default one, the name's."""
    m, n = shape[-2:]
    parts = parts or {name: n if input_first else m}
    outer, inner = cuts(*parts.values(), side=side), cuts(m if input_first else n, side=side)
    roles = tuple(role for role, size in parts.items() for _ in cuts(size, side=side))
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(len(name))))
    rows, cols = (inner, outer) if input_first else (outer, inner)
    return Site(name, nn.Module(), weight, input_first, False, rows, cols, roles, layer)


def every_tile(sites: list[Site], scores: dict[str, torch.Tensor]) -> list[Tile]:
    """In order, each with its score."""
    return [
        Tile(
            name=s.name,
            expert=e if s.weight.dim() == 3 else None,
            rows=rows,
            cols=cols,
            role=s.role(r, c),
            layer=s.layer,
            score=float(scores[s.name][e, r, c]),
        )
        for s in sites
        for e in range(s.experts)
        for r, rows in enumerate(s.rows)
        for c, cols in enumerate(s.cols)
    ]
