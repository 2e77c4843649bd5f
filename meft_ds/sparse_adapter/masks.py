# SPDX-License-Identifier: Apache-2.0
"""Tells adapters which tokens are padding: the attention mask that the innermost module around an FFN was given.

Every module on the way from the model down to an FFN opens a scope while its forward runs. So it does not matter
which of them a program calls, and in an encoder-decoder each stack goes by its own mask.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meft_ds.offload.model.gradient_checkpointing import inside_backward
from meft_ds.sparse_adapter.forward.recompute import inside_function

__all__ = ["TokenMask", "follow"]

logger = logging.getLogger(__name__)

_NAME = "attention_mask"
# What generation calls its cache: then inputs are the last tokens of those that the mask is for.
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "past", "mems")
# Modules that read no text: a mask that the model around them was given is not for them.
_TOWER = re.compile(r"(vision|visual|audio|image|speech)\w*")


@dataclass(frozen=True, eq=False)
class _Scope:
    """A module whose forward is running.

    mask: [B, S] of its tokens, or None. cached: its inputs may be the last of S tokens. trained: grad was enabled when
    the outermost module was called.
    """

    name: str
    mask: Tensor | None
    cached: bool
    trained: bool


class TokenMask:
    """Scopes of the forwards that are running, outermost first."""

    def __init__(self) -> None:
        self._scopes: list[_Scope] = []
        self._told = False

    @property
    def trained(self) -> bool:
        """Whether the running forward, seen from its outermost module, may be followed by a backward."""
        return not self._scopes or self._scopes[0].trained

    def of(self, x: Tensor) -> Tensor | None:
        """Return the mask [B * S] of the tokens in x [B, S, d], or flattened to [B * S, d]; None when all count."""
        scope = self._scopes[-1] if self._scopes else None
        if scope is None or scope.mask is None:
            return None
        batch, columns = scope.mask.shape
        tokens = x.numel() // x.shape[-1]
        length = tokens // max(batch, 1)
        fits = length * batch == tokens and (x.dim() != 3 or x.shape[0] == batch)
        if not fits or length > columns or (length < columns and not scope.cached):
            self.ignore(f"attention_mask {tuple(scope.mask.shape)} does not fit an FFN input {tuple(x.shape)}")
            return None
        return scope.mask[:, columns - length :].reshape(-1)

    def enter(self, way: _Way, given: Any, kwargs: Mapping[str, Any]) -> None:
        """Open a scope for a module that was given ``given`` as its mask."""
        scopes = self._scopes
        # An interrupt leaves scopes open: torch calls no hook for it.
        while scopes and not way.is_below(scopes[-1].name):
            scopes.pop()
        outer = scopes[-1] if scopes else None
        mask = None if outer is None else outer.mask
        if _is_mask(given, outermost=outer is None):
            mask = given
        elif given is None:
            if way.decides:
                mask = None
        elif outer is None and not inside_backward():
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            self.ignore(f"attention_mask {shape} is not [batch, length] and is not used by the sparse adapter")
        cached = any(kwargs.get(name) is not None for name in _CACHES)
        if outer is None:
            scope = _Scope(way.name, mask, cached, torch.is_grad_enabled() or inside_function())
        else:
            scope = _Scope(way.name, mask, cached or outer.cached, outer.trained)
        scopes.append(scope)

    def leave(self, way: _Way) -> None:
        """Close the scope of a module, and those inside it."""
        names = [scope.name for scope in self._scopes]
        if way.name in names:
            del self._scopes[names.index(way.name) :]

    def ignore(self, why: str) -> None:
        if not self._told:
            self._told = True
            logger.warning("%s; padding tokens, if there are any, will select rows too", why)


def follow(model: nn.Module, places: Iterable[str], mask: TokenMask) -> list[Any]:
    """Hook all modules around ``places`` (names of modules of ``model``); returns the handles."""
    handles: list[Any] = []
    for name, stack in _around(places).items():
        module = model.get_submodule(name)
        names = _parameters(module)
        position = names.index(_NAME) if _NAME in names else None
        if not stack and position is None:
            continue  # a layer that is not told of masks
        # what takes hidden states belongs to a model that may have used its mask up already
        reads = stack and position is not None and names[0] != "hidden_states"
        tower = _TOWER.fullmatch(name.rpartition(".")[2]) is not None
        way = _Way(name, position, decides=reads or tower)
        handles.append(module.register_forward_pre_hook(_Enter(mask, way), with_kwargs=True))
        handles.append(module.register_forward_hook(_Leave(mask, way), always_call=True))
    return handles


@dataclass(frozen=True)
class _Way:
    """A module around FFNs. position: of the mask among its arguments. decides: no mask means that there is none; other
    modules then go by what is around them, such as layers, which are given none when nothing is padded."""

    name: str
    position: int | None
    decides: bool

    def is_below(self, name: str) -> bool:
        return self.name != name and (not name or self.name.startswith(name + "."))


class _Enter:
    def __init__(self, mask: TokenMask, way: _Way) -> None:
        self.mask, self.way = mask, way

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get(_NAME)
        position = self.way.position
        if given is None and position is not None and position < len(args):
            given = args[position]
        self.mask.enter(self.way, given, kwargs)


class _Leave:
    def __init__(self, mask: TokenMask, way: _Way) -> None:
        self.mask, self.way = mask, way

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.mask.leave(self.way)


def _is_mask(given: Any, *, outermost: bool) -> bool:
    """Return whether it is [B, S] with 0 for padding. Modules may hand on floating point numbers to add."""
    return isinstance(given, Tensor) and given.dim() == 2 and (outermost or not given.is_floating_point())


def _around(places: Iterable[str]) -> dict[str, bool]:
    """Return names of the modules around places, outermost first, and whether each holds a list of layers."""
    found: dict[str, bool] = {}
    for place in places:
        parts = place.split(".")
        for end in range(len(parts)):
            name = ".".join(parts[:end])
            found[name] = found.get(name, end == 0) or any(part.isdigit() for part in parts[end:])
    return found


def _parameters(module: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return []
