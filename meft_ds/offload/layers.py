# SPDX-License-Identifier: Apache-2.0
"""Which layer a parameter belongs to, by its name; the order of layers is the order in which units move."""

from __future__ import annotations

from torch import nn


def count_layers(model: nn.Module) -> int:
    """Length of the model's lists of numbered blocks; at least 1."""
    return max((_number(name) or 0 for name, _ in model.named_parameters()), default=0) + 1


def layer_of(model: nn.Module, layers: int) -> dict[str, int]:
    """Layer of every parameter by its name: the first number in it, or that of the parameter before."""
    found, last = {}, 0
    for name, _ in model.named_parameters():
        number = _number(name)
        last = min(number, layers - 1) if number is not None else last
        found[name] = last
    return found


def _number(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
