# SPDX-License-Identifier: Apache-2.0
"""Sparse sketches, and the subspace update that they make possible without any m x n temporary (LSP-Offload).

A projector P in R^{m x d} has k nonzeros in a row. It comes as two *gather lists* (index, value), both needed because
gathering, unlike scattering, has one writer per result and so one order of summation: the *row view* [m, k] (which
columns a row touches) and the *column view* [d, w] (which rows a column gathers; short ones are padded with value 0).
index is int32, or int16 holding uint16 bits; value is float16. All tensors of a call lie on one device.

An entry of value 0 is absent: it adds nothing even where it names an infinity. Positions are checked on the host;
elsewhere they are trusted, since looking would wait for the device.

On the host these are C++ kernels, on a GPU Triton kernels (not yet run on one), and plain torch where neither can be
had; MEFT_DS_OPS=torch chooses plain torch.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from meft_ds.ops import torch_sketch
from meft_ds.ops.build import DTYPE_CODES, kernels
from meft_ds.ops.checks import FLOATS, MOMENTS, check_step

__all__ = ["adam_direction_", "combine", "sketch", "subspace_apply_"]


@torch.no_grad()
def sketch(x: Tensor, index: Tensor, value: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """out[t, o] = sum over w of x[t, index[o, w]] * value[o, w]; sums in float32, rounded once.

    x [T, n] row-major fp32, bf16 or fp16; (index, value) [o, w] over n; returns [T, o] in out_dtype (default: x's).
    X Q is this with Q's column view [d, w], Y Q^T with its row view [n, k].
    """
    _check_floats("x", x)
    _check_list("", index, value, x.device)
    out_dtype = out_dtype or x.dtype
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype must be fp32, bf16 or fp16, it is {out_dtype}")
    cpp = _kernels(x)
    if cpp is None:
        _check_range("index", index, x.shape[1])
        return _module(x).sketch(x, index, value, out_dtype)
    out = torch.empty(x.shape[0], index.shape[0], dtype=out_dtype)
    codes = DTYPE_CODES[x.dtype], DTYPE_CODES[out_dtype]
    at = (x.data_ptr(), codes[0], *x.shape, _view(cpp, index, value), out.data_ptr(), codes[1])
    cpp.sketch(*at, torch.get_num_threads())
    return out


@torch.no_grad()
def combine(z: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """out[o, :] = sum over w of value[o, w] * z[index[o, w], :], float32.

    z [m, c] fp32, bf16 or fp16; (index, value) [o, w] over m; returns [o, c]. P^T Z is this with P's column view, P Z
    with its row view.
    """
    _check_floats("z", z)
    _check_list("", index, value, z.device)
    cpp = _kernels(z)
    if cpp is None:
        _check_range("index", index, z.shape[0])
        return _module(z).combine(z, index, value)
    out = torch.empty(index.shape[0], z.shape[1])
    at = (z.data_ptr(), DTYPE_CODES[z.dtype], *z.shape, _view(cpp, index, value), out.data_ptr())
    cpp.combine(*at, torch.get_num_threads())
    return out


@torch.no_grad()
def subspace_apply_(
    weight: Tensor,
    s: Tensor,
    p: tuple[Tensor, Tensor],
    q: tuple[Tensor, Tensor],
    *,
    alpha: float,
    decay: float,
    key: int,
    step: int,
    residual: Tensor | None = None,
) -> None:
    """weight <- round(decay * weight + alpha * P s Q^T), in one pass over weight; arithmetic in float32.

    weight [m, n] fp32, bf16 or fp16; s [d1, d2] fp32, bf16 or fp16; p, q: row views (index, value) of P [m, kp] over d1
    and Q [n, kq] over d2. A bf16 or fp16 weight is rounded stochastically with random bits that depend on (key, step,
    element) only, so every rank and every replay rounds alike; or, given residual fp32 [m, n], it is rounded to nearest
    and what was lost is kept there and added back first the next time. `key` is any 64-bit number.
    """
    _check_floats("weight", weight)
    _check_floats("s", s)
    _check_list("p", *p, weight.device, weight.shape[0])
    _check_list("q", *q, weight.device, weight.shape[1])
    _check_like("s", s, FLOATS, s.shape, weight.device)
    if residual is not None:
        _check_like("residual", residual, (torch.float32,), weight.shape, weight.device)
    cpp = _kernels(weight)
    if cpp is None:
        _check_range("p_index", p[0], s.shape[0])
        _check_range("q_index", q[0], s.shape[1])
        hyper = dict(alpha=alpha, decay=decay, key=key, step=step)
        _module(weight).subspace_apply(weight, s, p, q, residual=residual, **hyper)
    else:
        cpp.subspace_apply(
            weight.data_ptr(),
            DTYPE_CODES[weight.dtype],
            *weight.shape,
            s.data_ptr(),
            DTYPE_CODES[s.dtype],
            *s.shape,
            _view(cpp, *p),
            _view(cpp, *q),
            cpp.Update(alpha, decay, key % 2**64, step % 2**32),
            0 if residual is None else residual.data_ptr(),
            torch.get_num_threads(),
        )
    torch.autograd.graph.increment_version(weight)  # kernels write by address, which autograd does not see


@torch.no_grad()
def adam_direction_(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    out: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """AdamW's direction, m_hat / (sqrt(v_hat) + eps), without a weight to move.

    All flat [n], on one device. exp_avg, exp_avg_sq fp32 or bf16, updated in place with grad * grad_scale; grad and out
    fp32, bf16 or fp16. step: this step's number, from 1.
    """
    check_step(step, beta1, beta2)
    _check_like("grad", grad, FLOATS, (grad.numel(),), grad.device)
    _check_like("exp_avg", exp_avg, MOMENTS, grad.shape, grad.device)
    _check_like("exp_avg_sq", exp_avg_sq, (exp_avg.dtype,), grad.shape, grad.device)
    _check_like("out", out, FLOATS, grad.shape, grad.device)
    cpp = _kernels(grad)
    if cpp is None:
        hyper = dict(beta1=beta1, beta2=beta2, eps=eps, grad_scale=grad_scale)
        _module(grad).adam_direction(exp_avg, exp_avg_sq, grad, out, step=step, **hyper)
        return
    cpp.adam_direction(
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        DTYPE_CODES[exp_avg.dtype],
        out.data_ptr(),
        DTYPE_CODES[out.dtype],
        grad.numel(),
        cpp.Hyper(1.0, beta1, beta2, eps, 0.0, grad_scale),
        step,
        torch.get_num_threads(),
    )


def _kernels(t: Tensor) -> Any | None:
    return kernels() if t.device.type == "cpu" else None


def _module(t: Tensor) -> Any:
    on_gpu = t.device.type == "cuda" and os.environ.get("MEFT_DS_OPS", "").lower() != "torch"
    return (_triton_sketch() if on_gpu else None) or torch_sketch


@functools.cache
def _triton_sketch() -> Any | None:
    try:
        from meft_ds.ops import triton_sketch
    except ImportError:
        return None
    return triton_sketch


def _view(cpp: Any, index: Tensor, value: Tensor) -> Any:
    return cpp.ListView(index.data_ptr(), index.element_size(), value.data_ptr(), *index.shape)


def _check_floats(name: str, t: Tensor) -> None:
    if t.dim() != 2 or t.dtype not in FLOATS or not t.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous matrix of fp32, bf16 or fp16, it is {t.dtype} {tuple(t.shape)}, "
            f"strides {t.stride()}"
        )


def _check_like(
    name: str, t: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device
) -> None:
    if t.dtype not in dtypes or t.shape != shape or t.device != device or not t.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, {' or '.join(map(str, dtypes))} {tuple(shape)} on {device}, "
            f"it is {t.dtype} {tuple(t.shape)} on {t.device}, strides {t.stride()}"
        )


def _check_list(name: str, index: Tensor, value: Tensor, device: torch.device, outputs: int | None = None) -> None:
    prefix = f"{name}_" if name else ""
    if index.dtype not in (torch.int16, torch.int32) or value.dtype != torch.float16:
        raise ValueError(
            f"{prefix}index must be int16 or int32 and {prefix}value float16, they are {index.dtype}, {value.dtype}"
        )
    if index.dim() != 2 or index.shape != value.shape or (outputs is not None and index.shape[0] != outputs):
        raise ValueError(
            f"{prefix}index and {prefix}value must both be [{'o' if outputs is None else outputs}, w], "
            f"they are {tuple(index.shape)} and {tuple(value.shape)}"
        )
    if not (index.is_contiguous() and value.is_contiguous() and index.device == value.device == device):
        raise ValueError(f"{prefix}index and {prefix}value must be contiguous and on {device}")


def _check_range(name: str, index: Tensor, n: int) -> None:
    """The kernels in C++ look for themselves; on an accelerator looking would wait for the device, so nobody does."""
    if index.device.type == "cpu" and index.numel():
        at = torch_sketch.positions(index)
        if int(at.min()) < 0 or int(at.max()) >= n:
            raise ValueError(f"{name} must lie in [0, {n}), it runs from {int(at.min())} to {int(at.max())}")
