# SPDX-License-Identifier: Apache-2.0
"""Host kernels: AdamW over tensors and over rows, moving rows, sums of squares, the sparse adapter's function.

Every op has two paths on CPU tensors with the same results: C++ (OpenMP, compiled on first use and cached) and plain
torch, taken when nothing can be compiled or when ``MEFT_DS_OPS=torch`` is set. `sketch`, `combine` and
`subspace_apply_` also work on the accelerator, in Triton or plain torch. Wrong inputs raise
ValueError; both paths share the checks.
"""

from meft_ds.ops.adam import adamw_, adamw_lazy_rows_, adamw_rows_
from meft_ds.ops.build import backend
from meft_ds.ops.experts import (
    Entries,
    expert_backward,
    expert_forward,
    expert_scores,
    list_entries,
    select_keys,
    top_experts,
)
from meft_ds.ops.moves import gather_rows, scatter_rows_, sq_norm
from meft_ds.ops.sketch import adam_direction_, combine, sketch, subspace_apply_
from meft_ds.ops.torch_sketch import positions

__all__ = [
    "Entries",
    "adam_direction_",
    "adamw_",
    "adamw_lazy_rows_",
    "adamw_rows_",
    "backend",
    "combine",
    "expert_backward",
    "expert_forward",
    "expert_scores",
    "gather_rows",
    "list_entries",
    "positions",
    "scatter_rows_",
    "select_keys",
    "sketch",
    "sq_norm",
    "subspace_apply_",
    "top_experts",
]
