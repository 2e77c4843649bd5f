# SPDX-License-Identifier: Apache-2.0
"""Adapters that are in the model already, of an engine before this one or of ``load_adapter``: a new engine goes on
with their rows and routers, in the memory where the rows lie if that is a store."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from meft_ds.sparse_adapter.attach import Site, detach, find_adapters
from meft_ds.sparse_adapter.config import ResolvedSparseAdapter
from meft_ds.sparse_adapter.layer import SparseAdapter
from meft_ds.sparse_adapter.rows.host import HostRows

# what a new engine may choose anew: how rows are moved and updated, and how they would have begun
_FREE = {"selection", "optimizer", "cache_rows", "balance_loss"}
_FREE |= {"router_scale", "init_std", "seed", "target_modules"}

# made by an engine of this process, so a node's ranks share them as the next engine's would; copies are not in it
_stores: weakref.WeakSet[HostRows] = weakref.WeakSet()


def take_over(model: nn.Module, sizes: ResolvedSparseAdapter, sites: Sequence[Site]) -> list[SparseAdapter]:
    """Return ``model``'s adapters in the order of the layers, with the new settings; none if none can go on.

    Raises ValueError when they compute another function than ``sizes`` at ``sites`` asks for; nothing has been changed
    then. Adapters that never got rows, of a start that failed, are removed.
    """
    found = find_adapters(model)
    if not holds_rows(model):
        for module in list(model.modules()):
            detach(module)
        return []
    differing = []
    here, wanted = list(found), [site.name for site in sites]
    if here != wanted:
        other = sorted({*here} ^ {*wanted})
        differing.append(f"the places {', '.join(other[:4])}{' ...' if len(other) > 4 else ''}")
    old = next(iter(found.values())).config
    for key in (f.name for f in fields(ResolvedSparseAdapter) if f.name not in _FREE):
        if getattr(old, key) != getattr(sizes, key):
            differing.append(f"{key}: {getattr(old, key)} in the model, {getattr(sizes, key)} in the block")
    if differing:
        raise ValueError(
            f"{type(model).__name__} already has sparse adapters, and an engine would go on with what they have "
            f"learned, but they differ from sparse_adapter in the block ({'; '.join(differing)}); make the settings "
            "equal, or call meft_ds.detach(model), which removes the adapters and what they have learned"
        )
    for adapter in found.values():
        adapter.config = sizes
        adapter.end_window()
    return list(found.values())


def holds_rows(model: nn.Module) -> bool:
    """Return whether there are adapters to go on with."""
    return any(hasattr(adapter, "rows") for adapter in find_adapters(model).values())


def kept_store(adapter: SparseAdapter, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Return (masters, replicas) of the engine before, if a new one can go on in them: no memory is taken twice."""
    rows = getattr(adapter, "rows", None)
    if not isinstance(rows, HostRows) or rows not in _stores or rows.dtype != dtype:
        return None
    return rows.store


def learned_rows(adapter: SparseAdapter) -> Tensor | None:
    """Return the rows [r, 2 d] to begin with, where they are; None: new ones."""
    return adapter.rows.master if hasattr(adapter, "rows") else None


def fill_rows(master: Tensor, replica: Tensor, learned: Tensor, lo: int, hi: int) -> None:
    """Write rows [lo, hi) of a new store."""
    master[lo:hi] = learned[lo:hi].detach().to(master.device, master.dtype)
    if replica is not master:
        replica[lo:hi] = master[lo:hi]


def give_rows(adapter: SparseAdapter, rows: HostRows) -> None:
    """Let the adapter compute with ``rows`` from now on."""
    if hasattr(adapter, "rows"):
        del adapter.rows  # loaded ones are a submodule, which an attribute cannot take the place of
    adapter.rows = rows
    _stores.add(rows)
