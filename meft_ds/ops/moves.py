# SPDX-License-Identifier: Apache-2.0
"""Copying rows by id, and sums of squares for gradient norms."""

from __future__ import annotations

import torch
from torch import Tensor

from meft_ds.ops.build import DTYPE_CODES, kernels
from meft_ds.ops.checks import FLOATS, check, check_ids, check_rows

# Below torch's threshold for splitting one sum over threads, and as many values as the C++ kernel sums at a time.
_SUM_BLOCK = 1 << 14
_SUM_CHUNK = 1 << 21


def gather_rows(src: Tensor, ids: Tensor, out: Tensor) -> None:
    """``out[i] = src[ids[i]]``: src [n, w] of any dtype, ids int64 [k] in any order, out [k, w] of src's dtype.

    Rows must be contiguous but may lie apart (column slices of wider matrices are fine).
    """
    check_rows("src", src)
    check_ids(ids, src.shape[0])
    check_rows("out", out, src.dtype, (ids.numel(), src.shape[1]))
    cpp = kernels()
    if cpp is not None:
        cpp.gather(*_rows(src), ids.data_ptr(), ids.numel(), *_rows(out), _row_bytes(src), torch.get_num_threads())
    elif out.is_contiguous():
        torch.index_select(src, 0, ids, out=out)
    else:
        out.copy_(src.index_select(0, ids))


def scatter_rows_(dst: Tensor, ids: Tensor, rows: Tensor) -> None:
    """``dst[ids[i]] = rows[i]``: dst [n, w] of any dtype, ids int64 [k] unique, rows [k, w] of dst's dtype.

    Rows must be contiguous but may lie apart. What an id that occurs twice leaves behind is not defined.
    """
    check_rows("dst", dst)
    check_ids(ids, dst.shape[0])
    check_rows("rows", rows, dst.dtype, (ids.numel(), dst.shape[1]))
    cpp = kernels()
    if cpp is not None:
        cpp.scatter(*_rows(dst), ids.data_ptr(), ids.numel(), *_rows(rows), _row_bytes(dst), torch.get_num_threads())
    else:
        dst.index_copy_(0, ids, rows)


def sq_norm(t: Tensor, scale: float = 1.0) -> float:
    """Sum of squares of ``t * scale`` in float64; t fp32, bf16 or fp16, contiguous, of any shape.

    Infinity or NaN where `t` holds one. The result does not depend on the number of threads.
    """
    check("t", t, FLOATS, t.shape)
    cpp = kernels()
    if cpp is not None:
        total = cpp.sq_norm(t.data_ptr(), DTYPE_CODES[t.dtype], t.numel(), torch.get_num_threads())
    else:
        total = sum(_sum_squares(chunk) for chunk in t.detach().reshape(-1).split(_SUM_CHUNK))
    return float(total) * scale * scale


def _sum_squares(flat: Tensor) -> float:
    """Blocks too small for torch to split over threads are summed apart, then their sums are."""
    squares = flat.double().square_()
    whole = squares.numel() // _SUM_BLOCK * _SUM_BLOCK
    blocks = squares[:whole].view(-1, _SUM_BLOCK).sum(1)
    return float(blocks.sum()) + float(squares[whole:].sum())


def _rows(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.stride(0) * t.element_size()


def _row_bytes(t: Tensor) -> int:
    return t.shape[1] * t.element_size()
