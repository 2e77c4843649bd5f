# SPDX-License-Identifier: Apache-2.0
"""Saved selections for gradient checkpointing: a forward that runs again inside backward must not choose again.

Near ties can flip when a forward is recomputed, and the set of active rows with them. Two kinds of checkpointing exist.
Reentrant (torch ``use_reentrant=True`` and DeepSpeed's): the first forward runs without grad, so nobody but this class
can keep its selection; the recomputation takes it out. Non-reentrant: the first forward's autograd node lives until its
backward and owns the selection, so a weak reference here is enough and cannot leak.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import Tensor

from meft_ds.sparse_adapter.forward.select import Selection

__all__ = ["Replay", "inside_function"]

logger = logging.getLogger(__name__)

# Checkpoints whose backward never comes (a validation loss with grad enabled) keep theirs until the window ends. This
# bounds what they can pile up; the oldest goes first.
_MOST_PENDING = 64


def inside_function() -> bool:
    """True inside the forward of a `torch.autograd.Function`, as reentrant checkpoints are: it runs without grad, but
    may be repeated with it. Unlike `torch.no_grad`, torch turns forward-mode differentiation off there too."""
    return not (torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


class _Entry:
    """A pending selection: its shape, a few values of x to tell it from others, and one of two ways to hold it."""

    def __init__(self, x: Tensor, selection: Selection, owned_by_graph: bool) -> None:
        self.shape = x.shape
        self.sample = _sample(x)
        self.weak = weakref.ref(selection)
        self.strong = None if owned_by_graph else selection


class Replay:
    """Pending selections of one layer, oldest first."""

    def __init__(self) -> None:
        self._pending: list[_Entry] = []
        self._warned = False

    def __len__(self) -> int:
        self._drop_dead()
        return len(self._pending)

    def save(self, x: Tensor, selection: Selection) -> None:
        """Keep a forward's selection for its recomputation. With grad enabled the caller's graph must hold it too."""
        self._drop_dead()
        if len(self._pending) >= _MOST_PENDING:
            self._pending.pop(0)
            if not self._warned:
                self._warned = True
                logger.warning(
                    "more than %d forwards with grad enabled and without a backward; the oldest selection was dropped. "
                    "Use torch.no_grad() for forwards that are not trained on",
                    _MOST_PENDING,
                )
        self._pending.append(_Entry(x, selection, torch.is_grad_enabled()))

    def take(self, x: Tensor) -> Selection | None:
        """Return the selection of the forward that is now recomputed, found by shape and values of x; or None.

        Without grad it is the first forward of a checkpoint inside another one's recomputation, and is asked for again.
        """
        self._drop_dead()
        candidates = [entry for entry in self._pending if entry.shape == x.shape]
        if not candidates:
            return None
        entry = candidates[0]
        if len(candidates) > 1:
            stored = torch.stack([c.sample for c in candidates])
            distance = (stored - _sample(x)).abs().nan_to_num(nan=0.0).sum(1)
            entry = candidates[int(distance.argmin())]
        selection = entry.weak()
        if entry.strong is not None and torch.is_grad_enabled():
            self._pending.remove(entry)
        return selection

    def clear(self) -> None:
        self._pending.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Replay:
        return Replay()  # a copied model has no graph that a backward could go through

    def _drop_dead(self) -> None:
        self._pending = [entry for entry in self._pending if entry.weak() is not None]


def _sample(x: Tensor) -> Tensor:
    """Up to 64 entries of x spread over all of it, fp32."""
    flat = x.detach().reshape(-1)
    # An odd stride visits different columns in different rows.
    step = max(1, flat.shape[0] // 64) | 1
    return flat[::step][:64].float()
