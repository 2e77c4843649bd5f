# SPDX-License-Identifier: Apache-2.0
"""The same function over the union of active rows: every token against all U rows, masked. Slow, plain, the oracle.

It is also the form of ``scope: "batch"`` (the paper's Algorithm 1), where every token does use the whole union. More
than ``rows.capacity`` rows are worked through in column chunks; sums over chunks are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meft_ds.sparse_adapter.forward.grouped import Job, check_version

__all__ = ["apply_union"]


def apply_union(x: Tensor, p: Tensor | None, job: Job, starts: Tensor, whole_batch: bool) -> Tensor:
    """Return y [T, d] for x [T, d]; p is P [T, N] or None; ``starts`` int64 [N + 1] on the host.

    ``whole_batch``: a token uses all rows of the union with s > 0 (padding tokens use none), not only its own.
    """
    anchor = torch.empty(0, device=x.device, requires_grad=job.train and torch.is_grad_enabled())
    return _Union.apply(anchor, x, p, job, starts, whole_batch)


class _Union(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, p: Tensor | None, job: Job, starts: Tensor, whole_batch: bool
    ) -> Tensor:
        ctx.save_for_backward(x, p)
        ctx.job, ctx.starts, ctx.whole_batch, ctx.version = job, starts, whole_batch, job.rows.version
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for ids, expert in _columns(job, starts):
            W = job.rows.gather(ids)
            _q, z = _scores(x, p, W, ids, expert, job, starts, whole_batch)
            y += (z.to(x.dtype) @ W[:, x.shape[1] :]).float()
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        job, starts = ctx.job, ctx.starts
        check_version(job.rows, ctx.version)
        x, p = ctx.saved_tensors
        dy = grads[0].contiguous()
        d = x.shape[1]
        dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        dp = None if p is None else torch.zeros(p.shape, dtype=torch.float32, device=x.device)
        for ids, expert in _columns(job, starts):
            W = job.rows.gather(ids)
            q, z = _scores(x, p, W, ids, expert, job, starts, ctx.whole_batch)
            ez = (dy @ W[:, d:].t()).float().masked_fill_(z == 0, 0)
            dq = ez if p is None else ez * p.index_select(1, expert.to(p.device)).float()
            dq = dq.to(x.dtype)
            dx += (dq @ W[:, :d]).float()
            if dp is not None:
                present, counts = expert.unique_consecutive(return_counts=True)
                offsets = (counts.cumsum(0) - counts).to(x.device)
                columns = torch.arange(ids.shape[0], device=x.device)
                sums = F.embedding_bag(columns, (ez * q).t().contiguous(), offsets, mode="sum")
                here = present.to(x.device)
                dp[:, here] += sums.t()
            if job.train:
                job.rows.add_grad(ids, torch.cat([(dq.t() @ x).float(), (z.to(x.dtype).t() @ dy).float()], dim=1))
        return None, dx.to(x.dtype), None if dp is None else dp.to(p.dtype), None, None, None


def _columns(job: Job, starts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Row ids and their experts, host int64, at most ``capacity`` at a time."""
    expert, slot = job.selection.active.nonzero().unbind(1)
    if not expert.shape[0]:
        return
    ids = starts[expert] + slot
    yield from zip(ids.split(job.rows.capacity), expert.split(job.rows.capacity), strict=True)


def _scores(
    x: Tensor, p: Tensor | None, W: Tensor, ids: Tensor, expert: Tensor, job: Job, starts: Tensor, whole_batch: bool
) -> tuple[Tensor, Tensor]:
    """Return q = x . k [T, u] and z = relu(M Gam q) [T, u], both fp32."""
    q = (x @ W[:, : x.shape[1]].t()).float()
    s = q if p is None else p.index_select(1, expert.to(p.device)).float() * q
    selection = job.selection
    if whole_batch:
        on = s > 0
        if selection.tokens is not None:
            on &= selection.tokens[:, None]
    else:
        T, _E, m = selection.mask.shape
        n_slots = (starts.shape[0] - 1) * m
        slots = (selection.experts[..., None] * m + torch.arange(m, device=x.device)).view(T, -1)
        chosen = torch.zeros(T, n_slots, dtype=torch.bool, device=x.device)
        chosen.scatter_(1, slots, selection.mask.view(T, -1))
        columns = (expert * m + ids - starts[expert]).to(x.device)
        on = chosen.index_select(1, columns) & (s > 0)
    return q, s.masked_fill(~on, 0)
