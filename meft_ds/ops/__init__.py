# SPDX-License-Identifier: Apache-2.0
"""Kernels with one Python face each: AdamW over tensors and rows, row moves, sketches, the sparse adapter's function.

Every op has a C++ path (OpenMP, compiled on first use and cached) and a plain torch path with the same results. Plain
torch runs where nothing can be compiled, or where `MEFT_DS_OPS=torch` is set. On an accelerator `sketch`, `combine` and
`subspace_apply_` run in Triton or plain torch. Wrong inputs raise ValueError; all paths share the checks.

Files: adam, moves, sketch, experts (the faces); projector (sparse projectors); torch_adam, torch_sketch, torch_experts
and triton_sketch (other paths); pool (threads of the plain path); build (compiles csrc/), checks.
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
