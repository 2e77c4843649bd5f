# SPDX-License-Identifier: Apache-2.0
"""What of the base was trained beside an adapter, kept with the model: who saves the adapter saves that too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meft_ds.offload.model.weights import shape_of
from meft_ds.sparse_adapter.attach import find_adapters

_NAME = "_meft_trained"


@dataclass(frozen=True)
class Trained:
    """names: of whole tensors of the base. elsewhere: methods that trained other parts of it."""

    names: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()


def remember(model: nn.Module, names: Iterable[str], elsewhere: Iterable[str]) -> None:
    """Add to what is known of ``model`` and of its parts that hold adapters; a later engine may train others."""
    names, elsewhere = list(names), list(elsewhere)
    for prefix in _parts_with_adapters(model):
        part = model.get_submodule(prefix)
        known, start = trained_in(part), f"{prefix}." if prefix else ""
        there = {name for name, _ in part.named_parameters(remove_duplicate=False)}
        inside = [name.removeprefix(start) for name in names if name.startswith(start)]
        kept = dict.fromkeys([*(name for name in known.names if name in there), *inside])
        setattr(part, _NAME, Trained(tuple(kept), tuple(dict.fromkeys([*known.elsewhere, *elsewhere]))))


def _parts_with_adapters(model: nn.Module) -> list[str]:
    """Return the names of the modules on the way to adapters, the model's own "" included."""
    found = {""}
    for name in find_adapters(model):
        parts = name.split(".")
        found |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return sorted(found)


def trained_in(model: nn.Module) -> Trained:
    """Return what ``remember`` was told of ``model``."""
    found = model.__dict__.get(_NAME)
    return found if isinstance(found, Trained) else Trained()


def forget(model: nn.Module) -> None:
    """Forget what was remembered: the model has no adapter any more."""
    model.__dict__.pop(_NAME, None)


def check_fits(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Return the parameters that ``tensors`` belong to. Raises ValueError when the model has others."""
    named = dict(model.named_parameters(remove_duplicate=False))
    faults = []
    for name, t in tensors.items():
        p = named.get(name)
        if p is None:
            faults.append(f"it has no parameter {name}")
        elif hasattr(p, "ds_id") or p.is_meta:
            faults.append(f"{name} is {'partitioned' if hasattr(p, 'ds_id') else 'on the meta device'}")
        elif shape_of(p) != t.shape:
            faults.append(f"{name} is {tuple(shape_of(p))}, the adapter's is {tuple(t.shape)}")
    if faults:
        raise ValueError(
            f"the adapter brings {len(tensors)} tensors of the base that were trained with it, and this "
            f"{type(model).__name__} cannot take them: {'; '.join(faults[:8])}; load it into the whole base that it "
            "was trained in, with the same head and the same PEFT adapters"
        )
    return {name: named[name] for name in tensors}


@torch.no_grad()
def take_over(params: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Give the base's parameters the values that were trained."""
    for name, p in params.items():
        p.copy_(tensors[name])
