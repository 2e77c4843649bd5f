# SPDX-License-Identifier: Apache-2.0
"""Linear layers in the delta form: the weight stays as it is, and y[:, r] += x[:, c] D^T adds what was learned.

State dicts are complete: the weight in them has what the layer adds, and one that is loaded gives the layer that
function, without the same being added twice.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from meft_ds.offload.model.capture import ActivationSink, TappedLinear
from meft_ds.sparse_matrix.tiles import Tiles


def correct(
    module: nn.Module, receiver: ActivationSink, index: int, blocks: Tiles, delta: Tensor, anchor: Tensor | None = None
) -> None:
    """Make an nn.Linear or Conv1D add its tiles' product and hand its activations to `receiver` (held weakly), and make
    its state dicts complete.

    delta: flat [blocks.numel] in the weight's dtype, live: it may change between forward and the next forward.
    """
    module.forward = Corrected(  # type: ignore[assignment]
        module, weakref.ref(receiver), index, blocks.keep, anchor, blocks=blocks, delta=delta
    )
    # once, and for good: they do nothing when the forward is gone, and another engine finds them here
    if _give_merged not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_give_merged)
        module.register_load_state_dict_pre_hook(_take_merged)


class Corrected(TappedLinear):
    """A module's forward. Copies keep the tiles as they were when the copy was made, and hand nothing over."""

    def __init__(
        self,
        module: nn.Module,
        find: Any = None,
        index: int = 0,
        keep: Tensor | None = None,
        anchor: Tensor | None = None,
        *,
        blocks: Tiles,
        delta: Tensor,
    ) -> None:
        super().__init__(module, find, index, keep, anchor)
        self.blocks, self.delta = blocks, delta

    def plain(self, receiver: ActivationSink | None, x: Tensor) -> Tensor:
        y = super().plain(receiver, x)
        if torch.is_grad_enabled():
            y = y.clone()  # Conv1D gives a view, which autograd does not let a function change in place
        return _Correct.apply(y, x, *self._on(x.device))

    def product(self, receiver: ActivationSink, y: Tensor, x: Tensor) -> Tensor:
        return super().product(receiver, _Correct.apply(y, x, *self._on(x.device)), x)

    def merge(self, weight: Tensor) -> None:
        """Write into a weight [m, n] like the module's what is added to its product."""
        for at, added in self._tiles():
            weight[at].copy_(weight[at].float().add_(added.to(weight.device)))

    def merged(self, weight: Tensor) -> Tensor:
        """A copy of a weight [m, n] like the module's, on the host, with what is added to its product."""
        whole = weight.detach().to("cpu", copy=True)
        self.merge(whole)
        return whole

    def holds_base(self, given: Tensor) -> bool:
        """Whether the tiles of `given` [m, n] are those of the module's weight, which is whole: nothing was added."""
        weight = self._weight
        return all(torch.equal(weight[at].to(given), given[at].detach()) for at, _ in self._tiles())

    @torch.no_grad()
    def accept(self, given: Tensor) -> Tensor:
        """Make weight + D what `given` [m, n] is; returns what the weight must be loaded with.

        The module's weight must be whole. As in the value form, the tiles of a model in training are their master's
        values again after the next update.

        Raises:
            ValueError: where the weight is partitioned and the given values are not those that its tiles have now: D
                would have to change on all ranks, and who loads such a weight may be one of them.
        """
        if self.delta.is_meta or not self.delta.any():
            return given
        weight = self._weight
        merged = self.merged(weight).to(given.dtype)
        same = all(torch.equal(merged[at], given[at].detach().cpu()) for at, _ in self._tiles())
        if self.anchor is not None and not same:
            raise ValueError(
                "under ZeRO-3 tiles in the delta form take other values than their own from engine.load_checkpoint only"
            )
        if self.anchor is None and (self.find is None or self.find() is None):
            self.delta.zero_()  # nobody trains it any more
            return given
        kept = given.detach().clone()
        for at, added in self._tiles():
            if not same:
                added.copy_(given[at].to(added.device).float() - weight[at].float())
            kept[at].copy_(weight[at])
        return kept

    @property
    def _weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def _tiles(self) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Where each tile is, and what is added to it, a view."""
        for (rows, cols), added in self.blocks.tiles(self.delta):
            yield (slice(*rows), slice(*cols)), added

    def _on(self, device: torch.device) -> tuple[Tensor, Tiles]:
        """D and the places of its tiles where the module computes: neither is the module's, so `module.to` leaves them
        behind."""
        if self.delta.device == device:
            return self.delta, self.blocks
        delta, blocks = self.delta.to(device), self.blocks.to(device)
        if self.find is None:  # a copy: nobody writes into D any more
            self.delta, self.blocks = delta, blocks
        return delta, blocks

    def __deepcopy__(self, memo: dict[int, Any]) -> Corrected:
        return Corrected(copy.deepcopy(self.module, memo), blocks=self.blocks, delta=self.delta.clone())

    def __reduce__(self) -> Any:
        return _again, (self.module, self.blocks, self.delta.clone())


def _again(module: nn.Module, blocks: Tiles, delta: Tensor) -> Corrected:
    return Corrected(module, blocks=blocks, delta=delta)


def _give_merged(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """After a module's `state_dict`: its weight in there is a merged copy, on the host, because one of every weight on
    the device may be more than fits. `keep_vars=True` asks for the parameter itself, and gets it."""
    forward, weight = module.__dict__.get("forward"), module.weight
    given = state.get(f"{prefix}weight")
    if not isinstance(forward, Corrected) or given is None or given is weight or given.is_meta or not given.numel():
        return  # an empty one is partitioned
    assert isinstance(weight, Tensor)
    if given.data_ptr() == weight.data_ptr():  # else it has been merged
        state[f"{prefix}weight"] = forward.merged(given)


def _take_merged(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Before a module loads its part of a state dict: what it adds already must not be in the weight too."""
    forward, weight, key = module.__dict__.get("forward"), module.weight, f"{prefix}weight"
    given = state.get(key)
    if not isinstance(forward, Corrected) or not isinstance(given, Tensor):
        return
    assert isinstance(weight, Tensor)
    if given.shape != weight.shape or given.is_meta or weight.is_meta:
        return  # torch says what is wrong with it
    try:
        state[key] = forward.accept(given)
    except ValueError as fault:
        error_msgs.append(f"{key}: {fault}")


class _Correct(torch.autograd.Function):
    """y + x D^T in place of y; the gradient of D is the tap's business."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, delta: Tensor, blocks: Tiles) -> Tensor:
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
