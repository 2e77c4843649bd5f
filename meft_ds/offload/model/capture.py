# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weight gradient nobody computes: their input and output gradient go to a receiver instead.

The layer's product is autograd's own with the weight detached, so inputs, biases, autocast and gradient checkpointing
are as before; an identity on its output hands (X, dY) over when backward comes by.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from meft_ds.offload.model.hooks import ModelHook

# torch's own: where ZeRO-3 was ever used, DeepSpeed has replaced F.linear by one that keeps the whole input
_linear = torch._C._nn.linear


class ActivationSink(Protocol):
    """Who gets the activations of a backward."""

    def tapped(self, index: int, x: Tensor, dy: Tensor) -> None:
        """Weight `index` was used on x [..., in], and dy [..., out] is the gradient of the output.

        Of x only the features that the tap was told to keep, [..., kept].
        """


def as_matrices(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Return activations as [tokens, features], in one dtype: autocast may give them two."""
    common = torch.promote_types(x.dtype, dy.dtype)
    return x.reshape(-1, x.shape[-1]).to(common), dy.reshape(-1, dy.shape[-1]).to(common)


def tap(
    module: nn.Module, receiver: ActivationSink, index: int, keep: Tensor | None = None, anchor: Tensor | None = None
) -> None:
    """Make an nn.Linear or Conv1D hand its activations to `receiver`, which is held weakly.

    `keep`: int64 [kept], input features that the receiver wants; None for all. Only a copy of them lives on until
    backward, a view would hold the whole input. `anchor`: a tensor that requires grad, in the place of a weight that
    must not, because its storage is swapped between forward and backward (ZeRO-3).
    """
    module.forward = TappedLinear(module, weakref.ref(receiver), index, keep, anchor)


def untap(module: nn.Module, receiver: ActivationSink) -> None:
    """Undo `tap`, unless somebody else has tapped the module since."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, TappedLinear) and forward.find is not None and forward.find() is receiver:
        del module.forward


def is_tapped(module: nn.Module) -> bool:
    """Return whether the module hands its activations to a sink that lives."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, TappedLinear) and forward.find is not None and forward.find() is not None


def can_tap(module: nn.Module) -> bool:
    """Return whether the module's forward is its class's, or a tap that another engine or a copy of the model left.

    A forward that somebody replaced cannot be told not to compute the weight's gradient. The output projection of
    torch's attention cannot be tapped either: attention reads its weight and never calls the layer.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module.__dict__.get("forward"), TappedLinear | type(None))


class TappedLinear(ModelHook):
    """A module's forward. Copies of the module (deepcopy, pickle) get one that hands nothing over."""

    def __init__(
        self,
        module: nn.Module,
        find: Any = None,
        index: int = 0,
        keep: Tensor | None = None,
        anchor: Tensor | None = None,
    ) -> None:
        self.module, self.find, self.index, self.keep, self.anchor = module, find, index, keep, anchor

    # torch.compile leaves out the gradient of an input to a function that changes another in place, without a word
    @torch.compiler.disable
    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())  # by whatever name
        module = self.module
        receiver = None if self.find is None else self.find()
        weight = module.weight
        assert isinstance(weight, Tensor)
        trains = weight.requires_grad or self.anchor is not None
        if receiver is None or not (torch.is_grad_enabled() and trains):
            y: Tensor = type(module).forward(module, x)
            return y
        bias = module.bias
        assert isinstance(bias, Tensor | None)
        transposed = not isinstance(module, nn.Linear)
        tapped = x, (weight if self.anchor is None else self.anchor), receiver, self.index, self.keep
        if self.anchor is not None:
            return _applied(_Tap, _applied(_Product, x, weight, bias, transposed), *tapped)
        if not transposed:
            y = _linear(x, weight.detach(), bias)
            if not y._is_view():
                return _applied(_Tap, y, *tapped)
            # with a bias torch gives a view of a product [tokens, out]; a view that a function changes in place costs
            # two copies of its gradient
            assert y._base is not None and y._base.numel() == y.numel()
            return _applied(_Tap, y._base, *tapped).view(y.shape)
        assert bias is not None
        flat = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.detach())
        return _applied(_Tap, flat, *tapped).view(*x.shape[:-1], weight.shape[1])

    def of_copy(self) -> tuple[Any, ...]:
        return (self.module,)


def _applied(function: type[torch.autograd.Function], *given: Any) -> Tensor:
    made: Tensor = function.apply(*given)
    return made


class _Product(torch.autograd.Function):
    """A linear layer whose weight is partitioned. torch's own would keep a view of the gathered weight, or a copy in
    autocast's precision, until backward; what this keeps is the parameter, which is empty in the meantime."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.transposed, ctx.dtype = transposed, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        # with a bias torch gives a view, and one made in here is not to be changed in place afterwards
        return _linear(x, weight.t() if transposed else weight, bias).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        dx = db = None
        if ctx.needs_input_grad[0]:
            w = weight.to(dy.dtype)
            dx = torch.matmul(dy, w.t() if ctx.transposed else w).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype)
        return dx, None, db, None


class _Tap(torch.autograd.Function):
    """Identity on y. `anchor` is an input so that the output needs a gradient whenever the weight trains."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, receiver: ActivationSink, index: int, keep: Tensor | None
    ) -> Tensor:
        ctx.mark_dirty(y)  # the same tensor, not a view of it: what follows may change it in place
        ctx.save_for_backward(x if keep is None else x.index_select(-1, keep))
        ctx.receiver, ctx.index = receiver, index
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.receiver.tapped(ctx.index, x.detach(), dy)  # who keeps x must not keep its graph
        return dy, None, None, None, None, None


class GradientTaker(Protocol):
    """Who gets a parameter's gradients."""

    def take(self, index: int, grad: Tensor) -> None:
        """Take the gradient of parameter `index`, in its shape, which is complete for this backward."""


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
