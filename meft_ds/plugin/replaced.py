# SPDX-License-Identifier: Apache-2.0
"""Notices that a program put another parameter into the place of one that trains.

`resize_token_embeddings` does that. The engine would go on with the old parameter, which the model no longer reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from meft_ds.offload.model.weights import shape_of
from meft_ds.offload.unit import Unit


class Places:
    """Where a model keeps the parameters that units train.

    A check looks for each module and parameter where it was. Only when one is gone it walks through the model.
    """

    def __init__(self, model: nn.Module, units: Iterable[Unit]) -> None:
        params = [(name, p) for unit in units for name, p in unit.params]
        held = {id(p) for p in model.parameters()}
        self._model = model
        self._trained = [(name, p, shape_of(p)) for name, p in params if id(p) in held]
        # partitioned parameters are empty most of the time, and are replaced as a whole
        self._sizes = [(p, p.numel()) for _, p in params if id(p) in held and not hasattr(p, "ds_id")]
        self._steps = _steps(model, [p for _, p, _ in self._trained])

    def check(self) -> None:
        """Raise when a parameter that trains is no longer in the model, or has another shape.

        Raises:
            ValueError: naming it, with both shapes and what to do.
        """
        with torch._C.DisableTorchFunctionSubclass():  # of parameters whose update is under way: sizes need no wait
            same = all(p.numel() == numel for p, numel in self._sizes)
        if same and all(holder.get(key) is item for holder, key, item in self._steps):
            return
        held, now = {id(p) for p in self._model.parameters()}, dict(self._model.named_parameters())
        for name, p, shape in self._trained:
            if id(p) not in held or shape_of(p) != shape:
                other = now.get(name)
                found = "nothing" if other is None else f"one of shape {tuple(shape_of(other))}"
                raise ValueError(
                    f"{name} trains with shape {tuple(shape)}, but the model has {found} in its place since "
                    "deepspeed.initialize (resize_token_embeddings does that): change the model before "
                    "deepspeed.initialize, or call engine.destroy() and make another engine"
                )
        self._steps = _steps(self._model, [p for _, p, _ in self._trained])  # only what is around them has changed


def _steps(model: nn.Module, params: Sequence[nn.Parameter]) -> list[tuple[dict[str, Any], str, Any]]:
    """Return the way from the model to each of `params`: the dict of a module, a key, and what it holds there."""
    wanted, steps, seen = {id(p) for p in params}, [], set()
    modules = dict(model.named_modules())
    for name, module in modules.items():
        for key, p in module._parameters.items():
            if p is None or id(p) not in wanted:
                continue
            steps.append((module._parameters, key, p))
            parts = name.split(".") if name else []
            for depth in range(len(parts), 0, -1):
                path = ".".join(parts[:depth])
                if path in seen:
                    break
                seen.add(path)
                steps.append((modules[".".join(parts[: depth - 1])]._modules, parts[depth - 1], modules[path]))
    return steps
