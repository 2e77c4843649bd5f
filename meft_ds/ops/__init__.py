# SPDX-License-Identifier: Apache-2.0
"""Host kernels: AdamW over tensors and over rows, moving rows, sums of squares.

Every op works on CPU tensors and has two paths with the same results: C++ (OpenMP, compiled on first use and cached)
and plain torch, taken when nothing can be compiled or when ``MEFT_DS_OPS=torch`` is set. Wrong inputs raise
ValueError; both paths share the checks.
"""

from meft_ds.ops.adam import adamw_, adamw_lazy_rows_, adamw_rows_
from meft_ds.ops.build import backend
from meft_ds.ops.moves import gather_rows, scatter_rows_, sq_norm

__all__ = ["adamw_", "adamw_lazy_rows_", "adamw_rows_", "backend", "gather_rows", "scatter_rows_", "sq_norm"]
