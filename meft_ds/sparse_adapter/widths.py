# SPDX-License-Identifier: Apache-2.0
"""How wide the inputs and outputs of a module's linear layers are, fused and expert weights included."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meft_ds.offload.model.weights import shape_of

__all__ = ["Widths", "widths_of"]


_ROUTER = re.compile(r"(^|\.)(\w*gate|router)(\.|$)")


@dataclass(frozen=True)
class Widths:
    """Widths of inputs and outputs of the linear layers inside a module.

    read: what the first one reads. Raw tensors (of experts, of routers) do not say which side is which: both.
    written: what any of them writes. left: what is written and read by none of them, so that it must be an output.
    """

    read: list[int]
    written: list[int]
    left: list[int]
    weights: int


def widths_of(module: nn.Module | None) -> Widths:
    """Return the widths of all linear layers inside ``module``, in the order in which it holds them."""
    read: list[list[int]] = []
    written: list[int] = []
    outputs: list[tuple[int, int]] = []  # width, and how many were read before it was written
    for name, inner in () if module is None else module.named_modules():
        sides = _linear(inner)
        if sides is not None:
            read.append([sides[0]])
            written.append(sides[1])
            if sides[1] > 1 and not _ROUTER.search(name):
                outputs.append((sides[1], len(read)))
        elif not isinstance(inner, nn.Embedding | nn.modules.conv._ConvNd):
            for p in inner._parameters.values():
                shape = torch.Size() if p is None else shape_of(p)
                if len(shape) in (2, 3) and (len(shape) == 2 or shape[0] > 1):  # [1, length, d] is an embedding
                    read.append(list(reversed(shape[-2:])))
                    written += shape[-2:]

    def is_read(width: int, after: int) -> bool:
        # by any layer (w1, w2, w3 is a common order); or half of it by a later one: a fused gate and up projection
        return any(width in each for each in read) or any(width / 2 in each for each in read[after:])

    left = [width for width, after in outputs if not is_read(width, after)]
    return Widths(read[0] if read else [], written, left, len(read))


def _linear(module: nn.Module) -> tuple[int, int] | None:
    """Return (width in, width out) of a linear layer, quantised ones and GPT-2's Conv1D included."""
    if isinstance(module, nn.Bilinear):
        return None
    sides = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(isinstance(side, int) for side in sides) and not list(module.children()):
        return sides  # type: ignore[return-value]
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return shape_of(weight)[0], shape_of(weight)[1]
    return None
