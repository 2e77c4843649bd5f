# SPDX-License-Identifier: Apache-2.0
"""An independent, dense, masked form of the adapter in plain torch with autograd, and builders of small cases."""

from __future__ import annotations

import torch
from torch import Tensor

from meft_ds.sparse_adapter.config import ResolvedSparseAdapter, SparseAdapterConfig
from meft_ds.sparse_adapter.layer import SparseAdapter
from meft_ds.sparse_adapter.rows.source import DeviceRows


def dense_adapter(
    x: Tensor, rows: Tensor, router: Tensor, config: ResolvedSparseAdapter, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y [T, d], selected bool [T, r]); selection by Python's sort, the rest by autograd over all r rows."""
    T, d = x.shape
    keys, values = rows[:, :d], rows[:, d:]
    owner = torch.cat(
        [torch.full((len(part),), e) for e, part in enumerate(torch.arange(config.rows).tensor_split(config.experts))]
    )
    p = x @ router.t()
    q = x @ keys.t()
    s = p[:, owner] * q if config.gate else q
    selected = torch.zeros(T, config.rows, dtype=torch.bool)
    for t in range(T):
        if tokens is not None and not tokens[t]:
            continue
        order = sorted(range(config.experts), key=lambda e: (-p[t, e].item(), e))[: config.experts_per_token]
        candidates = [j for j in range(config.rows) if owner[j].item() in order and s[t, j].item() > 0]
        best = sorted(candidates, key=lambda j: (-s[t, j].item(), j))[: config.keys_per_token]
        selected[t, best] = True
    used = selected
    if config.scope == "batch":
        used = selected.any(0, keepdim=True).expand(T, -1)
        if tokens is not None:
            used = used & tokens[:, None]
    return torch.relu(s * used) @ values, selected


def grid(*shape: int, generator: torch.Generator) -> Tensor:
    """Quarters from -1 to 1: sums and products are exact in fp32, ties and zeros are common."""
    return torch.randint(-4, 5, shape, generator=generator) / 4


def make_adapter(
    config: ResolvedSparseAdapter, rows: Tensor, router: Tensor, capacity: int | None = None, *, union: bool = False
) -> SparseAdapter:
    source = DeviceRows(rows.clone(), selection=config.selection, capacity=capacity, trainable=True)
    adapter = SparseAdapter(config, router.clone(), source)
    adapter.union |= union
    return adapter


def rows_grad(adapter: SparseAdapter) -> Tensor:
    """Accumulated row gradients, zeros when no row was active."""
    source = adapter.rows
    assert isinstance(source, DeviceRows)
    return torch.zeros(source.r, 2 * source.d) if source.grad is None else source.grad


def small_config(d: int = 16, **given: object) -> ResolvedSparseAdapter:
    settings: dict[str, object] = {"rows": 50, "experts": 8, "experts_per_token": 3, "keys_per_token": 6}
    return SparseAdapterConfig(**{**settings, **given}).resolve(d)  # type: ignore[arg-type]


def random_adapter(
    config: ResolvedSparseAdapter, seed: int = 0, capacity: int | None = None, *, union: bool = False
) -> SparseAdapter:
    """Keys, values and router all random, so that every gradient is alive."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(config.rows, 2 * config.d, generator=g)
    router = torch.randn(config.experts, config.d, generator=g) / config.d**0.5
    return make_adapter(config, rows, router, capacity, union=union)
