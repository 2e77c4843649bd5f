# SPDX-License-Identifier: Apache-2.0
"""Whole gradients, as autograd makes them: taken from a parameter as soon as a backward has completed them."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor, nn


class GradientTaker(Protocol):
    """Who gets a parameter's gradients."""

    def take(self, index: int, grad: Tensor) -> None:
        """The gradient of parameter `index`, in the parameter's shape, is complete for this backward."""


def hand_over(p: nn.Parameter, taker: GradientTaker, index: int) -> Any:
    """Hand each gradient of `p` to `taker` as `index` and leave `p.grad` empty; returns the hook's handle.

    `taker` is held weakly: a model that outlives its engine must not keep the engine's state alive.
    """
    return p.register_post_accumulate_grad_hook(_HandOver(taker, index))


class _HandOver:
    def __init__(self, taker: GradientTaker, index: int) -> None:
        self._taker, self._index = weakref.ref(taker), index

    def __call__(self, p: Tensor) -> None:
        taker = self._taker()
        if taker is None or p.grad is None:
            return  # autograd came by without a gradient: a tapped layer's weight
        grad, p.grad = p.grad, None  # consumed: it must not be added a second time by the next micro-batch
        taker.take(self._index, grad)
