# SPDX-License-Identifier: Apache-2.0
"""Sparse sketches, and the subspace update that they make possible without any m x n temporary (LSP-Offload).

A projector P in R^{m x d} has k nonzeros in a row. It comes as two *gather lists* (index, value): the *row view*
[m, k] says which columns a row touches, the *column view* [d, w] which rows a column gathers. Short columns are padded
with value 0. Both views are needed: a sum that gathers has one writer and so one order, a sum that scatters has not.
index is int32, or int16 holding uint16 bits; value is float16. All tensors of a call lie on one device.

An entry of value 0 is absent: it adds nothing even where it names an infinity. Positions are checked on the host only:
on an accelerator the check would wait for the device.

On the host C++ kernels run, on a GPU Triton kernels, and plain torch where neither can be had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meft_ds.ops import torch_sketch
from meft_ds.ops.build import address, kernels, triton_kernels, typed
from meft_ds.ops.checks import FLOATS, expect, expect_below


@torch.no_grad()
def sketch(x: Tensor, index: Tensor, value: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Return out[t, o] = sum over w of x[t, index[o, w]] * value[o, w]; sums in float32, rounded once.

    X Q is this with Q's column view [d, w], Y Q^T with its row view [n, k].

    Args:
        x: fp32, bf16 or fp16 [T, n], contiguous.
        index, value: [o, w], positions below n.
        out_dtype: of the result [T, o]; x's by default.

    Raises:
        ValueError: naming the argument that does not fit.

    Example:
        >>> xq = sketch(x, *q.columns)
    """
    expect("x", x, FLOATS, (None, None), x.device)
    _expect_list("", index, value, x.device)
    out_dtype = out_dtype or x.dtype
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype must be fp32, bf16 or fp16, it is {out_dtype}")
    cpp = kernels(x.device)
    if cpp is None:
        _expect_range("index", index, x.shape[1])
        return _other_path(x).sketch(x, index, value, out_dtype)
    out = torch.empty(x.shape[0], index.shape[0], dtype=out_dtype, device="cpu")
    cpp.sketch(*typed(x), *x.shape, _view(cpp, index, value), *typed(out), torch.get_num_threads())
    return out


@torch.no_grad()
def combine(z: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Return out[o, :] = sum over w of value[o, w] * z[index[o, w], :], float32 [o, c].

    P^T Z is this with P's column view, P Z with its row view.

    Args:
        z: fp32, bf16 or fp16 [m, c], contiguous.
        index, value: [o, w], positions below m.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    expect("z", z, FLOATS, (None, None), z.device)
    _expect_list("", index, value, z.device)
    cpp = kernels(z.device)
    if cpp is None:
        _expect_range("index", index, z.shape[0])
        return _other_path(z).combine(z, index, value)
    out = torch.empty(index.shape[0], z.shape[1], device="cpu")
    cpp.combine(*typed(z), *z.shape, _view(cpp, index, value), out.data_ptr(), torch.get_num_threads())
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
    """Set weight to round(decay * weight + alpha * P s Q^T) in one pass over weight; arithmetic in float32.

    A bf16 or fp16 weight is rounded stochastically. The random bits depend on (key, step, element) only, so every rank
    and every replay rounds alike.

    Args:
        weight: fp32, bf16 or fp16 [m, n], contiguous.
        s: fp32, bf16 or fp16 [d1, d2], contiguous.
        p, q: row views (index, value) of P [m, kp] over d1 and Q [n, kq] over d2.
        key: any 64-bit number.
        residual: fp32 [m, n]. With it weight is rounded to nearest; what that loses is kept in it, and added first the
            next time.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    expect("weight", weight, FLOATS, (None, None), weight.device)
    expect("s", s, FLOATS, (None, None), weight.device)
    _expect_list("p_", *p, weight.device, weight.shape[0])
    _expect_list("q_", *q, weight.device, weight.shape[1])
    expect("residual", residual, (torch.float32,), weight.shape, weight.device)
    cpp = kernels(weight.device)
    if cpp is None:
        _expect_range("p_index", p[0], s.shape[0])
        _expect_range("q_index", q[0], s.shape[1])
        numbers = dict(alpha=alpha, decay=decay, key=key, step=step)
        _other_path(weight).subspace_apply(weight, s, p, q, residual=residual, **numbers)
    else:
        at = (*typed(weight), *weight.shape, *typed(s), *s.shape, _view(cpp, *p), _view(cpp, *q))
        update = cpp.Update(alpha, decay, key % 2**64, step % 2**32)
        cpp.subspace_apply(*at, update, address(residual), torch.get_num_threads())
    torch.autograd.graph.increment_version(weight)  # kernels write by address, which autograd does not see


def _other_path(t: Tensor) -> Any:
    return triton_kernels(t.device) or torch_sketch


def _view(cpp: Any, index: Tensor, value: Tensor) -> Any:
    return cpp.ListView(index.data_ptr(), index.element_size(), value.data_ptr(), *index.shape)


def _expect_list(prefix: str, index: Tensor, value: Tensor, device: torch.device, outputs: int | None = None) -> None:
    expect(f"{prefix}index", index, (torch.int16, torch.int32), (outputs, None), device)
    expect(f"{prefix}value", value, (torch.float16,), index.shape, device)


def _expect_range(name: str, index: Tensor, n: int) -> None:
    if index.device.type == "cpu":
        expect_below(name, torch_sketch.positions(index), n)
