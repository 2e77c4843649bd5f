# SPDX-License-Identifier: Apache-2.0
"""The adapter's function on a CPU, by selected entries: fused kernels that touch the K rows of a token and no others.

The mathematics of ``compute`` (see there), without its gathered copies of inputs: on a CPU those cost more than the
products. Saved: x, the gates, and q of the selected entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from meft_ds import ops
from meft_ds.sparse_adapter.compute import Job, check_version

__all__ = ["apply_fused", "can_fuse"]


def can_fuse(x: Tensor) -> bool:
    """True where x lies on the CPU and the C++ kernels could be built."""
    return x.device.type == "cpu" and ops.backend() == "cpp"


def apply_fused(x: Tensor, p: Tensor | None, job: Job, starts: Tensor) -> Tensor:
    """y [T, d] for x [T, d] in the rows' dtype; p is P [T, N] or None for ``gate: false``; starts int64 [N + 1]."""
    # Without an input that requires grad autograd would not record the node, and rows would get no gradient.
    anchor = torch.empty(0, requires_grad=job.train and torch.is_grad_enabled())
    return _Fused.apply(anchor, x, p, job, starts)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, p: Tensor | None, job: Job, starts: Tensor) -> Tensor:
        selection = job.selection
        x = x.contiguous()
        gates = None if p is None else p.gather(1, selection.experts).float()
        banks = list(_banks(job, starts))
        # Several banks add up in fp32.
        y = torch.empty_like(x) if len(banks) == 1 else torch.zeros(x.shape, dtype=torch.float32)
        kept = []
        for table, slots in banks:
            entries = ops.list_entries(selection.mask, selection.experts, slots)
            rows = job.rows.gather(table)
            kept.append(ops.expert_forward(x, rows, entries, job.scores, gates, y, add=len(banks) > 1))
        ctx.save_for_backward(x, gates, *kept)
        ctx.job, ctx.starts, ctx.version = job, starts, job.rows.version
        ctx.p_like = None if p is None else (p.shape, p.dtype)
        job.scores = None
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        job, selection = ctx.job, ctx.job.selection
        check_version(job.rows, ctx.version)
        x, gates, *kept = ctx.saved_tensors
        dy = grads[0].contiguous()
        several = len(kept) != 1
        dx = d_gates = dp = None
        if ctx.needs_input_grad[1]:
            dx = torch.zeros(x.shape, dtype=torch.float32) if several else torch.empty_like(x)
        if gates is not None and ctx.needs_input_grad[2]:
            d_gates = torch.zeros(gates.shape)
        for q, (table, slots) in zip(kept, _banks(job, ctx.starts), strict=True):
            entries = ops.list_entries(selection.mask, selection.experts, slots)
            rows = job.rows.gather(table)
            grad = torch.empty(rows.shape, dtype=torch.float32) if job.train else None
            ops.expert_backward(dy, x, rows, entries, q, gates, dx=dx, d_gates=d_gates, grad=grad, add=several)
            if grad is not None:
                job.rows.add_grad(table, grad)
        if d_gates is not None:
            shape, dtype = ctx.p_like
            dp = torch.zeros(shape, dtype=dtype).scatter_(1, selection.experts, d_gates.to(dtype))
        return None, None if dx is None else dx.to(x.dtype), dp, None, None


def _banks(job: Job, starts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(row ids int64 [n], slots int32 [N, m]: where a key lies in them, or -1), at most ``capacity`` rows at a time."""
    active = job.selection.active
    m = active.shape[1]
    positions = active.view(-1).nonzero().view(-1)
    if not positions.shape[0]:
        return
    expert = positions.div(m, rounding_mode="floor")
    ids = starts[expert] + positions - expert * m
    for part, rows in zip(positions.split(job.rows.capacity), ids.split(job.rows.capacity), strict=True):
        slots = torch.full(active.shape, -1, dtype=torch.int32)
        slots.view(-1)[part] = torch.arange(part.shape[0], dtype=torch.int32)
        yield rows, slots
