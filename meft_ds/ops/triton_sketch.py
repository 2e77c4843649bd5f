# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Sketches, the subspace update and Adam's direction on a GPU, in Triton; arguments as in the faces sketch and adam.

Written against the plain torch oracle and tested through Triton's interpreter on the host (TRITON_INTERPRET=1). They
compile for a GPU, but have not yet run on one: block sizes are not tuned, and every element works out its four random
words where eight elements could share them. Imported only when a GPU tensor arrives. Positions are trusted: looking at
them would wait for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 32, 128  # a block of results of one program
# Triton's versions differ in whether they fuse a product and a sum by default, which rounds once instead of twice. The
# host's kernels never do.
_ROUNDING = {"enable_fp_fusion": False}


def probe(device: torch.device) -> None:
    """Run a kernel on `device`, and raise whatever keeps it from running, such as a missing C compiler."""
    index, value = (
        torch.tensor([[0, 1]], dtype=torch.int16, device="cpu"),
        torch.tensor([[3.0, 4.0]], dtype=torch.float16, device="cpu"),
    )
    x = torch.tensor([[1.0, 2.0]], device=device)
    result = sketch(x, index.to(device), value.to(device), torch.float32).item()
    if result != 11.0:
        raise RuntimeError(f"1 * 3 + 2 * 4 came out as {result}")


def sketch(x: Tensor, index: Tensor, value: Tensor, out_dtype: torch.dtype) -> Tensor:
    T, n = x.shape
    outputs, width = index.shape
    out = torch.empty(T, outputs, dtype=out_dtype, device=x.device)
    # Blocks of tokens vary slowest: programs that run side by side gather from the same rows of x. After the first
    # time those rows come from the cache.
    grid = (triton.cdiv(outputs, _COLUMNS), triton.cdiv(T, _ROWS))
    if T and outputs:
        _sketch[grid](x, index, value, out, T, n, outputs, width, _ROWS, _COLUMNS, **_ROUNDING)
    return out


def combine(z: Tensor, index: Tensor, value: Tensor) -> Tensor:
    columns = z.shape[1]
    outputs, width = index.shape
    out = torch.empty(outputs, columns, device=z.device)
    if columns and outputs:
        _combine[(outputs, triton.cdiv(columns, 1024))](z, index, value, out, columns, width, 1.0, 1024, **_ROUNDING)
    return out


def subspace_apply(
    weight: Tensor,
    s: Tensor,
    p: tuple[Tensor, Tensor],
    q: tuple[Tensor, Tensor],
    *,
    alpha: float,
    decay: float,
    key: int,
    step: int,
    residual: Tensor | None,
) -> None:
    """Run two kernels. The first writes R = alpha * P s, fp32 [m, d2]; the second gathers from a few of its rows."""
    m, n = weight.shape
    if not (m and n):
        return
    d2 = s.shape[1]
    products = torch.empty(m, d2, device=weight.device)
    if d2:
        _combine[(m, triton.cdiv(d2, 1024))](s, *p, products, d2, p[0].shape[1], alpha, 1024, **_ROUNDING)
    random = residual is None and weight.dtype != torch.float32
    _update[(triton.cdiv(n, _COLUMNS), triton.cdiv(m, _ROWS))](
        weight,
        products,
        *q,
        weight if residual is None else residual,
        m,
        n,
        d2,
        q[0].shape[1],
        decay,
        _signed(key),
        _signed(key >> 32),
        _signed(step),
        random,
        residual is not None,
        _ROWS,
        _COLUMNS,
        **_ROUNDING,
    )


def adam_direction(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    out: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    grad_scale: float,
) -> None:
    n = grad.numel()
    betas = beta1, 1 - beta1, beta2, 1 - beta2
    corrections = 1 / (1 - beta1**step), 1 / (1 - beta2**step) ** 0.5
    if n:
        _direction[(triton.cdiv(n, 1024),)](
            exp_avg, exp_avg_sq, grad, out, n, *betas, *corrections, eps, grad_scale, 1024, **_ROUNDING
        )


