# SPDX-License-Identifier: Apache-2.0
"""AdamW on the host, in place: over a tensor, and over a matrix whose gradient is there for some rows only.

The formula is torch.optim.AdamW's: decoupled weight decay, eps outside the square root, bias correction by step count.
Arithmetic is fp32 whatever the storage; bf16 moments and replicas are rounded to nearest even when they are stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meft_ds.ops import torch_adam
from meft_ds.ops.build import DTYPE_CODES, kernels
from meft_ds.ops.checks import (
    FLOATS,
    check,
    check_active,
    check_betas,
    check_decay,
    check_matrix,
    check_state,
    check_step,
)
from meft_ds.ops.sketch import adam_direction_

_CHUNK = 1 << 22  # values of scratch on an accelerator


@torch.no_grad()
def adamw_(
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    replica: Tensor | None = None,
) -> None:
    """One AdamW step over all of `p`.

    p: fp32, contiguous, any shape. exp_avg, exp_avg_sq: fp32 or bf16, both alike. grad: fp32, bf16 or fp16, left as it
    is; the gradient used is ``grad * grad_scale``. step: this step's number, from 1. replica: fp32, bf16 or fp16,
    gets the new p. All have p's shape. All may lie on an accelerator instead, flat [n].
    """
    if p.device.type != "cpu":
        hyper = (lr, beta1, beta2, eps, weight_decay, grad_scale)
        adamw_by_direction(p, exp_avg, exp_avg_sq, grad, torch_adam.Hyper(*hyper), step, replica)
        return
    check_state(p, exp_avg, exp_avg_sq, replica)
    check("grad", grad, FLOATS, p.shape)
    check_step(step, beta1, beta2)
    hyper = (lr, beta1, beta2, eps, weight_decay, grad_scale)
    cpp = kernels()
    if cpp is None:
        torch_adam.adamw(p, exp_avg, exp_avg_sq, grad, replica, torch_adam.Hyper(*hyper), step)
        return
    state = _state(cpp, p, exp_avg, exp_avg_sq, grad, replica)
    cpp.adamw(state, p.numel(), cpp.Hyper(*hyper), step, torch.get_num_threads())


def adamw_by_direction(
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    hyper: torch_adam.Hyper,
    step: int,
    replica: Tensor | None = None,
) -> None:
    """`adamw_` of flat tensors on any device, by `adam_direction_` and a bounded scratch."""
    scratch = torch.empty(min(p.numel(), _CHUNK), device=p.device)
    parts = [t.split(_CHUNK) for t in (p, exp_avg, exp_avg_sq, grad)]
    for p_, m_, v_, g_ in zip(*parts, strict=True):
        direction = scratch[: p_.numel()]
        adam_direction_(
            m_, v_, g_, direction,
            beta1=hyper.beta1, beta2=hyper.beta2, eps=hyper.eps, step=step, grad_scale=hyper.grad_scale,
        )  # fmt: skip
        p_.mul_(1.0 - hyper.lr * hyper.weight_decay).add_(direction, alpha=-hyper.lr)
    if replica is not None:
        replica.copy_(p)


@torch.no_grad()
def adamw_rows_(
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ids: Tensor,
    grad: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    replica: Tensor | None = None,
) -> None:
    """One AdamW step over every row of `p`, where rows that are not in `ids` have zero gradient ("dense" mode).

    p [n, w], moments and replica as in :func:`adamw_`. ids: int64 [k], sorted and unique, may be empty.
    grad [k, w]: gradients of those rows; the dense gradient is never built.
    """
    check_matrix("p", p)
    check_state(p, exp_avg, exp_avg_sq, replica)
    cpp = kernels()
    check_active(ids, p.shape[0], cpp)
    check("grad", grad, FLOATS, (ids.numel(), p.shape[1]))
    check_step(step, beta1, beta2)
    hyper = (lr, beta1, beta2, eps, weight_decay, grad_scale)
    if cpp is None:
        torch_adam.adamw_rows(p, exp_avg, exp_avg_sq, ids, grad, replica, torch_adam.Hyper(*hyper), step)
        return
    state = _state(cpp, p, exp_avg, exp_avg_sq, grad, replica)
    cpp.adamw_rows(state, ids.data_ptr(), ids.numel(), *p.shape, cpp.Hyper(*hyper), step, torch.get_num_threads())


@torch.no_grad()
def adamw_lazy_rows_(
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_steps: Tensor,
    row_decay: Tensor,
    ids: Tensor,
    grad: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decay_log: float,
    grad_scale: float = 1.0,
    replica: Tensor | None = None,
) -> None:
    """One AdamW step over the rows in `ids` only ("lazy" mode); no other row is read or written.

    p [n, w], ids [k], grad [k, w], moments and replica as in :func:`adamw_rows_`.
    row_steps: int32 [n], steps that each row has taken; goes up by one for active rows and serves bias correction.
    row_decay: float64 [n], the value of `decay_log` up to which each row has been decayed; kept up to date here.
    decay_log: sum of ``log1p(-lr_s * weight_decay_s)`` over all steps *before* this one. Weight decay of the steps
    that a row slept is caught up first (times ``exp(decay_log - row_decay)``), then comes this step's own.
    """
    check_matrix("p", p)
    check_state(p, exp_avg, exp_avg_sq, replica)
    check("row_steps", row_steps, (torch.int32,), (p.shape[0],))
    check("row_decay", row_decay, (torch.float64,), (p.shape[0],))
    cpp = kernels()
    check_active(ids, p.shape[0], cpp)
    check("grad", grad, FLOATS, (ids.numel(), p.shape[1]))
    check_betas(beta1, beta2)
    check_decay(lr, weight_decay)
    hyper = (lr, beta1, beta2, eps, weight_decay, grad_scale)
    if cpp is None:
        torch_adam.adamw_lazy_rows(
            p, exp_avg, exp_avg_sq, row_steps, row_decay, ids, grad, replica, torch_adam.Hyper(*hyper), decay_log
        )
        return
    cpp.adamw_lazy_rows(
        _state(cpp, p, exp_avg, exp_avg_sq, grad, replica),
        row_steps.data_ptr(),
        row_decay.data_ptr(),
        ids.data_ptr(),
        ids.numel(),
        p.shape[1],
        cpp.Hyper(*hyper),
        decay_log,
        torch.get_num_threads(),
    )


def _state(cpp: Any, p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, replica: Tensor | None) -> Any:
    return cpp.State(
        p.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        DTYPE_CODES[exp_avg.dtype],
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        0 if replica is None else replica.data_ptr(),
        DTYPE_CODES[None if replica is None else replica.dtype],
    )
