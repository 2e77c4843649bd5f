# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's model file is mapped into memory while it is loaded, not read into it: else each of a node's ranks would
hold the whole model (8 ranks and 70 B weights in bf16: 1.1 TB). Ranks share the file's pages, and touch only those
that they copy from."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch.utils._pytree import tree_map_only


@contextlib.contextmanager
def mapped(engine: Any) -> Iterator[None]:
    """Inside, a DeepSpeed engine that loads by `torch.load` maps weights, under `module` of the file."""
    reader = engine.checkpoint_engine
    if not isinstance(reader, TorchCheckpointEngine):
        yield
        return
    engine.checkpoint_engine = _Mapping(reader)
    try:
        yield
    finally:
        engine.checkpoint_engine = reader


class _Mapping:
    """DeepSpeed's reader of checkpoint files."""

    def __init__(self, reader: TorchCheckpointEngine) -> None:
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def load(self, path: str, map_location: Any = None) -> Any:
        if not zipfile.is_zipfile(path):  # "checkpoint_serialization": false: torch's older format cannot be mapped
            return self._reader.load(path, map_location=map_location)
        found = torch.load(path, map_location=map_location, weights_only=False, mmap=True)
        if not isinstance(found, dict):
            return found
        # what a program keeps, its client state above all, must not hang on a file that may be deleted meanwhile
        return {key: item if key == "module" else _copied(item) for key, item in found.items()}


def _copied(item: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.Tensor.clone, item)
