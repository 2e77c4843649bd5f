# SPDX-License-Identifier: Apache-2.0
"""Puts adapters beside a model's FFNs by forward hooks, and tells them which tokens are padding.

Hooks are small objects, not closures, so that ``copy.deepcopy`` of a model copies them together with their adapters.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from meft_ds.offload.checkpointing import feed_checkpoints
from meft_ds.sparse_adapter.config import ResolvedSparseAdapter
from meft_ds.sparse_adapter.discover import Site, find_ffns
from meft_ds.sparse_adapter.module import SparseAdapter
from meft_ds.sparse_adapter.router import init_keys, init_router
from meft_ds.sparse_adapter.rows import RowSource

__all__ = ["ADAPTER_NAME", "Site", "attach", "detach", "find_adapters", "find_ffns"]

logger = logging.getLogger(__name__)

ADAPTER_NAME = "meft_adapter"
"""Name of the adapter as a submodule of its FFN (of the decoder layer for OPT)."""

_STATE_NAME = "_meft_attachment"


def attach(
    model: nn.Module,
    config: ResolvedSparseAdapter,
    sites: Sequence[Site] | None = None,
    make_rows: Callable[[int, Tensor], RowSource] | None = None,
) -> list[SparseAdapter]:
    """Adds an adapter at every site; returns them in the order of the layers.

    sites: None = ``find_ffns(model, config.target_modules)``. make_rows(layer, keys fp32 [r, d]) gives a layer its
    rows; without it the caller sets ``adapter.rows`` before the first forward. Routers are created in the dtype and on
    the device of the FFN they sit beside, from ``config.seed`` and the layer's number only. Raises ValueError for a
    model that already has adapters. Nothing is changed in the model unless all adapters could be made.
    """
    if find_adapters(model):
        raise ValueError(f"{type(model).__name__} already has sparse adapters; detach(model) removes them")
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
    """Adds finished adapters as submodules and registers all hooks."""
    mask = _TokenMask()
    handles: list[Any] = [
        model.register_forward_pre_hook(_TakeMask(mask), with_kwargs=True),
        model.register_forward_hook(_DropMask(mask), always_call=True),
    ]
    for site, adapter in zip(sites, adapters, strict=True):
        adapter.train(model.training)
        site.module.add_module(ADAPTER_NAME, adapter)
        if site.pair:
            beside = _BesidePair(adapter, mask)
            handles.append(_child(site.module, "fc1").register_forward_pre_hook(beside.before))
            handles.append(_child(site.module, "fc2").register_forward_hook(beside.after))
        else:
            handles.append(site.module.register_forward_hook(_Beside(mask), with_kwargs=True))
    handles += feed_checkpoints(model)
    setattr(model, _STATE_NAME, (handles, [site.module for site in sites]))


def detach(model: nn.Module) -> None:
    """Removes adapters and hooks; the model is what it was before ``attach``."""
    handles, modules = getattr(model, _STATE_NAME, ([], []))
    for handle in handles:
        handle.remove()
    for module in modules:
        delattr(module, ADAPTER_NAME)
    if hasattr(model, _STATE_NAME):
        delattr(model, _STATE_NAME)


def find_adapters(model: nn.Module) -> dict[str, SparseAdapter]:
    """Adapters of a model by the name of the module they sit in, in the order of the layers."""
    found = {
        name.removesuffix(f".{ADAPTER_NAME}"): module
        for name, module in model.named_modules()
        if isinstance(module, SparseAdapter)
    }
    return dict(sorted(found.items(), key=lambda item: item[1].layer))


class _TokenMask:
    """The attention mask of the forward that is running: [B, S], or None."""

    def __init__(self) -> None:
        self.current: Tensor | None = None
        self._told = False

    def of(self, x: Tensor) -> Tensor | None:
        """The mask for the positions of x [B, S, d] or flattened [B * S, d]: its last S columns; flat or None."""
        mask = self.current
        if mask is None:
            return None
        batch, columns = mask.shape
        tokens = x.numel() // x.shape[-1]
        length = tokens // max(batch, 1)
        if length * batch != tokens or length > columns or (x.dim() == 3 and x.shape[0] != batch):
            self.ignore(f"attention_mask {tuple(mask.shape)} does not fit an FFN input {tuple(x.shape)}")
            return None
        return mask[:, columns - length :].reshape(-1)

    def ignore(self, why: str) -> None:
        if not self._told:
            self._told = True
            logger.warning("%s; padding tokens, if there are any, will select rows too", why)


class _TakeMask:
    def __init__(self, mask: _TokenMask) -> None:
        self.mask = mask

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("attention_mask")
        if given is None and args:
            names = list(inspect.signature(model.forward).parameters)
            position = names.index("attention_mask") if "attention_mask" in names else len(args)
            given = args[position] if position < len(args) else None
        if isinstance(given, Tensor) and given.dim() == 2:
            self.mask.current = given
            return
        self.mask.current = None
        if given is not None:
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            self.mask.ignore(f"attention_mask {shape} is not [batch, length] and is not used by the sparse adapter")


class _DropMask:
    def __init__(self, mask: _TokenMask) -> None:
        self.mask = mask

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.mask.current = None


class _Beside:
    """Adds the adapter's output to an FFN's (or to the first of several outputs, as of a mixture-of-experts block)."""

    def __init__(self, mask: _TokenMask) -> None:
        self.mask = mask

    def __call__(self, ffn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))
        y = _child(ffn, ADAPTER_NAME)(x, self.mask.of(x))
        if isinstance(output, tuple):
            return (output[0] + y, *output[1:])
        return output + y


class _BesidePair:
    """The same for an FFN that is no module of its own: from fc1's input to fc2's output."""

    def __init__(self, adapter: SparseAdapter, mask: _TokenMask) -> None:
        self.adapter, self.mask = adapter, mask
        self._x: Tensor | None = None

    def before(self, fc1: nn.Module, args: tuple[Any, ...]) -> None:
        self._x = args[0]

    def after(self, fc2: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x, self._x = self._x, None
        assert x is not None, "fc2 ran without fc1"
        return output + self.adapter(x, self.mask.of(x))


def _child(module: nn.Module, name: str) -> nn.Module:
    child = getattr(module, name)
    assert isinstance(child, nn.Module)
    return child
