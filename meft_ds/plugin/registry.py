# SPDX-License-Identifier: Apache-2.0
"""The methods that a block can name. A new one is a folder, its key in `meft_ds.config`, and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meft_ds.config import BLOCK, MeftConfig, parse_config
from meft_ds.offload.method import Extras, Method
from meft_ds.plugin import ds_config as checks
from meft_ds.sparse_adapter.method import SparseAdapterMethod
from meft_ds.sparse_matrix.method import SparseMatrixMethod
from meft_ds.subspace.method import SubspaceMethod

# tiles come first: what they count and look through is the model without adapters
_METHODS: tuple[Any, ...] = (SparseMatrixMethod, SparseAdapterMethod, SubspaceMethod)

EXTRAS: tuple[Extras, ...] = tuple(method.extras for method in _METHODS if method.extras is not None)
"""What methods put into models, whichever of them an engine has."""


def chosen(config: MeftConfig) -> list[Method]:
    """Return the block's methods; at least one."""
    methods = [method(found) for method in _METHODS if (found := getattr(config, method.name)) is not None]
    assert methods, "the block's model fills in a method when none is named"
    return methods


def parsed(ds_config: Mapping[str, Any]) -> MeftConfig:
    """Return the block of a ds_config, checked with all that stands beside it.

    Raises:
        ValueError: one message that lists all faults.
    """
    return parse_config(
        ds_config[BLOCK],
        checks.conflicts(ds_config),
        lambda config: [fault for method in chosen(config) for fault in method.conflicts(ds_config)],
    )
