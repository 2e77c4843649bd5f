# SPDX-License-Identifier: Apache-2.0
"""AdamW in place: over a tensor, over a matrix whose gradient is there for some rows only, and its direction alone.

The formula is torch.optim.AdamW's: decoupled weight decay, eps outside the square root, bias correction by step count.
Arithmetic is fp32 whatever the storage. bf16 moments and replicas are rounded to nearest even when they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from meft_ds.ops.build import address, kernels, triton_kernels, typed
from meft_ds.ops.checks import FLOATS, MOMENTS, expect

_CHUNK = 1 << 22  # values of scratch on an accelerator
# Values of scratch on the host. Torch splits no op of so few values over threads, so their number changes no bit.
_HOST_CHUNK = 1 << 14


@dataclass(frozen=True, kw_only=True)
class AdamHyper:
    """AdamW's numbers of one step, read from the user's parameter group at that step.

    Raises:
        ValueError: unless both betas lie in [0, 1).
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    def __post_init__(self) -> None:
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), it is {beta}")

    @property
    def log_decay(self) -> float:
        """Logarithm of the factor by which this step's weight decay shrinks a weight.

        Raises:
            ValueError: if that factor is not above 0.
        """
        if self.lr * self.weight_decay >= 1.0:
            raise ValueError(f"weight_decay times lr must be below 1, it is {self.weight_decay} * {self.lr}")
        return math.log1p(-self.lr * self.weight_decay)


@torch.no_grad()
def adamw_(
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    hyper: AdamHyper,
    *,
    step: int,
    grad_scale: float = 1.0,
    replica: Tensor | None = None,
) -> None:
    """Take one AdamW step over all of `p`. All tensors have p's shape and device, and are contiguous.

    Args:
        p: fp32, any shape, updated in place.
        exp_avg, exp_avg_sq: fp32 or bf16, both alike, updated in place.
        grad: fp32, bf16 or fp16, left as it is; the gradient used is ``grad * grad_scale``.
        step: this step's number, from 1.
        replica: fp32, bf16 or fp16; gets the new p.

    Raises:
        ValueError: naming the argument that does not fit.

    Example:
        >>> hyper = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
        >>> adamw_(p, exp_avg, exp_avg_sq, grad, hyper, step=1)
    """
    _expect_state(p, exp_avg, exp_avg_sq, replica)
    expect("grad", grad, FLOATS, p.shape, p.device)
    _expect_step(step)
    cpp = kernels(p.device)
    if cpp is not None:
        state = _state(cpp, p, exp_avg, exp_avg_sq, grad, replica)
        cpp.adamw(state, p.numel(), _numbers(cpp, hyper, grad_scale), step, torch.get_num_threads())
        return
    adamw_by_direction(p, exp_avg, exp_avg_sq, grad, hyper, step=step, grad_scale=grad_scale)
    if replica is not None:
        replica.copy_(p)


def adamw_by_direction(
    p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, hyper: AdamHyper, *, step: int, grad_scale: float
) -> None:
    """Do what `adamw_` does on any device, by `adam_direction_` and a bounded scratch."""
    size = _HOST_CHUNK if p.device.type == "cpu" else _CHUNK
    scratch = torch.empty(min(p.numel(), size), device=p.device)
    parts = [t.view(-1).split(size) for t in (p, exp_avg, exp_avg_sq, grad)]
    for p_, m_, v_, g_ in zip(*parts, strict=True):
        direction = scratch[: p_.numel()]
        adam_direction_(m_, v_, g_, direction, hyper, step=step, grad_scale=grad_scale)
        p_.mul_(1.0 - hyper.lr * hyper.weight_decay).add_(direction, alpha=-hyper.lr)


