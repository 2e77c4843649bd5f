# SPDX-License-Identifier: Apache-2.0
"""The adapter's function and its gradients, by expert groups: one micro-batch costs T E r/N row products instead of T U.

With S the active rows, Q = X A_S^T, Gam_tj = P_{t,e(j)}, M the selection: Z = relu(M Gam Q) and Y = Z V_S. Backward:
dV_S = Z^T dY; Ez = (dY V_S^T) [Z > 0]; dQ = Ez Gam; dA_S = dQ^T X; dP_te = sum_{j in e} (Ez Q)_tj; dX = dQ A_S. The
router's part of dX and dG come from autograd through P. GEMMs run in the rows' dtype, sums over experts, tiles and
tokens in fp32. Saved: x, the gates, and the selected entries of Q (in tile order, E m per token, a few per cent of x),
which also say where Z > 0; they cost less than computing Q again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meft_ds.sparse_adapter.plan import Bank, GroupPlan, Tiles
from meft_ds.sparse_adapter.rows import RowSource
from meft_ds.sparse_adapter.select import Selection

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
    """y [T, d] for x [T, d] in the rows' dtype; p is P [T, N], or None for ``gate: false``."""
    # Without an input that requires grad autograd would not record the node, and rows would get no gradient.
    anchor = torch.empty(0, device=x.device, requires_grad=job.train and torch.is_grad_enabled())
    return _Grouped.apply(anchor, x, p, job)


def check_version(rows: RowSource, seen: int) -> None:
    """Raises RuntimeError when rows changed between forward and backward: the gradient would belong to neither."""
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
    """y [T, d] and the selected q of all tile rows, 0 elsewhere: [sum of tile rows, m]."""
    d, mask = x.shape[1], job.selection.mask
    m, E = mask.shape[2], mask.shape[1]
    plan = _plan(job)
    several = len(plan.banks) > 1
    y = x.new_zeros(x.shape, dtype=torch.float32 if several else x.dtype)
    saved: list[Tensor] = []
    flat_mask = mask.view(-1, m)
    flat_gates = None if gates is None else gates.view(-1)
    flat_scores = None if job.scores is None else job.scores.view(-1, m)
    for bank, chunks in plan.banks:
        W = _gather(job.rows, bank, m)
        for tiles in chunks:
            gam = None if flat_gates is None else flat_gates[tiles.pair][:, None]
            selected = flat_mask.index_select(0, tiles.pair) & tiles.valid[:, None]
            scores = None if flat_scores is None else flat_scores.index_select(0, tiles.pair)
            out = x.new_empty(tiles.rows + 1, d)
            out[-1] = 0
            q_saved = x.new_empty(tiles.rows, m)
            for block in tiles.blocks(d * x.element_size()):
                w = _bank_rows(W, tiles, block.tiles)
                n = w.shape[0]
                if scores is None:
                    xg = x.index_select(0, tiles.token[block.rows]).view(n, tiles.size, d)
                    q = torch.bmm(xg, w[..., :d].transpose(1, 2)).view(-1, m)
                else:
                    q = scores[block.rows]
                s = q.float() if gam is None else gam[block.rows] * q.float()
                # relu again: q may differ in the last bit from the q that selection saw on another device.
                on = selected[block.rows] & (s > 0)
                q_saved[block.rows] = q.masked_fill(~on, 0)
                z = s.masked_fill_(~on, 0).to(x.dtype).view(n, tiles.size, m)
                torch.bmm(z, w[..., d:], out=out[block.rows].view(n, tiles.size, d))
            saved.append(q_saved)
            part = _sum_pairs(out, tiles, E)
            here = y[tiles.token_lo : tiles.token_hi]
            if several:
                here += part
            else:
                here.copy_(part)
    return y.to(x.dtype), torch.cat(saved) if saved else x.new_zeros(0, m)