def _signed(word: int) -> int:
    """Return the low 32 bits as int32: the launcher types an argument by its size and would give a big word 64 bits."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


@triton.jit
def _entry(index, value, at, there):
    """Load position and fp32 factor of entries; int16 positions hold uint16 bits."""
    position = tl.load(index + at, mask=there, other=0).to(tl.int32)
    if index.dtype.element_ty == tl.int16:
        position = position & 0xFFFF
    return position, tl.load(value + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _sums(x, index, value, row, column, rows, columns, n, width):
    """Sum x[row, index[column, w]] * value[column, w] over w for a block; an entry of value 0 is absent."""
    total = tl.zeros([row.shape[0], column.shape[0]], dtype=tl.float32)
    for w in range(width):
        position, factor = _entry(index, value, column.to(tl.int64) * width + w, column < columns)
        present = (row < rows)[:, None] & (factor != 0)[None, :]
        part = tl.load(x + row.to(tl.int64)[:, None] * n + position[None, :], mask=present, other=0.0)
        total += part.to(tl.float32) * factor[None, :]
    return total


@triton.jit(do_not_specialize=["T"])  # numbers of tokens that 16 divides, and 1, would be compiled apart
def _sketch(x, index, value, out, T, n, outputs, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = _sums(x, index, value, row, column, T, outputs, n, width)
    at = row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(out + at, _nearest(total, out.dtype.element_ty), mask=(row < T)[:, None] & (column < outputs)[None, :])


@triton.jit
def _combine(z, index, value, out, columns, width, alpha, COLUMNS: tl.constexpr):
    o = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for w in range(width):
        one = o * width + w + tl.arange(0, 1)
        position, factor = _entry(index, value, one, one >= 0)
        present = (column < columns) & (factor != 0)
        part = tl.load(z + position.to(tl.int64) * columns + column, mask=present, other=0.0)
        # Selected again: alpha may be infinite or nan, and 0 times that is no longer an absent entry.
        total += tl.where(present, part.to(tl.float32) * alpha * factor, 0.0)
    tl.store(out + o * columns + column, total, mask=column < columns)


@triton.jit(do_not_specialize=["key_low", "key_high", "step"])  # steps 1, 16 and 17 would be compiled apart
def _update(
    weight, products, index, value, residual, m, n, d2, width, decay, key_low, key_high, step,
    RANDOM: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    change = _sums(products, index, value, row, column, m, n, d2, width)
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    there = (row < m)[:, None] & (column < n)[None, :]
    exact = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    if RESIDUAL:
        exact += tl.load(residual + at, mask=there, other=0.0)
    exact = exact * decay + change
    if RANDOM:
        half = _random_halves(at, key_low, key_high, step)
        if weight.dtype.element_ty == tl.bfloat16:
            rounded = _round_bf16(exact, half)
        else:
            rounded = _round_fp16(exact, half)
    else:
        rounded = _nearest(exact, weight.dtype.element_ty)
    tl.store(weight + at, rounded, mask=there)
    if RESIDUAL:
        tl.store(residual + at, exact - rounded.to(tl.float32), mask=there)


@triton.jit
def _random_halves(element, key_low, key_high, step):
    """Run Philox4x32 with 7 rounds; `random_halves` in torch_sketch.py says which element takes which bits."""
    counter = element // 128 * 16 + element % 16
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + step
    c3 = tl.zeros_like(c0)
    k0 = tl.zeros_like(c0) + key_low
    k1 = tl.zeros_like(c0) + key_high
    first = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    second = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(7):
        high0, low0 = tl.umulhi(c0, first), c0 * first
        high1, low1 = tl.umulhi(c2, second), c2 * second
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full(c0.shape, 0x9E3779B9, tl.uint32)
        k1 += tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    half = (element % 128 // 16).to(tl.int32)
    word = tl.where(half < 4, tl.where(half < 2, c0, c1), tl.where(half < 6, c2, c3))
    return tl.where(half % 2 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def _nearest(exact, dtype: tl.constexpr):
    """Round to nearest even; bf16 by hand, because Triton's interpreter would cut it off."""
    if dtype == tl.bfloat16:
        bits = exact.to(tl.uint32, bitcast=True)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        rounded = tl.where(is_nan, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return exact.to(dtype)


@triton.jit
def _round_bf16(exact, half):
    bits = exact.to(tl.uint32, bitcast=True)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = tl.where(is_nan, bits | 0x400000, bits + half) >> 16
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _round_fp16(exact, half):
    bits = exact.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Thirteen bits are dropped: the last three of a half cannot matter.
    normal = ((magnitude + (half >> 3)) >> 13) - (112 << 10)
    # Below 2**-14 the unit is 2**-24 whatever the exponent; the count of units is the encoding.
    is_tiny = magnitude < 0x38800000
    units = tl.where(is_tiny, magnitude, 0).to(tl.float32, bitcast=True) * 16777216.0
    whole = units.to(tl.int32)
    fraction = ((units - whole.to(tl.float32)) * 65536.0).to(tl.int32).to(tl.uint32)
    rounded = tl.where(is_tiny, whole.to(tl.uint32) + ((fraction + half) >> 16), normal)
    rounded = tl.where((magnitude >= 0x47800000) | (rounded > 0x7C00), 0x7C00, rounded)
    rounded = tl.where(magnitude > 0x7F800000, 0x7E00, rounded) | ((bits >> 16) & 0x8000)
    return rounded.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _direction(
    exp_avg, exp_avg_sq, grad, out, n, beta1, rest1, beta2, rest2, correction, root_correction, eps, grad_scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    g = tl.load(grad + at, mask=there, other=0.0).to(tl.float32) * grad_scale
    m = tl.load(exp_avg + at, mask=there, other=0.0).to(tl.float32) * beta1 + g * rest1
    v = tl.load(exp_avg_sq + at, mask=there, other=0.0).to(tl.float32) * beta2 + g * g * rest2
    tl.store(exp_avg + at, _nearest(m, exp_avg.dtype.element_ty), mask=there)
    tl.store(exp_avg_sq + at, _nearest(v, exp_avg_sq.dtype.element_ty), mask=there)
    direction = m / (tl.sqrt(v) * root_correction + eps) * correction
    tl.store(out + at, _nearest(direction, out.dtype.element_ty), mask=there)
