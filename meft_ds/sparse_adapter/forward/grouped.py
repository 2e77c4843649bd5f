# SPDX-License-Identifier: Apache-2.0
"""The adapter's function and its gradients, by expert groups: T E r/N row products per micro-batch instead of T U.

With S the active rows, Q = X A_S^T, Gam_tj = P_{t,e(j)}, M the selection: Z = relu(M Gam Q) and Y = Z V_S. Backward:
dV_S = Z^T dY; Ez = (dY V_S^T) [Z > 0]; dQ = Ez Gam; dA_S = dQ^T X; dP_te = sum_{j in e} (Ez Q)_tj; dX = dQ A_S. The
router's part of dX and dG come from autograd through P. GEMMs run in the rows' dtype, sums over experts, tiles and
tokens in fp32. Saved: x, the gates, and the selected entries of Q (in group order, E m per token, a few per cent of x),
which also say where Z > 0; they cost less than computing Q again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meft_ds.sparse_adapter.forward.grouping import Bank, Block, GroupPlan, Groups
from meft_ds.sparse_adapter.forward.select import Selection
from meft_ds.sparse_adapter.rows.source import RowSource

__all__ = ["Job", "apply_grouped", "check_version"]


@dataclass(eq=False)
class Job:
    """What one call needs beside tensors with gradients. ``train``: row gradients go to ``rows`` in backward."""

    rows: RowSource
    selection: Selection
    train: bool
    scores: Tensor | None = None
    """q [T, E, m] when the selection ran on this device with these keys; saves the first GEMM."""


def apply_grouped(x: Tensor, p: Tensor | None, job: Job) -> Tensor:
    """Return y [T, d] for x [T, d] in the rows' dtype; p is P [T, N], or None for ``gate: false``."""
    # Without an input that requires grad autograd would not record the node, and rows would get no gradient.
    anchor = torch.empty(0, device=x.device, requires_grad=job.train and torch.is_grad_enabled())
    return _Grouped.apply(anchor, x, p, job)


def check_version(rows: RowSource, seen: int) -> None:
    """Raise RuntimeError when rows changed between forward and backward: the gradient would belong to neither."""
    if rows.version != seen:
        raise RuntimeError(
            f"the sparse adapter's rows changed between forward and backward (version {seen}, now {rows.version}); run "
            "backward before the optimizer step, and run the forward again after it"
        )


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, p: Tensor | None, job: Job) -> Tensor:
        gates = None if p is None else p.gather(1, job.selection.experts).float()
        y, q = _forward(x, gates, job)
        ctx.save_for_backward(x, gates, q)
        ctx.job, ctx.version = job, job.rows.version
        ctx.p_like = None if p is None else (p.shape, p.dtype)
        job.scores = None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_version(ctx.job.rows, ctx.version)
        x, gates, q = ctx.saved_tensors
        need_p = gates is not None and ctx.needs_input_grad[2]
        dx, d_gates = _backward(grads[0].contiguous(), x, gates, q, ctx.job, ctx.needs_input_grad[1], need_p)
        dp = None
        if d_gates is not None:
            shape, dtype = ctx.p_like
            dp = torch.zeros(shape, dtype=torch.float32, device=x.device)
            dp = dp.scatter_(1, ctx.job.selection.experts, d_gates).to(dtype)
        return None, dx, dp, None


def _forward(x: Tensor, gates: Tensor | None, job: Job) -> tuple[Tensor, Tensor]:
    """Return y [T, d] and the selected q of all padded rows, 0 elsewhere: [rows of all groups, m]."""
    d, mask = x.shape[1], job.selection.mask
    E, m = mask.shape[1:]
    plan = _plan(job)
    several = len(plan.banks) > 1
    y = x.new_zeros(x.shape, dtype=torch.float32 if several else x.dtype)
    saved: list[Tensor] = []
    for bank, chunks in plan.banks:
        K, V = _gather(job.rows, bank)
        for groups in chunks:
            gam = _per_row(gates, groups)
            on = (mask.view(-1, m).index_select(0, groups.pair) & groups.valid[:, None]).to(x.dtype)
            q_all = x.new_empty(groups.rows, m) if job.scores is None else _scores(job.scores, groups)
            out = x.new_empty(groups.rows + 1, d)
            out[-1] = 0
            for block in groups.blocks:
                n, size, _ = shape = (block.n, block.size, -1)
                q = q_all[block.rows]
                if job.scores is None:
                    xg = x.index_select(0, groups.token[block.rows]).view(shape)
                    torch.bmm(xg, _take(K, groups, block).transpose(1, 2), out=q.view(shape))
                if x.dtype == torch.float16:
                    q.masked_fill_(on[block.rows] == 0, 0)  # a score that nobody selected may be inf
                else:
                    q *= on[block.rows]  # about five times faster on a CPU
                # relu once more: q may differ in its last bit from what selection saw on another device.
                z = (q.float() if gam is None else gam[block.rows] * q).clamp_(min=0)
                if job.scores is None:
                    q *= z > 0
                torch.bmm(z.to(x.dtype).view(n, size, m), _take(V, groups, block), out=out[block.rows].view(shape))
            saved.append(q_all)
            _add_tokens(y, out, groups, E, several)
    return y.to(x.dtype), saved[0] if len(saved) == 1 else torch.cat([x.new_zeros(0, m), *saved])


