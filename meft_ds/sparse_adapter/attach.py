# SPDX-License-Identifier: Apache-2.0
"""Puts adapters beside a model's FFNs by forward hooks.

Hooks are small objects, not closures, so that ``copy.deepcopy`` of a model copies them together with their adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from meft_ds.sparse_adapter.config import ResolvedSparseAdapter
from meft_ds.sparse_adapter.discover import Site, find_ffns
from meft_ds.sparse_adapter.forward.router import init_keys, init_router
from meft_ds.sparse_adapter.layer import SparseAdapter
from meft_ds.sparse_adapter.masks import TokenMask, follow
from meft_ds.sparse_adapter.rows.source import RowSource

__all__ = ["ADAPTER_NAME", "Site", "attach", "detach", "find_adapters", "find_ffns"]

ADAPTER_NAME = "meft_adapter"
"""Name of the adapter as a submodule of its FFN (of the layer where the FFN is no module of its own)."""

_STATE_NAME = "_meft_attachment"


def attach(
    model: nn.Module,
    config: ResolvedSparseAdapter,
    sites: Sequence[Site] | None = None,
    make_rows: Callable[[int, Tensor], RowSource] | None = None,
) -> list[SparseAdapter]:
    """Add an adapter at every site; return them in the order of the layers.

    sites: None = ``find_ffns(model, config.target_modules)``. make_rows(layer, keys fp32 [r, d]) gives a layer its
    rows; without it the caller sets ``adapter.rows`` before the first forward. Routers are created in the dtype and on
    the device of the FFN they sit beside, from ``config.seed`` and the layer's number only. Raises ValueError for a
    model that already has adapters. Nothing is changed in the model unless all adapters could be made.
    """
    if find_adapters(model):
        raise ValueError(f"{type(model).__name__} already has sparse adapters; meft_ds.detach(model) removes them")
    sites = find_ffns(model, config.target_modules) if sites is None else sites
    adapters = []
    for layer, site in enumerate(sites):
        keys = init_keys(config.rows, config.d, config.init_std, config.seed, layer)
        like = next((p for p in site.module.parameters() if p.is_floating_point()), None)
        router = init_router(keys, config.experts, config.router_scale)
        if like is not None:
            router = router.to(like.device, like.dtype)
        rows = None if make_rows is None else make_rows(layer, keys)
        adapters.append(SparseAdapter(config, router, rows, layer))
    place(model, sites, adapters)
    return adapters


def place(model: nn.Module, sites: Sequence[Site], adapters: Sequence[SparseAdapter]) -> None:
    """Add finished adapters as submodules and register all hooks."""
    mask = TokenMask()
    handles: list[Any] = follow(model, [site.reads for site in sites], mask)
    for site, adapter in zip(sites, adapters, strict=True):
        adapter.train(model.training)
        site.module.add_module(ADAPTER_NAME, adapter)
        beside = _Beside(site.name, adapter, mask)
        first, last = site.module.get_submodule(site.first), site.module.get_submodule(site.last)
        handles.append(first.register_forward_pre_hook(beside.before, with_kwargs=True))
        handles.append(last.register_forward_hook(beside.after))
    setattr(model, _STATE_NAME, (handles, [site.module for site in sites]))


def detach(model: nn.Module) -> None:
    """Remove adapters and hooks; the model is what it was before ``attach``."""
    handles, modules = getattr(model, _STATE_NAME, ([], []))
    for handle in handles:
        handle.remove()
    for module in modules:
        delattr(module, ADAPTER_NAME)
    if hasattr(model, _STATE_NAME):
        delattr(model, _STATE_NAME)


def find_adapters(model: nn.Module) -> dict[str, SparseAdapter]:
    """Return the adapters of a model by the name of the module they sit in, in the order of the layers."""
    found = {
        name.removesuffix(f".{ADAPTER_NAME}"): module
        for name, module in model.named_modules()
        if isinstance(module, SparseAdapter)
    }
    return dict(sorted(found.items(), key=lambda item: item[1].layer))


class _Beside:
    """Adds the adapter's output to an FFN's, or to the first of several outputs, as of a mixture-of-experts block."""

    def __init__(self, name: str, adapter: SparseAdapter, mask: TokenMask) -> None:
        self.name, self.adapter, self.mask = name, adapter, mask
        self._x: Tensor | None = None

    def before(self, first: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._x = (
            args[0] if args else kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))
        )

    def after(self, last: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x, self._x = self._x, None
        assert x is not None, f"{self.name}: the end of the FFN ran without its beginning"
        own = output[0] if isinstance(output, tuple) else output
        if not isinstance(own, Tensor) or own.numel() != x.numel() or own.shape[-1] != x.shape[-1]:
            found = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
            raise ValueError(
                f"sparse_adapter: {self.name} is no feed-forward network: it gives {found} for an input of shape "
                f"{tuple(x.shape)}; name others by target_modules"
            )
        y = own + self.adapter(x, self.mask.of(x), repeatable=self.mask.trained).view(own.shape)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def __deepcopy__(self, memo: dict[int, Any]) -> _Beside:
        return _Beside(self.name, copy.deepcopy(self.adapter, memo), copy.deepcopy(self.mask, memo))
