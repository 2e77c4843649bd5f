# SPDX-License-Identifier: Apache-2.0
"""Linear layers in the delta form: the weight stays as it is, and y[:, r] += x[:, c] D^T adds what was learned."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from meft_ds.offload.taps import Receiver, Tapped
from meft_ds.sparse_matrix.blocks import Blocks


def correct(
    module: nn.Module, receiver: Receiver, index: int, blocks: Blocks, delta: Tensor, anchor: Tensor | None = None
) -> None:
    """Make an nn.Linear or Conv1D add its tiles' product and hand its activations to `receiver` (held weakly).

    delta: flat [blocks.numel] in the weight's dtype, live: it may change between forward and the next forward.
    """
    module.forward = Corrected(  # type: ignore[assignment]
        module, weakref.ref(receiver), index, blocks.keep, anchor, blocks=blocks, delta=delta
    )


class Corrected(Tapped):
    """A module's forward. Copies keep the tiles as they were when the copy was made, and hand nothing over."""

    def __init__(
        self,
        module: nn.Module,
        find: Any = None,
        index: int = 0,
        keep: Tensor | None = None,
        anchor: Tensor | None = None,
        *,
        blocks: Blocks,
        delta: Tensor,
    ) -> None:
        super().__init__(module, find, index, keep, anchor)
        self.blocks, self.delta = blocks, delta

    def plain(self, receiver: Receiver | None, x: Tensor) -> Tensor:
        y = super().plain(receiver, x)
        if torch.is_grad_enabled():
            y = y.clone()  # Conv1D gives a view, which autograd does not let a function change in place
        return _Correct.apply(y, x, self.delta, self.blocks)

    def product(self, receiver: Receiver, y: Tensor, x: Tensor) -> Tensor:
        return super().product(receiver, _Correct.apply(y, x, self.delta, self.blocks), x)

    def merge(self, weight: Tensor) -> None:
        """Write into a weight like the module's what is added to its product."""
        values = self.blocks.read(weight)
        self.blocks.write(weight, values.float().add_(self.delta).to(values.dtype))

    def __deepcopy__(self, memo: dict[int, Any]) -> Corrected:
        return Corrected(copy.deepcopy(self.module, memo), blocks=self.blocks, delta=self.delta.clone())

    def __reduce__(self) -> Any:
        return _again, (self.module, self.blocks, self.delta.clone())


def _again(module: nn.Module, blocks: Blocks, delta: Tensor) -> Corrected:
    return Corrected(module, blocks=blocks, delta=delta)


class _Correct(torch.autograd.Function):
    """y + x D^T in place of y; the gradient of D is the tap's business."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, delta: Tensor, blocks: Blocks) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(delta)
        ctx.blocks, ctx.shape, ctx.dtype = blocks, x.shape, x.dtype
        blocks.correct(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), delta)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        (delta,) = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[1]:
            dx = torch.zeros(ctx.shape, dtype=ctx.dtype, device=dy.device)
            ctx.blocks.correct_input(dx.view(-1, dx.shape[-1]), dy.reshape(-1, dy.shape[-1]), delta)
        return dy, dx, None, None
