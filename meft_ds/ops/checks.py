# SPDX-License-Identifier: Apache-2.0
"""Cheap checks of what callers hand to the ops: the kernels work on addresses and would write anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOMENTS = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")


def expect(
    name: str,
    t: Tensor | None,
    dtypes: Sequence[torch.dtype] | None,
    shape: Sequence[int | None],
    device: torch.device = CPU,
    *,
    rows_apart: bool = False,
) -> None:
    """Refuse a tensor that a kernel cannot take. No kernel and no copy runs for the check.

    Args:
        name: of the argument, for the message.
        t: None passes, for arguments that may be left out.
        dtypes: the dtypes that are allowed; None allows any.
        shape: a length for each dimension; None allows any length.
        device: where `t` must lie.
        rows_apart: of a matrix, only each row must be contiguous (a column slice of a wider matrix will do).

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """
    if t is None:
        return
    if t.device != device:
        raise ValueError(f"{name} must be on {device}, it is on {t.device}")
    if dtypes is not None and t.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, it is {t.dtype}")
    if t.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, t.shape, strict=True)):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} must have shape ({wanted}), it has {tuple(t.shape)}")
    if rows_apart:
        if t.shape[1] > 1 and t.stride(1) != 1:
            raise ValueError(f"{name} must have contiguous rows (stride 1), its strides are {t.stride()}")
    elif not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous; pass {name}.contiguous() or a contiguous buffer")


def expect_below(name: str, at: Tensor, n: int) -> None:
    """Refuse positions that do not all lie in [0, n). Reads `at`, which must be on the host.

    Raises:
        ValueError: naming the argument and the smallest and largest position.
    """
    if at.numel():
        low, high = (int(position) for position in torch.aminmax(at))
        if low < 0 or high >= n:
            raise ValueError(f"{name} must lie in [0, {n}), the smallest is {low} and the largest {high}")
