# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own files in a checkpoint: staged while they are written, mapped while they are read.

DeepSpeed's tools (`zero_to_fp32.py` and its functions) can read the weights of our checkpoints. They take buffers from
the model file as they are, and put parameters together from ZeRO's optimizer files. Our model file holds whole weights,
so it lists all of them as buffers, and an optimizer file without a group goes beside it: no weight is stored twice.
DeepSpeed's engines read neither.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor
from torch.utils._pytree import tree_map_only

from meft_ds.plugin.checkpoint.transaction import Saving

_WHOLE = "meft_optim_states.pt"
# the tools name a file that they cannot read: rows are no part of the model file, and the base alone is not the model
_ROWS = "MEFT_ADAPTER_ROWS_ARE_NOT_IN_THE_MODEL_FILE_load_checkpoint_THEN_save_16bit_model_optim_states.pt"


@contextlib.contextmanager
def through(engine: Any, saving: Saving | None = None) -> Iterator[None]:
    """Inside, let what a DeepSpeed engine writes be part of `saving`, and map into memory what it loads.

    Raises:
        ValueError: with `saving`, when the engine does not write by `torch.save`.
    """
    own = engine.checkpoint_engine
    by_torch = isinstance(own, TorchCheckpointEngine)
    if saving is not None and not by_torch:  # one that the program has put there: `ds_config` knows what JSON asks for
        raise ValueError(
            f"meft-ds: engine.checkpoint_engine is {type(own).__name__}, expected DeepSpeed's own "
            "TorchCheckpointEngine: files of others change before the checkpoint is complete; leave it as it was"
        )
    if by_torch:
        engine.checkpoint_engine = _StandIn(own, saving)
    try:
        yield
    finally:
        engine.checkpoint_engine = own


def write_optimizer_file(saving: Saving, *, rows: bool) -> None:
    """Write what the tools look for beside the model file. Call it on one rank.

    `rows`: the model file lacks adapter rows, and the name of the optimizer file tells the tools so.
    """
    folder = saving.folder.parent
    name, other = (_ROWS, _WHOLE) if rows else (_WHOLE, _ROWS)
    groups = {} if rows else {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": []}
    saving.write_of_deepspeed(folder / name, lambda staged: torch.save({"optimizer_state_dict": groups}, staged))
    with saving.attempt(folder / other):
        (folder / other).unlink(missing_ok=True)  # of another block under the same tag


class _StandIn:
    """Stands in for DeepSpeed's writer and reader of checkpoint files."""

    def __init__(self, own: TorchCheckpointEngine, saving: Saving | None) -> None:
        self._own, self._saving = own, saving

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        assert self._saving is not None
        with self._saving.attempt(Path(path)):  # a fault on one rank must reach all of them
            self._own.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        assert self._saving is not None
        if Path(path).name.endswith("_model_states.pt") and isinstance(state_dict.get("module"), dict):
            whole = [name for name, t in state_dict["module"].items() if isinstance(t, Tensor)]
            state_dict = {**state_dict, "buffer_names": whole, "param_shapes": [], "shared_params": {}}
        self._saving.write_of_deepspeed(Path(path), lambda staged: self._own.save(state_dict, str(staged)))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Map the weights instead of reading them.

        Otherwise each of a node's ranks would hold the whole model (8 ranks and 70 B weights in bf16: 1.1 TB). Ranks
        share the file's pages, and touch only those that they copy from.
        """
        if not zipfile.is_zipfile(path):  # "checkpoint_serialization": false: torch's older format cannot be mapped
            return self._own.load(path, map_location=map_location)
        found = torch.load(path, map_location=map_location, weights_only=False, mmap=True)
        if not isinstance(found, dict):
            return found
        # what a program keeps, its client state above all, must not hang on a file that may be deleted meanwhile
        return {key: item if key == "module" else _copied(item) for key, item in found.items()}


def _copied(item: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.Tensor.clone, item)