def _backward(
    dy: Tensor, x: Tensor, gates: Tensor | None, q_all: Tensor, job: Job, need_x: bool, need_p: bool
) -> tuple[Tensor | None, Tensor | None]:
    d, mask = x.shape[1], job.selection.mask
    m, E = mask.shape[2], mask.shape[1]
    plan = _plan(job)
    several = len(plan.banks) > 1
    dx = x.new_zeros(x.shape, dtype=torch.float32 if several else x.dtype) if need_x else None
    d_gates = torch.zeros(mask.shape[:2], dtype=torch.float32, device=x.device) if need_p else None
    done = 0
    for bank, chunks in plan.banks:
        W = _gather(job.rows, bank, m)
        dW = torch.zeros(W.shape, dtype=torch.float32, device=x.device) if job.train else None
        for tiles in chunks:
            q_tiles = q_all[done : done + tiles.rows]
            done += tiles.rows
            gam = None if gates is None else gates.view(-1)[tiles.pair][:, None]
            out = x.new_empty(tiles.rows + 1, d) if need_x else None
            dg = torch.zeros(tiles.rows + 1, dtype=torch.float32, device=x.device) if need_p else None
            for block in tiles.blocks(d * x.element_size()):
                w = _bank_rows(W, tiles, block.tiles)
                n = w.shape[0]
                token = tiles.token[block.rows]
                dyg = dy.index_select(0, token).view(n, tiles.size, d)
                q = q_tiles[block.rows].float()
                ez = torch.bmm(dyg, w[..., d:].transpose(1, 2)).view(-1, m).float().masked_fill_(q == 0, 0)
                if dg is not None:
                    torch.sum(ez * q, dim=1, out=dg[block.rows])
                dq = (ez if gam is None else ez * gam[block.rows]).to(x.dtype).view(n, tiles.size, m)
                if out is not None:
                    torch.bmm(dq, w[..., :d], out=out[block.rows].view(n, tiles.size, d))
                if dW is not None:
                    z = (q if gam is None else q * gam[block.rows]).to(x.dtype).view(n, tiles.size, m)
                    xg = x.index_select(0, token).view(n, tiles.size, d)
                    part = torch.cat([torch.bmm(dq.transpose(1, 2), xg), torch.bmm(z.transpose(1, 2), dyg)], dim=2)
                    _add_tiles(dW, part, tiles, block.tiles)
            if out is not None and dx is not None:
                out[-1] = 0
                here = dx[tiles.token_lo : tiles.token_hi]
                if several:
                    here += _sum_pairs(out, tiles, E)
                else:
                    here.copy_(_sum_pairs(out, tiles, E))
            if dg is not None and d_gates is not None:
                d_gates[tiles.token_lo : tiles.token_hi] += dg[tiles.slot].view(-1, E)
        if dW is not None:
            job.rows.add_grad(bank.table, dW.view(-1, 2 * d))
    return None if dx is None else dx.to(x.dtype), d_gates


def _plan(job: Job) -> GroupPlan:
    plan = job.selection.plan
    assert plan is not None, "the grouped form needs a selection with a plan"
    return plan


def _gather(rows: RowSource, bank: Bank, m: int) -> Tensor:
    """Rows of a bank: [G, m, 2 d]."""
    return rows.gather(bank.table).view(-1, m, 2 * rows.d)


def _bank_rows(W: Tensor, tiles: Tiles, block: slice) -> Tensor:
    """Rows of every tile of a block: [n, m, 2 d]; no copy when each group has exactly one tile."""
    if (
        tiles.count == W.shape[0]
        and tiles.first[-1] == tiles.first.shape[0] - 1
        and bool((tiles.first.diff() == 1).all())
    ):
        return W[block]
    return W.index_select(0, tiles.group[block])


def _sum_pairs(out: Tensor, tiles: Tiles, per_token: int) -> Tensor:
    """Sums the E pairs of every token: gather and sum in one pass, fp32 sums, the same order in every run."""
    return F.embedding_bag(tiles.slot.view(-1, per_token), out, mode="sum")


def _add_tiles(dW: Tensor, part: Tensor, tiles: Tiles, block: slice) -> None:
    """Adds tiles' row gradients [n, m, 2 d] to their groups' in dW [G, m, 2 d], in a fixed order."""
    lo = int(torch.searchsorted(tiles.first, block.start, right=True)) - 1
    hi = int(torch.searchsorted(tiles.first, block.stop - 1, right=True))
    target = dW[lo:hi].view(hi - lo, -1)
    flat = part.view(part.shape[0], -1)
    if hi - lo == part.shape[0] and bool((tiles.first[lo + 1 : hi] - tiles.first[lo : hi - 1] == 1).all()):
        target += flat
        return
    offsets = (tiles.first[lo:hi] - block.start).clamp(min=0).to(dW.device, non_blocking=True)
    index = torch.arange(part.shape[0], device=dW.device)
    target += F.embedding_bag(index, flat.float(), offsets, mode="sum")
