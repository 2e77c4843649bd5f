# SPDX-License-Identifier: Apache-2.0
"""Sparse sketches and the subspace update in plain torch: the oracle of the kernels, and their stand-in on any device.

Shapes and gather lists are as in `meft_ds.ops.sketch`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 256  # rows of a weight treated at a time: bounds the float32 temporary
_MASK = 0xFFFFFFFF


def positions(index: Tensor) -> Tensor:
    """Return the positions of a gather list as int64; int16 holds uint16 bits."""
    return index.long() & 0xFFFF if index.dtype == torch.int16 else index.long()


def sketch(x: Tensor, index: Tensor, value: Tensor, out_dtype: torch.dtype) -> Tensor:
    at, factor = positions(index), value.float()
    out = torch.zeros(x.shape[0], index.shape[0], device=x.device)
    for w in range(index.shape[1]):
        out += _product(x.index_select(1, at[:, w]), factor[:, w])
    return out.to(out_dtype)


def combine(z: Tensor, index: Tensor, value: Tensor) -> Tensor:
    at, factor = positions(index), value.float()
    out = torch.zeros(index.shape[0], z.shape[1], device=z.device)
    for w in range(index.shape[1]):
        out += _product(z.index_select(0, at[:, w]), factor[:, w, None])
    return out


def _product(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply. An entry of value 0 is absent: padding must not make a nan of an infinity in position 0."""
    return (x.float() * factor).masked_fill_(factor == 0, 0)


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
    s = s.float() * alpha
    n = weight.shape[1]
    for start in range(0, weight.shape[0], _ROWS):
        rows = weight[start : start + _ROWS]
        own = slice(start, start + rows.shape[0])
        value = rows.float() if residual is None else rows.float() + residual[own]
        value = value * decay + sketch(combine(s, p[0][own], p[1][own]), *q, torch.float32)
        if residual is not None:
            rows.copy_(value)
            residual[own] = value - rows.float()
        elif weight.dtype == torch.float32:
            rows.copy_(value)
        else:
            elements = torch.arange(start * n, start * n + rows.numel(), device=weight.device)
            rows.copy_(round_stochastically(value, random_halves(elements, key, step).view_as(rows), weight.dtype))


def random_halves(elements: Tensor, key: int, step: int) -> Tensor:
    """Return 16 random bits for each element number (int64): Philox4x32 with 7 rounds (Salmon et al., SC 2011).

    128 consecutive elements share 16 counters, so that 16 lanes of one word serve 16 neighbours. Element e takes
    counter 16 * (e // 128) + e % 16. Of that counter's eight halves (low half of word 0, high half of word 0, ...) it
    takes number (e % 128) // 16. Counter words are (low, high, step, 0), key words the low and high half of `key`.
    """
    block = elements // 128 * 16 + elements % 16
    c0, c1 = block & _MASK, block >> 32 & _MASK
    c2, c3 = torch.full_like(block, step & _MASK), torch.zeros_like(block)
    k0, k1 = key & _MASK, key >> 32 & _MASK
    for _ in range(7):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products; the sign bit is only a bit here
        c0, c1, c2, c3 = (
            (second >> 32 & _MASK) ^ c1 ^ k0,
            second & _MASK,
            (first >> 32 & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    half = elements % 128 // 16
    word = torch.stack((c0, c1, c2, c3)).gather(0, (half // 2)[None]).squeeze(0)
    return word >> 16 * (half % 2) & 0xFFFF


def round_stochastically(value: Tensor, halves: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to bf16 or fp16. Unbiased but for what lies below 2**-16 of a unit in the last place.

    A value goes up (away from 0) if its fraction of a unit, counted in 2**-16, plus its 16 random bits reaches 2**16.
    inf and nan stay.
    """
    if dtype == torch.bfloat16:
        bits = value.view(torch.int32).long() & _MASK
        rounded = torch.where(value.isnan(), bits | 1 << 22, bits + halves) >> 16
        return torch.where(rounded >= 1 << 15, rounded - (1 << 16), rounded).to(torch.int16).view(torch.bfloat16)
    magnitude = value.abs()
    exponent = torch.frexp(magnitude).exponent - 1
    unit = torch.ldexp(torch.ones_like(value), exponent.clamp(min=-14) - 10)
    whole = (magnitude / unit).floor()
    fraction = ((magnitude / unit - whole) * 65536).floor()
    rounded = (whole + (fraction + halves >= 65536)) * unit
    return torch.where(value.isfinite(), rounded.copysign(value), value).to(dtype)