@torch.no_grad()
def adamw_rows_(
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ids: Tensor,
    grad: Tensor,
    hyper: AdamHyper,
    *,
    step: int,
    grad_scale: float = 1.0,
    replica: Tensor | None = None,
) -> None:
    """Take one AdamW step over every row of `p`; rows that are not in `ids` have zero gradient ("dense" mode).

    Args:
        p: fp32 [n, w], on the host. Moments, step, grad_scale and replica are as in `adamw_`.
        ids: int64 [k], sorted and unique; may be empty.
        grad: [k, w], the gradients of those rows. The dense gradient is never built.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    cpp = kernels()
    _expect_rows(cpp, p, exp_avg, exp_avg_sq, ids, grad, replica)
    _expect_step(step)
    if cpp is not None:
        state, numbers = _state(cpp, p, exp_avg, exp_avg_sq, grad, replica), _numbers(cpp, hyper, grad_scale)
        cpp.adamw_rows(state, ids.data_ptr(), ids.numel(), *p.shape, numbers, step, torch.get_num_threads())
        return
    for own, here, part in blocks_of_rows(ids, p.shape[0], _rows_at_once(p)):
        whole = torch.zeros_like(p[own]).index_copy_(0, here, grad[part].float())
        state = (p[own], exp_avg[own], exp_avg_sq[own])
        adamw_by_direction(*state, whole, hyper, step=step, grad_scale=grad_scale)
    if replica is not None:
        replica.copy_(p)


@torch.no_grad()
def adamw_lazy_rows_(
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_steps: Tensor,
    row_decay: Tensor,
    ids: Tensor,
    grad: Tensor,
    hyper: AdamHyper,
    *,
    decay_log: float,
    grad_scale: float = 1.0,
    replica: Tensor | None = None,
) -> None:
    """Take one AdamW step over the rows in `ids` only ("lazy" mode); no other row is read or written.

    Weight decay of the steps that a row slept is caught up first (times ``exp(decay_log - row_decay)``). Then comes
    this step's own.

    Args:
        p: fp32 [n, w], on the host. ids, grad, moments, grad_scale and replica are as in `adamw_rows_`.
        row_steps: int32 [n], steps that each row has taken. Active rows count one more; it serves bias correction.
        row_decay: float64 [n], the value of `decay_log` up to which each row has been decayed; kept up to date here.
        decay_log: the sum of `AdamHyper.log_decay` over all steps before this one.

    Raises:
        ValueError: naming the argument that does not fit, or if lr times weight_decay is 1 or more.
    """
    cpp = kernels()
    _expect_rows(cpp, p, exp_avg, exp_avg_sq, ids, grad, replica)
    expect("row_steps", row_steps, (torch.int32,), p.shape[:1])
    expect("row_decay", row_decay, (torch.float64,), p.shape[:1])
    after = decay_log + hyper.log_decay
    if cpp is not None:
        state, numbers = _state(cpp, p, exp_avg, exp_avg_sq, grad, replica), _numbers(cpp, hyper, grad_scale)
        counters = row_steps.data_ptr(), row_decay.data_ptr(), ids.data_ptr()
        cpp.adamw_lazy_rows(state, *counters, *grad.shape, numbers, decay_log, torch.get_num_threads())
        return
    height = _rows_at_once(p)
    for here, g_ in zip(ids.split(height), grad.split(height), strict=True):
        p_, m_, v_ = (t.index_select(0, here) for t in (p, exp_avg, exp_avg_sq))
        steps = row_steps.index_select(0, here) + 1
        catch_up = torch.exp(decay_log - row_decay.index_select(0, here)) * (1.0 - hyper.lr * hyper.weight_decay)
        direction = torch.empty_like(p_)
        direction_in_torch(m_, v_, g_, direction, hyper, step=steps[:, None].double(), grad_scale=grad_scale)
        p_.mul_(catch_up[:, None]).add_(direction, alpha=-hyper.lr)
        for whole, rows in ((p, p_), (exp_avg, m_), (exp_avg_sq, v_), (row_steps, steps)):
            whole.index_copy_(0, here, rows)
        if replica is not None:
            replica.index_copy_(0, here, p_.to(replica.dtype))
    row_decay.index_fill_(0, ids, after)


@torch.no_grad()
def adam_direction_(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    out: Tensor,
    hyper: AdamHyper,
    *,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """Compute AdamW's direction, m_hat / (sqrt(v_hat) + eps), without a weight to move. lr and decay are not used.

    Args:
        exp_avg, exp_avg_sq: fp32 or bf16 [n], both alike, updated in place with ``grad * grad_scale``.
        grad: fp32, bf16 or fp16 [n].
        out: fp32, bf16 or fp16 [n]. All tensors lie on one device and are contiguous.
        step: this step's number, from 1.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    expect("grad", grad, FLOATS, (None,), grad.device)
    expect("exp_avg", exp_avg, MOMENTS, grad.shape, grad.device)
    expect("exp_avg_sq", exp_avg_sq, (exp_avg.dtype,), grad.shape, grad.device)
    expect("out", out, FLOATS, grad.shape, grad.device)
    _expect_step(step)
    cpp, triton = kernels(grad.device), triton_kernels(grad.device)
    if cpp is not None:
        moments = exp_avg.data_ptr(), *typed(exp_avg_sq)
        at = (*typed(grad), *moments, *typed(out), grad.numel())
        numbers = _numbers(cpp, replace(hyper, lr=1.0), grad_scale)  # the kernel returns lr times the direction
        cpp.adam_direction(*at, numbers, step, torch.get_num_threads())
    elif triton is not None:
        betas = dict(beta1=hyper.beta1, beta2=hyper.beta2)
        triton.adam_direction(exp_avg, exp_avg_sq, grad, out, **betas, eps=hyper.eps, step=step, grad_scale=grad_scale)
    else:
        direction_in_torch(exp_avg, exp_avg_sq, grad, out, hyper, step=step, grad_scale=grad_scale)


