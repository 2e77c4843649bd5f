# SPDX-License-Identifier: Apache-2.0
"""The methods that a block can name. A new one is a folder, its key in `meft_ds.config`, and a line here."""

from __future__ import annotations

from meft_ds.config import MeftConfig
from meft_ds.offload.method import Method
from meft_ds.sparse_adapter.method import SparseAdapterMethod
from meft_ds.sparse_matrix.method import SparseMatrixMethod
from meft_ds.subspace.method import SubspaceMethod


def chosen(config: MeftConfig) -> list[Method]:
    """The block's methods; at least one."""
    methods: list[Method] = []
    if config.sparse_matrix is not None:  # first: what it counts and looks through is the model without adapters
        methods.append(SparseMatrixMethod(config.sparse_matrix))
    if config.sparse_adapter is not None:
        methods.append(SparseAdapterMethod(config.sparse_adapter))
    if config.subspace is not None:
        methods.append(SubspaceMethod(config.subspace))
    assert methods, "the block's model fills in the sparse adapter when no method is named"
    return methods
