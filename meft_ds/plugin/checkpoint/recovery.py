# SPDX-License-Identifier: Apache-2.0
"""Lets DeepSpeed's own tools (`zero_to_fp32.py` and its functions) read the weights of our checkpoints.

They take buffers from the model file as they are and put parameters together from ZeRO's optimizer files. Our model
file holds whole weights, so it lists all of them as buffers, and an optimizer file without a group goes beside it:
no weight is stored twice. DeepSpeed's engines read neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meft_ds.plugin.checkpoint.transaction import Saving

WHOLE = "meft_optim_states.pt"
# the tools name a file that they cannot read: rows are no part of the model file, and the base alone is not the model
ROWS = "MEFT_ADAPTER_ROWS_ARE_NOT_IN_THE_MODEL_FILE_load_checkpoint_THEN_save_16bit_model_optim_states.pt"


@contextlib.contextmanager
def readable(engine: Any) -> Iterator[None]:
    """Inside, the model file that a DeepSpeed engine saves is one that the tools can read."""
    writer = engine.checkpoint_engine
    engine.checkpoint_engine = _Readable(writer)
    try:
        yield
    finally:
        engine.checkpoint_engine = writer


def write_optimizer_file(saving: Saving, *, rows: bool) -> None:
    """Write what the tools look for beside the model file; `rows`: what stops them, by its name. For one rank."""
    folder = saving.folder.parent
    name, other = (ROWS, WHOLE) if rows else (WHOLE, ROWS)
    groups = {} if rows else {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": []}
    found = saving.write(folder / name, lambda staged: torch.save({"optimizer_state_dict": groups}, staged))
    saving.of_deepspeed[name] = found
    with saving.attempt(folder / other):
        (folder / other).unlink(missing_ok=True)  # of another block under the same tag


class _Readable:
    """A writer of checkpoint files that completes what the tools miss in a model file."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        if Path(path).name.endswith("_model_states.pt") and isinstance(state_dict.get("module"), dict):
            whole = [name for name, t in state_dict["module"].items() if isinstance(t, Tensor)]
            state_dict = {**state_dict, "buffer_names": whole, "param_shapes": [], "shared_params": {}}
        self._writer.save(state_dict, path)