def direction_in_torch(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    out: Tensor,
    hyper: AdamHyper,
    *,
    step: int | Tensor,
    grad_scale: float,
) -> None:
    """Do what `adam_direction_` does in plain torch. The step may be that of each row, float64 [k, 1]."""
    g = grad.float() * grad_scale
    m = exp_avg.float().lerp(g, 1 - hyper.beta1)
    v = exp_avg_sq.float().mul(hyper.beta2).addcmul(g, g, value=1 - hyper.beta2)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    first, second = 1 - hyper.beta1**step, (1 - hyper.beta2**step) ** 0.5
    if isinstance(first, Tensor):  # torch would divide in float64, at half the speed
        first, second = first.float(), second.float()
    denominator = v.sqrt().div_(second).add_(hyper.eps)
    out.copy_(m.div_(first).div_(denominator))


def blocks_of_rows(ids: Tensor, n: int, height: int) -> Iterator[tuple[slice, Tensor, slice]]:
    """Cut n rows into blocks of `height` rows.

    Args:
        ids: int64 [k], ascending: the active rows.

    Yields:
        The block's rows; ids of its active rows, counted from its first row; where those ids lie in `ids`.
    """
    firsts = range(0, n, height)
    cuts = torch.searchsorted(ids, torch.tensor([*firsts, n], device="cpu")).tolist()
    for first, begin, end in zip(firsts, cuts, cuts[1:], strict=False):
        yield slice(first, min(first + height, n)), ids[begin:end] - first, slice(begin, end)


def _rows_at_once(p: Tensor) -> int:
    return max(1, _HOST_CHUNK // max(1, p.shape[1]))


def _expect_state(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, replica: Tensor | None) -> None:
    expect("p", p, (torch.float32,), p.shape, p.device)
    expect("exp_avg", exp_avg, MOMENTS, p.shape, p.device)
    expect("exp_avg_sq", exp_avg_sq, (exp_avg.dtype,), p.shape, p.device)
    expect("replica", replica, FLOATS, p.shape, p.device)


def _expect_rows(
    cpp: Any | None, p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ids: Tensor, grad: Tensor, replica: Tensor | None
) -> None:
    expect("p", p, (torch.float32,), (None, None))
    _expect_state(p, exp_avg, exp_avg_sq, replica)
    expect("ids", ids, (torch.int64,), (None,))
    _expect_ascending(cpp, ids, p.shape[0])
    expect("grad", grad, FLOATS, (ids.numel(), p.shape[1]))


def _expect_ascending(cpp: Any | None, ids: Tensor, rows: int) -> None:
    if ids.numel() == 0 or (cpp is not None and cpp.ascending(ids.data_ptr(), ids.numel(), rows)):
        return
    if not bool((ids[1:] > ids[:-1]).all()):
        raise ValueError("ids must be sorted and unique; pass torch.unique(ids)")
    if int(ids[0]) < 0 or int(ids[-1]) >= rows:
        raise ValueError(f"ids must lie in [0, {rows}), they run from {int(ids[0])} to {int(ids[-1])}")


def _expect_step(step: int) -> None:
    if step < 1:
        raise ValueError(f"step counts from 1, it is {step}")


def _state(cpp: Any, p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, replica: Tensor | None) -> Any:
    return cpp.State(address(p), address(exp_avg), *typed(exp_avg_sq), *typed(grad), *typed(replica))


def _numbers(cpp: Any, hyper: AdamHyper, grad_scale: float) -> Any:
    return cpp.Hyper(hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, grad_scale)
