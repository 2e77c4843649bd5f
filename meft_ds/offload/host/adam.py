# SPDX-License-Identifier: Apache-2.0
"""AdamW state of flat tensors, on the host or an accelerator, and of rows on the host in `dense` and `lazy` mode."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from meft_ds import ops
from meft_ds.ops.adam import AdamHyper

RowMode = Literal["dense", "lazy"]


class FlatAdam:
    """AdamW of one contiguous float32 slice.

    Args:
        master: float32 [n], updated in place; its device is the moments' too.
        replica: [n] in the compute dtype, refreshed in the same pass; None when the master itself is the replica.
        moments_dtype: float32 or bfloat16.
        moments_shape: theirs where it is not the master's.
    """

    def __init__(
        self,
        master: Tensor,
        replica: Tensor | None,
        moments_dtype: torch.dtype,
        moments_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.master, self.replica = master, replica
        shape = master.shape if moments_shape is None else moments_shape
        self.exp_avg = torch.zeros(shape, dtype=moments_dtype, device=master.device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)

    def step(self, grad: Tensor, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        """Take one AdamW step with gradient grad * grad_scale; `step` counts from 1."""
        state = self.master, self.exp_avg, self.exp_avg_sq
        ops.adamw_(*state, grad, hyper, step=step, grad_scale=grad_scale, replica=self.replica)

    def adopt(self, now: Tensor, known: Tensor, first: int = 0) -> None:
        """Let the master follow values that the model holds now and that are not those last sent to it.

        Args:
            now: [k], what the model holds of the elements from `first` on.
            known: [n], what was last sent; takes over what differs.
        """
        master, known = (t[first : first + now.numel()] for t in (self.master, known))
        edited = now != known
        if bool(edited.any()):
            master[edited] = now[edited].float()
            known.copy_(now)

    def tensors(self) -> dict[str, Tensor]:
        """Return the live state tensors by name."""
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


class RowAdam(FlatAdam):
    """AdamW of rows [n, w] from sparse row gradients.

    In mode `dense` every row takes a step: rows without a gradient move by their moments (what the MEFT paper's
    accuracy used). In mode `lazy` only rows with a gradient are touched. Each has its own step count for bias
    correction. The decoupled weight decay of the steps that a row slept is caught up exactly when it wakes.
    """

    def __init__(
        self,
        master: Tensor,
        replica: Tensor | None,
        moments_dtype: torch.dtype,
        mode: RowMode,
        moments_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(master, replica, moments_dtype, moments_shape)
        self.mode = mode
        self.decay_log = 0.0  # sum of `AdamHyper.log_decay` over all applied steps
        if mode == "lazy":
            self.row_steps = torch.zeros(master.shape[0], dtype=torch.int32, device="cpu")
            self.row_decay = torch.zeros(master.shape[0], dtype=torch.float64, device="cpu")

    def step_rows(self, ids: Tensor, grad: Tensor, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        """Take one step from gradients `grad` [k, w] of rows `ids` (int64 [k], sorted, local)."""
        state = self.master, self.exp_avg, self.exp_avg_sq
        if self.mode == "dense":
            ops.adamw_rows_(*state, ids, grad, hyper, step=step, grad_scale=grad_scale, replica=self.replica)
            return
        counters = self.row_steps, self.row_decay
        rest: dict[str, Any] = dict(decay_log=self.decay_log, grad_scale=grad_scale, replica=self.replica)
        ops.adamw_lazy_rows_(*state, *counters, ids, grad, hyper, **rest)
        self.decay_log += hyper.log_decay

    def tensors(self) -> dict[str, Tensor]:
        """Return the live state tensors by name."""
        lazy = {"row_steps": self.row_steps, "row_decay": self.row_decay} if self.mode == "lazy" else {}
        return {**super().tensors(), **lazy}

    def scalars(self) -> dict[str, Any]:
        """Return the cumulative decay (lazy mode), as a hex string so that JSON keeps every bit."""
        return {"decay_log": self.decay_log.hex()} if self.mode == "lazy" else {}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Take back what `scalars` gave."""
        if self.mode == "lazy":
            self.decay_log = float.fromhex(scalars["decay_log"])
