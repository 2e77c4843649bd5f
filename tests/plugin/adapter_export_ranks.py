# SPDX-License-Identifier: Apache-2.0
"""What ranks do in test_exports.py: functions that a forge runs on every rank."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import meft_ds
from meft_ds.sparse_adapter import extras, files
from tests.plugin.fault_ranks import state
from tests.toy import ADAPTER, batch, ds_config, make_engine, tiny_llama


def engine_for(stage: int) -> Any:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    block = {"sparse_adapter": dict(ADAPTER)}
    return make_engine(ds_config(block=block, micro=2, zero_optimization=zero), tiny_llama())


def steps(engine: Any, seeds: range) -> None:
    for seed in seeds:
        engine.backward(engine(**batch(2 * seed + dist.get_rank(), rows=2)).loss)
        engine.step()


def full_on_the_first(folder: Path, stage: int) -> dict[str, Any]:
    """Exports to a disk that is full for the first rank, between steps; then one that ends well."""
    engine, plain = engine_for(stage), engine_for(stage)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    plants = {"16bit": [(torch, "save")], "adapter beside": [(files, "save_file")]}
    if stage == 3:
        plants["adapter"] = [(files, "save_file")]
    told = {}
    for seed, (what, planted) in enumerate(plants.items()):
        steps(engine, range(seed, seed + 1))
        with contextlib.ExitStack() as stack:
            for where, name in planted if dist.get_rank() == 0 else ():
                stack.enter_context(patch.object(where, name, full))
            try:
                save(engine, what, folder / what)
            except OSError as e:
                told[what] = str(e)
    steps(engine, range(len(plants), 4))
    steps(plain, range(4))
    for what in plants:
        save(engine, what, folder / what)
        dist.barrier()
        assert (folder / what / "meft_adapter.json").is_file()
    return {"told": told, "same": state(engine) == state(plain)}


def save(engine: Any, what: str, folder: Path) -> None:
    if what == "adapter":
        meft_ds.save_adapter(engine, folder)
    else:
        engine.save_16bit_model(str(folder))


def writers(folder: Path, stage: int) -> int:
    """How many adapters this rank writes for one `save_16bit_model`."""
    engine = engine_for(stage)
    with patch.object(extras, "write_adapter", wraps=extras.write_adapter) as counted:
        engine.save_16bit_model(str(folder))
    return int(counted.call_count)
