# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that an engine saved, read without one: its manifest, its weights mapped from the file, its state."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from meft_ds.cli.stream import Source
from meft_ds.plugin.checkpoint import state
from meft_ds.plugin.checkpoint.transaction import FOLDER, MANIFEST, Manifest, finish


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds. Nothing of it but the manifest is in memory.

    Attributes:
        tag: the folder of its tag.
        root: the folder that was asked for.
        manifest: verified, and so are the files that were read for this.
        module: tensors of the model by name, whole and mapped.
        ds_config: of the run that saved it.
    """

    tag: Path
    root: Path
    manifest: Manifest
    module: dict[str, Tensor]
    ds_config: dict[str, Any]

    @property
    def methods(self) -> list[str]:
        return str(self.manifest["about"]["method"]).split("+")

    def unit(self, name: str, key: str, row: tuple[int, ...], dtype: torch.dtype) -> Source:
        """Return the whole of a unit's state tensor, whose slices all ranks wrote. Their files are verified.

        Raises:
            ValueError: naming a file that is damaged.
        """
        slices = [(file, entry) for file, entry in self.manifest["files"].items() if entry["unit"] == name]
        slices = sorted((s for s in slices if "lo" in s[1]), key=lambda s: s[1]["lo"])
        if not slices:
            raise ValueError(f"{self.tag}: the checkpoint has no state of {name}; load an earlier checkpoint")
        for file, entry in slices:
            state.check_entry(self.tag / FOLDER / file, entry)
        total = slices[0][1]["total"]
        step = max(1, 2**22 // max(1, torch.Size(row).numel()))

        def pieces() -> Iterator[Tensor]:
            for file, entry in slices:
                with safe_open(self.tag / FOLDER / file, framework="pt", device="cpu") as opened:
                    values = opened.get_slice(key)
                    for start in range(0, entry["hi"] - entry["lo"], step):
                        yield values[start : min(start + step, entry["hi"] - entry["lo"])].to(dtype)

        return Source(dtype=dtype, shape=(total, *row), pieces=pieces)


def read(folder: Path) -> Checkpoint:
    """Find a checkpoint of ours in `folder`, verify its files and map its weights.

    Args:
        folder: what `save_checkpoint` was given (its `latest` counts), the folder of a tag in it, or a `checkpoint-N`
            of HF's Trainer.

    Raises:
        ValueError: when there is none, or it is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; pass a folder that save_checkpoint or Trainer wrote")
    tag = folder
    if not (folder / FOLDER).is_dir():
        named = state.latest_tag(folder)
        if named is None:
            raise ValueError(
                f"{folder} has no checkpoint of meft_offload: expected a file latest, or {FOLDER}/{MANIFEST}"
            )
        tag = folder / named
    finish(tag / FOLDER)
    manifest = state.read_manifest(tag / FOLDER)
    model = next((name for name in manifest["deepspeed"] if name.endswith("_model_states.pt")), None)
    if model is None:
        raise ValueError(f"{tag} has no file of the model; load an earlier checkpoint")
    state.check_entry(tag / model, manifest["deepspeed"][model])
    found = _load(tag / model)
    module = {name: t for name, t in found["module"].items() if isinstance(t, Tensor)}
    return Checkpoint(tag=tag, root=folder, manifest=manifest, module=module, ds_config=found.get("ds_config") or {})


def _load(path: Path) -> dict[str, Any]:
    # "checkpoint_serialization": false gives torch's older format, which cannot be mapped
    can_map = zipfile.is_zipfile(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    except Exception as fault:
        if "weights_only" not in str(fault).lower().replace("weights only", "weights_only"):
            raise
        raise ValueError(
            f"{path} holds objects that only unpickling brings back, which may run code; the run's client_state must "
            f"hold plain values and tensors for this command ({str(fault).splitlines()[0]})"
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("module"), dict):
        raise ValueError(f"{path} holds no weights of a model; load an earlier checkpoint")
    return found
