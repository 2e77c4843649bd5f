# SPDX-License-Identifier: Apache-2.0
"""The adapter's function on a CPU, by selected entries: fused kernels that touch the K rows of a token and no others.

The mathematics of ``compute`` (see there), without its gathered copies of inputs: on a CPU those cost more than the
products. Saved: x, the gates, and q of the selected entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from meft_ds import ops
from meft_ds.sparse_adapter.forward.grouped import Job, check_version

__all__ = ["apply_fused", "can_fuse"]


def can_fuse(x: Tensor) -> bool:
    """True where x lies on the CPU and the C++ kernels could be built."""
    return x.device.type == "cpu" and ops.backend() == "cpp"


def apply_fused(x: Tensor, p: Tensor | None, job: Job, starts: Tensor) -> Tensor:
    """Return y [T, d] for x [T, d] in the rows' dtype; p is P [T, N] or None (no gate); starts int64 [N + 1]."""
    # Without an input that requires grad autograd would not record the node, and rows would get no gradient.
    anchor = torch.empty(0, requires_grad=job.train and torch.is_grad_enabled(), device="cpu")
    return _Fused.apply(anchor, x, p, job, starts)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, p: Tensor | None, job: Job, starts: Tensor) -> Tensor:
        x = x.contiguous()
        gates = None if p is None else p.gather(1, job.selection.experts).float()
        banks = _banks(job, starts)
        # Several banks add up in fp32.
        several = len(banks) != 1
        y = torch.zeros(x.shape, dtype=torch.float32, device="cpu") if several else torch.empty_like(x)
        kept = []
        for bank in banks:
            rows, entries, _ = _open(job, bank, train=False)
            kept.append(ops.expert_forward(x, rows, entries, job.scores, gates, y, add=several))
        ctx.save_for_backward(x, gates, *kept)
        ctx.job, ctx.starts, ctx.version = job, starts, job.rows.version
        ctx.p_like = None if p is None else (p.shape, p.dtype)
        job.scores = None
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        job = ctx.job
        check_version(job.rows, ctx.version)
        x, gates, *kept = ctx.saved_tensors
        dy = grads[0].contiguous()
        several = len(kept) != 1
        dx = d_gates = dp = None
        if ctx.needs_input_grad[1]:
            dx = torch.zeros(x.shape, dtype=torch.float32, device="cpu") if several else torch.empty_like(x)
        if gates is not None and ctx.needs_input_grad[2]:
            d_gates = torch.zeros(gates.shape, device="cpu")
        for q, bank in zip(kept, _banks(job, ctx.starts), strict=True):
            rows, entries, total = _open(job, bank, train=job.train)
            grad = total
            if job.train and total is None:
                grad = torch.empty(rows.shape, dtype=torch.float32, device="cpu")
            ops.expert_backward(
                dy,
                x,
                rows,
                entries,
                q,
                gates,
                dx=dx,
                d_gates=d_gates,
                grad=grad,
                add=several,
                add_grad=total is not None,
            )
            if grad is not None and total is None:
                job.rows.add_grad(bank.ids, grad)
        if d_gates is not None:
            shape, dtype = ctx.p_like
            dp = torch.zeros(shape, dtype=dtype, device="cpu").scatter_(1, job.selection.experts, d_gates.to(dtype))
        return None, None if dx is None else dx.to(x.dtype), dp, None, None


class _Bank(NamedTuple):
    """Active rows that one pass works on. positions int64 [n]: where they are in ``active`` [N * m]; ids int64 [n]."""

    positions: Tensor
    ids: Tensor


def _banks(job: Job, starts: Tensor) -> list[_Bank]:
    """Yield all active rows, at most ``capacity`` at a time."""
    active = job.selection.active
    m = active.shape[1]
    positions = active.view(-1).nonzero().view(-1)
    if not positions.shape[0]:
        return []
    expert = positions.div(m, rounding_mode="floor")
    ids = starts[expert] + positions - expert * m
    return list(map(_Bank, positions.split(job.rows.capacity), ids.split(job.rows.capacity)))


def _open(job: Job, bank: _Bank, *, train: bool) -> tuple[Tensor, ops.Entries, Tensor | None]:
    """Return (rows, the entries that use them, gradients to add to): a source's own tensors if it can lend them."""
    in_place = getattr(job.rows, "in_place", None)
    lent = None if in_place is None else in_place(bank.ids, grads=train)
    if lent is not None:
        rows, where, total = lent
    else:
        rows, where, total = job.rows.gather(bank.ids), torch.arange(bank.ids.shape[0], device="cpu"), None
    selection = job.selection
    slots = torch.full(selection.active.shape, -1, dtype=torch.int32, device="cpu")
    slots.view(-1)[bank.positions] = where.to(torch.int32)
    return rows, ops.list_entries(selection.mask, selection.experts, slots), total
