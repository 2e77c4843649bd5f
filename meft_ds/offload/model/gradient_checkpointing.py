# SPDX-License-Identifier: Apache-2.0
"""Lets what trains inside a reentrant gradient checkpoint get its gradients when everything below it is frozen.

A reentrant checkpoint is one autograd function: transformers' switch, DeepSpeed's `checkpoint` and torch's own all end
there. Its output takes part in backward only if an input requires grad, and above frozen embeddings none does. So we
make one input a leaf that requires grad. Other checkpoints, and forwards without any, stay as they are: their backward
ends at the lowest layer that trains.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from meft_ds.offload.model.hooks import ModelHook

_functions: list[Any] = [CheckpointFunction]
_models: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # how many handles each has


def inside_backward() -> bool:
    """Return whether autograd runs a backward on this thread.

    A forward that runs then repeats one for gradient checkpointing, and must see what the first one saw.
    """
    return torch._C._current_graph_task_id() != -1


def feed_checkpoints(model: nn.Module) -> _Handle:
    """Feed reentrant checkpoints as long as `model` lives, or until the handle that this returns is removed."""
    for function in _functions:
        _cover(function)
    _models[model] = _models.get(model, 0) + 1
    return _Handle(model)


def feed_too(function: type[torch.autograd.Function]) -> None:
    """Feed another kind of reentrant checkpoint as well: an autograd function that gets its inputs one by one."""
    if function not in _functions:
        _functions.append(function)
        if len(_models):
            _cover(function)


class _Handle(ModelHook):
    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)

    def remove(self) -> None:
        """Feed no more for this model. After the last model, put torch's and DeepSpeed's own functions back."""
        model, self._model = None if self._model is None else self._model(), None
        if model is not None and model in _models:
            _models[model] -= 1
            if not _models[model]:
                del _models[model]
        for function in _functions if not len(_models) else ():
            if isinstance(function.__dict__.get("apply"), _Feeding):
                del function.apply


class _Feeding:
    """A checkpoint function's `apply`."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self._original = original

    def __call__(self, *args: Any) -> Any:
        if len(_models) and torch.is_grad_enabled():
            args = _fed(args)
        return self._original(*args)


def _cover(function: Any) -> None:
    if not isinstance(function.__dict__.get("apply"), _Feeding):
        function.apply = _Feeding(function.apply)


def _fed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the same inputs, of which at least one requires grad if any can."""
    tensors = [(at, arg) for at, arg in enumerate(args) if isinstance(arg, Tensor)]
    if any(t.requires_grad for _, t in tensors):
        return args
    for at, t in tensors:
        if t.is_floating_point():
            return *args[:at], t.detach().requires_grad_(), *args[at + 1 :]
    return args
