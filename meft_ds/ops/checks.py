# SPDX-License-Identifier: Apache-2.0
"""Cheap checks of what callers hand to the ops: the kernels work on addresses and would write anywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOMENTS = (torch.float32, torch.bfloat16)


def check(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | torch.Size) -> None:
    """Raises ValueError unless `t` is a contiguous CPU tensor of one of `dtypes` and of this shape."""
    if t.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, it is on {t.device}")
    if t.dtype not in dtypes:
        raise ValueError(f"{name} must be {_join(dtypes)}, it is {t.dtype}")
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, it has {tuple(t.shape)}")
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous; pass {name}.contiguous() or a contiguous buffer")


def check_state(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, replica: Tensor | None) -> None:
    check("p", p, (torch.float32,), p.shape)
    check("exp_avg", exp_avg, MOMENTS, p.shape)
    check("exp_avg_sq", exp_avg_sq, (exp_avg.dtype,), p.shape)
    if replica is not None:
        check("replica", replica, FLOATS, p.shape)


def check_matrix(name: str, t: Tensor) -> None:
    if t.dim() != 2:
        raise ValueError(f"{name} must be a matrix [rows, width], it has shape {tuple(t.shape)}")


def check_active(ids: Tensor, rows: int, cpp: Any | None) -> None:
    """ids of active rows: int64 [k], strictly ascending (so unique), in [0, rows)."""
    check("ids", ids, (torch.int64,), (ids.numel(),))
    if ids.numel() == 0 or (cpp is not None and cpp.ascending(ids.data_ptr(), ids.numel(), rows)):
        return
    first, last = int(ids[0]), int(ids[-1])
    if first < 0 or last >= rows:
        raise ValueError(f"ids must lie in [0, {rows}), they run from {first} to {last}")
    if ids.numel() > 1 and not bool((ids[1:] > ids[:-1]).all()):
        raise ValueError("ids must be sorted and unique; pass torch.unique(ids)")


def check_ids(ids: Tensor, rows: int) -> None:
    """ids of any order: int64 [k], in [0, rows)."""
    check("ids", ids, (torch.int64,), (ids.numel(),))
    if ids.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= rows:
        raise ValueError(f"ids must lie in [0, {rows}), they run from {low} to {high}")


def check_rows(name: str, t: Tensor, dtype: torch.dtype | None = None, shape: tuple[int, int] | None = None) -> None:
    """Rows to copy: a CPU matrix whose rows are contiguous; rows may lie apart (a column slice of a wider matrix)."""
    check_matrix(name, t)
    if t.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, it is on {t.device}")
    if dtype is not None and t.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, it is {t.dtype}")
    if shape is not None and tuple(t.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, it has {tuple(t.shape)}")
    if t.shape[1] > 1 and t.stride(1) != 1:
        raise ValueError(f"{name} must have contiguous rows (stride 1), its strides are {t.stride()}")


def check_step(step: int, beta1: float, beta2: float) -> None:
    if step < 1:
        raise ValueError(f"step counts from 1, it is {step}")
    check_betas(beta1, beta2)


def check_betas(beta1: float, beta2: float) -> None:
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), it is {beta}")


def check_decay(lr: float, weight_decay: float) -> None:
    """The logarithm of one step's decay, log(1 - lr * weight_decay), must exist."""
    if lr * weight_decay >= 1.0:
        raise ValueError(f"weight_decay times lr must be below 1, it is {weight_decay} * {lr}")


def _join(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)
