# SPDX-License-Identifier: Apache-2.0
"""One-sided compression of row gradients, so that both methods compose (LSP-Offload, arXiv 2406.10181, without P).

A window's gradients g [U, 2 d] (key || value) become s = g Q [U, 2 d'] on the device; s crosses the bus, AdamW's
moments live in its space, and the host moves the rows:

    row <- row (1 - lr weight_decay) - lr scale dS Q^T,    dS = m_hat / (sqrt(v_hat) + eps)

Q is block-diagonal, one random sparse projector per half, a function of (seed, layer, half) that never crosses. It is
not fitted as the subspace method's projectors are: every window brings gradients of other rows, so there is no one
matrix to fit Q to, and a new Q would have to transport the moments of all r rows.

Costs of an update on the host: in dense mode AdamW over r x 2 d' and the expansion of all r rows; in lazy mode the same
over the U active rows. Both go by blocks of rows, so that nothing of size [r, 2 d] is ever built.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from meft_ds import ops
from meft_ds.offload.host.adam import RowAdam, RowMode
from meft_ds.ops.adam import AdamHyper, blocks_of_rows
from meft_ds.ops.projector import GatherList, Projector, block_diagonal, seed_of
from meft_ds.sparse_adapter.config import ResolvedCompress

# Values of a block of whole rows: 2 MB, so that what Adam wrote is in cache when it is expanded.
_BLOCK = 1 << 19


class RowCompression:
    """Q of one layer, where each side needs it.

    Args:
        q: block-diagonal, [2 d, 2 d'].
        settings: what it was drawn with, and the factor on updates.
        device: where gradients are compressed.

    Attributes:
        width: 2 d'.
        rows: Q's row view, on the host.
    """

    def __init__(self, q: Projector, settings: ResolvedCompress, device: torch.device) -> None:
        self.settings, self.width = settings, q.dim
        self.rows: GatherList = q.rows
        index, value = q.columns
        self._columns: GatherList = index.to(device), value.to(device)

    @classmethod
    def draw(cls, settings: ResolvedCompress, d: int, seed: int, layer: int, device: torch.device) -> RowCompression:
        """Make the compression of rows of `layer`; the same on every rank and in every run with this seed."""
        halves = [
            Projector.draw(
                d, settings.dim, settings.nonzeros, seed_of("sparse_adapter", seed, layer, half), torch.device("cpu")
            )
            for half in ("keys", "values")
        ]
        return cls(block_diagonal(*halves), settings, device)

    def compress(self, g: Tensor) -> Tensor:
        """Return s = g Q, float32 [U, 2 d'], from g [U, 2 d] on the device."""
        return ops.sketch(g, *self._columns, torch.float32)

    def add_expanded_(self, rows: Tensor, s: Tensor, ids: Tensor, *, alpha: float, decay: float) -> None:
        """Set rows <- decay rows + alpha s[ids] Q^T in one pass, on the host.

        rows float32 [n, 2 d], s float32 [h, 2 d'], ids int64 [n].
        """
        each = ids.to(torch.int32)[:, None], torch.ones(len(ids), 1, dtype=torch.float16, device="cpu")
        ops.subspace_apply_(rows, s, each, self.rows, alpha=alpha, decay=decay, key=0, step=0)

    def device_bytes(self) -> int:
        """Return the bytes of Q on the device."""
        return sum(t.numel() * t.element_size() for t in self._columns)


class CompressedRowAdam(RowAdam):
    """`RowAdam` whose gradients and moments are compressed, [n, 2 d'], while masters are rows [n, 2 d]."""

    def __init__(
        self,
        master: Tensor,
        replica: Tensor | None,
        moments_dtype: torch.dtype,
        mode: RowMode,
        compression: RowCompression,
    ) -> None:
        super().__init__(master, replica, moments_dtype, mode, (master.shape[0], compression.width))
        self._compression = compression
        height = min(block_rows(master.shape[1]), master.shape[0])
        # kept, because fresh memory for every block costs more than the update
        self._minus_ds = torch.zeros(height, compression.width, device="cpu")
        self._active = torch.empty(height if mode == "lazy" else 0, master.shape[1], device="cpu")

    def step_rows(self, ids: Tensor, grad: Tensor, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        """Take one step from compressed gradients [k, 2 d'] of rows `ids` (int64 [k], sorted, local)."""
        after = self.decay_log + hyper.log_decay if self.mode == "lazy" else 0.0
        # AdamW at lr 1 without decay turns a row of zeros into -dS: the same kernels, and the same rounding, as without
        # compression.
        adam = {"hyper": dataclasses.replace(hyper, lr=1.0, weight_decay=0.0), "grad_scale": grad_scale}
        n, width = self.master.shape
        for own, here, part in blocks_of_rows(ids, n, block_rows(width)):
            if self.mode == "dense":
                self._step_block(own, here, grad[part], hyper, step, adam)
            elif here.numel():
                self._step_rows_of_block(own, here, grad[part], hyper, after, adam)
        self.decay_log = after

    def _step_block(
        self, own: slice, ids: Tensor, grad: Tensor, hyper: AdamHyper, step: int, adam: dict[str, Any]
    ) -> None:
        rows, exp_avg, exp_avg_sq = self.master[own], self.exp_avg[own], self.exp_avg_sq[own]
        n = rows.shape[0]
        minus_ds = self._minus_ds[:n].zero_()
        ops.adamw_rows_(minus_ds, exp_avg, exp_avg_sq, ids, grad, step=step, **adam)
        alpha, decay = hyper.lr * self._compression.settings.scale, 1.0 - hyper.lr * hyper.weight_decay
        self._compression.add_expanded_(rows, minus_ds, torch.arange(n, device="cpu"), alpha=alpha, decay=decay)
        if self.replica is not None:
            self.replica[own].copy_(rows)

    def _step_rows_of_block(
        self, own: slice, ids: Tensor, grad: Tensor, hyper: AdamHyper, after: float, adam: dict[str, Any]
    ) -> None:
        """Update moments where they lie; gather, move and scatter the few active masters."""
        master, exp_avg, exp_avg_sq = self.master[own], self.exp_avg[own], self.exp_avg_sq[own]
        minus_ds = self._minus_ds[: master.shape[0]].index_fill_(0, ids, 0)
        awake = torch.zeros(
            master.shape[0], dtype=torch.float64, device="cpu"
        )  # the rows of zeros have no decay to catch up
        ops.adamw_lazy_rows_(
            minus_ds, exp_avg, exp_avg_sq, self.row_steps[own], awake, ids, grad, decay_log=0.0, **adam
        )
        row_decay = self.row_decay[own]
        decay = torch.exp(after - row_decay.index_select(0, ids)).float()
        rows = self._active[: len(ids)]
        ops.gather_rows(master, ids, rows)
        if bool((decay != 1.0).any()):
            rows.mul_(decay[:, None])
        alpha = hyper.lr * self._compression.settings.scale
        self._compression.add_expanded_(rows, minus_ds, ids, alpha=alpha, decay=1.0)
        ops.scatter_rows_(master, ids, rows)
        if self.replica is not None:
            ops.scatter_rows_(self.replica[own], ids, rows.to(self.replica.dtype))
        row_decay.index_fill_(0, ids, after)


def block_rows(width: int) -> int:
    """Return how many rows of `width` values are updated at a time."""
    return max(1, _BLOCK // width)


def view_bytes(settings: ResolvedCompress, d: int) -> tuple[int, int]:
    """Return the bytes of Q's row view and of its column view."""
    fullest = -(-d // (settings.dim // settings.nonzeros))  # the smallest stratum's longest column
    of_a_row, of_a_column = (4 if below <= 1 << 16 else 6 for below in (2 * settings.dim, 2 * d))
    return 2 * d * settings.nonzeros * of_a_row, 2 * settings.dim * fullest * of_a_column