def _backward(
    dy: Tensor, x: Tensor, gates: Tensor | None, q_saved: Tensor, job: Job, need_x: bool, need_p: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return (dX, dP at the selected experts [T, E] fp32); row gradients go to ``job.rows``."""
    d, mask = x.shape[1], job.selection.mask
    E, m = mask.shape[1:]
    plan = _plan(job)
    several = len(plan.banks) > 1
    dx = x.new_zeros(x.shape, dtype=torch.float32 if several else x.dtype) if need_x else None
    d_gates = torch.zeros(mask.shape[:2], dtype=torch.float32, device=x.device) if need_p else None
    done = 0
    for bank, chunks in plan.banks:
        K, V = _gather(job.rows, bank)
        # With one chunk every group is written once; with several they add up.
        make = torch.zeros if any(groups.order is not None for groups in chunks) else torch.empty
        dW = make((*K.shape[:2], 2 * d), dtype=torch.float32, device=x.device) if job.train else None
        for groups in chunks:
            q_all = q_saved[done : done + groups.rows]
            done += groups.rows
            gam = _per_row(gates, groups)
            out = x.new_empty(groups.rows + 1, d) if dx is not None else None
            dg = torch.zeros(groups.rows + 1, device=x.device) if d_gates is not None else None
            for block in groups.blocks:
                n, size, _ = shape = (block.n, block.size, -1)
                token = groups.token[block.rows]
                dyg = dy.index_select(0, token).view(shape)
                q = q_all[block.rows].float()
                ez = torch.bmm(dyg, _take(V, groups, block).transpose(1, 2)).view(-1, m) * (q != 0)
                if dg is not None:
                    torch.sum(ez * q, dim=1, out=dg[block.rows])
                dq = (ez if gam is None else ez * gam[block.rows]).to(x.dtype).view(n, size, m)
                if out is not None:
                    torch.bmm(dq, _take(K, groups, block), out=out[block.rows].view(shape))
                if dW is not None:
                    z = (q if gam is None else q * gam[block.rows]).to(x.dtype).view(n, size, m)
                    xg = x.index_select(0, token).view(shape)
                    _add_rows(dW[..., :d], torch.bmm(dq.transpose(1, 2), xg), groups, block)
                    _add_rows(dW[..., d:], torch.bmm(z.transpose(1, 2), dyg), groups, block)
            if out is not None and dx is not None:
                out[-1] = 0
                _add_tokens(dx, out, groups, E, several)
            if dg is not None and d_gates is not None:
                d_gates[groups.token_lo : groups.token_hi] += dg.index_select(0, groups.slot).view(-1, E)
        if dW is not None:
            job.rows.add_grad(bank.table.view(-1), dW.view(-1, 2 * d))
    return None if dx is None else dx.to(x.dtype), d_gates


def _plan(job: Job) -> GroupPlan:
    plan = job.selection.plan
    assert plan is not None, "the grouped form needs a selection with a plan"
    return plan


def _gather(rows: RowSource, bank: Bank) -> tuple[Tensor, Tensor]:
    """Gather keys and values of a bank, [G, m, d] each, contiguous: GEMM libraries would copy them anyway."""
    W = rows.gather(bank.table.view(-1)).view(*bank.table.shape, 2 * rows.d)
    return W[..., : rows.d].contiguous(), W[..., rows.d :].contiguous()


def _per_row(gates: Tensor | None, groups: Groups) -> Tensor | None:
    return None if gates is None else gates.view(-1).index_select(0, groups.pair)[:, None]


def _scores(scores: Tensor, groups: Groups) -> Tensor:
    return scores.view(-1, scores.shape[2]).index_select(0, groups.pair)


def _take(bank_rows: Tensor, groups: Groups, block: Block) -> Tensor:
    """Gather the rows of a block's groups [n, m, d]."""
    return bank_rows[block.groups] if groups.order is None else bank_rows[groups.order[block.groups]]


def _add_rows(total: Tensor, part: Tensor, groups: Groups, block: Block) -> None:
    """Write (one chunk) or add (several) row gradients [n, m, d] of a block's groups, each group once: no races."""
    if groups.order is None:
        total[block.groups] = part
    else:
        total.index_add_(0, groups.order[block.groups], part.float())


def _add_tokens(total: Tensor, out: Tensor, groups: Groups, per_token: int, several: bool) -> None:
    """Sum the E pairs of every token: gather and sum in one pass, in fp32, in the same order in every run."""
    part = F.embedding_bag(groups.slot.view(-1, per_token), out, mode="sum")
    here = total[groups.token_lo : groups.token_hi]
    if several:
        here += part
    else:
        here.copy_(part)
