# SPDX-License-Identifier: Apache-2.0
"""Kernels with one Python face each: AdamW over tensors and rows, row moves, sketches, the sparse adapter's function.

On the host every op has two paths: C++ (OpenMP, compiled on first use and cached) and plain torch, which runs where
nothing can be compiled or where `MEFT_DS_OPS=torch` is set. Results agree up to rounding. Plain torch is written to be
right, not to be fast. On an accelerator `sketch`, `combine`, `subspace_apply_`, `adam_direction_` and `adamw_` work
too: in Triton on a GPU that has it, else in plain torch. All other ops take host tensors only. Wrong inputs raise
ValueError on every path; positions on an accelerator are trusted.

Files, faces first: adam (AdamW, and its plain path), moves (rows by id, sums of squares), sketch (sketches, the
subspace update), experts (the sparse adapter), projector (sparse projectors). Other paths: torch_sketch,
torch_experts, triton_sketch. Below them: build (chooses the path, compiles csrc/), checks (of inputs).
"""

from meft_ds.ops.adam import adam_direction_, adamw_, adamw_lazy_rows_, adamw_rows_
from meft_ds.ops.build import backend, do_without_triton, triton_fault
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
from meft_ds.ops.sketch import combine, sketch, subspace_apply_
from meft_ds.ops.torch_sketch import positions

__all__ = [
    "Entries",
    "adam_direction_",
    "adamw_",
    "adamw_lazy_rows_",
    "adamw_rows_",
    "backend",
    "combine",
    "do_without_triton",
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
    "triton_fault",
]
