# SPDX-License-Identifier: Apache-2.0
"""meft-ds: fine-tune language models in DeepSpeed on too little GPU memory, by one block in the ds_config JSON.

Importing this package only arms the hook that lets DeepSpeed see the `"meft_offload"` block; everything else loads on
first use, because `import torch` itself imports this file through the entry point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meft_ds import autoload

if TYPE_CHECKING:
    from meft_ds.config import MeftConfig, parse_config
    from meft_ds.plugin.checkpoint.export import save_adapter, save_tiles
    from meft_ds.plugin.successor import detach
    from meft_ds.sparse_adapter.files import load_adapter
    from meft_ds.sparse_matrix.files import apply_tiles, revert_tiles

__version__ = "0.2.0"
__all__ = [
    "MeftConfig",
    "__version__",
    "apply_tiles",
    "detach",
    "load_adapter",
    "parse_config",
    "revert_tiles",
    "save_adapter",
    "save_tiles",
]

_LAZY = {
    "MeftConfig": "meft_ds.config",
    "parse_config": "meft_ds.config",
    "save_adapter": "meft_ds.plugin.checkpoint.export",
    "save_tiles": "meft_ds.plugin.checkpoint.export",
    "detach": "meft_ds.plugin.successor",
    "load_adapter": "meft_ds.sparse_adapter.files",
    "apply_tiles": "meft_ds.sparse_matrix.files",
    "revert_tiles": "meft_ds.sparse_matrix.files",
}

autoload.arm()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'meft_ds' has no attribute {name!r}; it offers {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
