# SPDX-License-Identifier: Apache-2.0
"""Copy rows by id, and sum squares for gradient norms."""

from __future__ import annotations

import torch
from torch import Tensor

from meft_ds.ops.build import kernels, typed
from meft_ds.ops.checks import FLOATS, expect, expect_below

# Below torch's threshold for splitting one sum over threads, and as many values as the C++ kernel sums at a time.
_SUM_BLOCK = 1 << 14
_SUM_CHUNK = 1 << 21


def gather_rows(src: Tensor, ids: Tensor, out: Tensor) -> None:
    """Copy ``out[i] = src[ids[i]]``.

    Args:
        src: [n, w] of any dtype. Rows must be contiguous but may lie apart (a column slice of a wider matrix will do).
        ids: int64 [k] in any order.
        out: [k, w] of src's dtype; rows as those of src.

    Raises:
        ValueError: for wrong dtypes, shapes or ids.

    Example:
        >>> gather_rows(store, torch.tensor([3, 0]), out)
    """
    _expect_move("src", src, ids, "out", out)
    cpp = kernels()
    if cpp is not None:
        cpp.gather(*_rows(src), ids.data_ptr(), ids.numel(), *_rows(out), _row_bytes(src), torch.get_num_threads())
    else:
        out.copy_(src.index_select(0, ids))


def scatter_rows_(dst: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Copy ``dst[ids[i]] = rows[i]``. What an id that occurs twice leaves behind is not defined.

    Args:
        dst: [n, w] of any dtype. Rows must be contiguous but may lie apart.
        ids: int64 [k], unique.
        rows: [k, w] of dst's dtype; rows as those of dst.

    Raises:
        ValueError: for wrong dtypes, shapes or ids.
    """
    _expect_move("dst", dst, ids, "rows", rows)
    cpp = kernels()
    if cpp is not None:
        cpp.scatter(*_rows(dst), ids.data_ptr(), ids.numel(), *_rows(rows), _row_bytes(dst), torch.get_num_threads())
    else:
        dst.index_copy_(0, ids, rows)


def sq_norm(t: Tensor) -> float:
    """Return the sum of squares of `t` in float64; infinity or NaN where `t` holds one.

    The result does not depend on the number of threads.

    Args:
        t: fp32, bf16 or fp16, contiguous, of any shape.

    Raises:
        ValueError: for a wrong dtype or layout.
    """
    expect("t", t, FLOATS, t.shape)
    cpp = kernels()
    if cpp is not None:
        return float(cpp.sq_norm(*typed(t), t.numel(), torch.get_num_threads()))
    return float(sum(_sum_squares(chunk) for chunk in t.detach().reshape(-1).split(_SUM_CHUNK)))


def _expect_move(whole_name: str, whole: Tensor, ids: Tensor, part_name: str, part: Tensor) -> None:
    expect(whole_name, whole, None, (None, None), rows_apart=True)
    expect("ids", ids, (torch.int64,), (None,))
    expect_below("ids", ids, whole.shape[0])
    expect(part_name, part, (whole.dtype,), (ids.numel(), whole.shape[1]), rows_apart=True)


def _sum_squares(flat: Tensor) -> float:
    """Sum blocks that are too small for torch to split over threads, then sum the sums."""
    squares = flat.double().square_()
    whole = squares.numel() // _SUM_BLOCK * _SUM_BLOCK
    blocks = squares[:whole].view(-1, _SUM_BLOCK).sum(1)
    return float(blocks.sum()) + float(squares[whole:].sum())


def _rows(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.stride(0) * t.element_size()


def _row_bytes(t: Tensor) -> int:
    return t.shape[1] * t.element_size()
