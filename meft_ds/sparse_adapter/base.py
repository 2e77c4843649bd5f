# SPDX-License-Identifier: Apache-2.0
"""What of the base was trained beside an adapter, kept with the model: who saves the adapter saves that too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meft_ds.offload.weights import shape_of

_NAME = "_meft_trained"


@dataclass(frozen=True)
class Trained:
    """names: of whole tensors of the base. elsewhere: methods that trained other parts of it."""

    names: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()


def remember(model: nn.Module, names: Iterable[str], elsewhere: Iterable[str]) -> None:
    """Add to what is known of ``model``; a later engine may train other tensors."""
    known, there = trained_in(model), {name for name, _ in model.named_parameters()}
    kept = [name for name in known.names if name in there]
    both = Trained(tuple(dict.fromkeys([*kept, *names])), tuple(dict.fromkeys([*known.elsewhere, *elsewhere])))
    setattr(model, _NAME, both)


def trained_in(model: nn.Module) -> Trained:
    """What ``remember`` was told of ``model``."""
    found = model.__dict__.get(_NAME)
    return found if isinstance(found, Trained) else Trained()


def forget(model: nn.Module) -> None:
    """The model has no adapter any more."""
    model.__dict__.pop(_NAME, None)


def check_fits(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters that ``tensors`` belong to. Raises ValueError when the model has others."""
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
