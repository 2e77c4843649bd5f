# SPDX-License-Identifier: Apache-2.0
"""Files of tiles: what is in them, and model folders with their tiles put in or taken out."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from meft_ds import files
from meft_ds.cli import stream
from meft_ds.cli.export import copy_beside, whole_folder
from meft_ds.options import listed
from meft_ds.sparse_matrix.files import SavedTiles, check_applies, check_reverts, put, read_tiles

_INDEX = "model.safetensors.index.json"


def show(path: Path) -> dict[str, Any]:
    """Return what a file of tiles holds, in numbers."""
    saved = read_tiles(path)
    weights = {
        name: {
            "shape": list(saved.shapes[name]),
            "dtype": str(saved.values[name].dtype).removeprefix("torch."),
            "tiles": len(saved.tiles[name]),
            "values": saved.values[name].numel(),
            "share": saved.values[name].numel() / math.prod(saved.shapes[name]),
            "largest_change": float((saved.values[name].float() - saved.originals[name].float()).abs().max()),
        }
        for name in saved.tiles
    }
    return {"file": str(path), "digest": saved.digest, "weights": weights}


def swap(path: Path, model: Path, out: Path, *, back: bool) -> dict[str, Any]:
    """Write `out`, a copy of the folder `model` with the tiles of `path` applied or, with `back`, taken out.

    Raises:
        ValueError: when the model does not hold what the tiles were trained from (`back`: their values).
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} is there already; remove it or choose another name")
    saved = read_tiles(path)
    shards = {file: _tensors(model / file) for file in _files(model)}
    held = {name: t for tensors in shards.values() for name, t in tensors.items()}
    weights = {name: _fitting(held, name, saved, path, model) for name in saved.tiles}
    (check_reverts if back else check_applies)(weights, saved, path)
    wanted = saved.originals if back else saved.values
    with whole_folder(out) as part:
        copy_beside(model, part, None)
        if (model / _INDEX).is_file():
            files.write_new(part / _INDEX, lambda to: shutil.copyfile(model / _INDEX, to))
        for file, tensors in shards.items():
            sources = {name: _swapped(name, t, saved, wanted) for name, t in tensors.items()}
            files.write_new(part / file, lambda to, sources=sources: stream.write(to, sources))  # type: ignore[misc]
        files.sync_names(part)
    return {"out": str(out), "weights": len(weights), "values": sum(t.numel() for t in wanted.values())}


def _files(model: Path) -> list[str]:
    if (model / _INDEX).is_file():
        index = files.parse_json(files.read_bytes(model / _INDEX))
        names = sorted(set(index["weight_map"].values()))
        if all(isinstance(name, str) and Path(name).name == name for name in names):
            return names
        raise ValueError(f"{model / _INDEX} names files outside its folder")
    if (model / "model.safetensors").is_file():
        return ["model.safetensors"]
    raise ValueError(f"{model} has no model.safetensors; pass a folder that save_pretrained wrote")


def _tensors(path: Path) -> dict[str, Tensor]:
    files.check_file(path)
    with safe_open(path, framework="pt", device="cpu") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # mapped, not read


def _fitting(held: dict[str, Tensor], name: str, saved: SavedTiles, path: Path, model: Path) -> Tensor:
    if name not in held:
        near = listed([other for other in held if other.rpartition(".")[0].endswith(name.split(".")[-2])][:3])
        raise ValueError(f"{path}: {model} has no tensor {name}{f' (it has {near})' if near else ''}; pass its base")
    found, wanted = held[name], saved.values[name].dtype
    if tuple(found.shape) != saved.shapes[name] or found.dtype != wanted:
        raise ValueError(
            f"{path}: {name} is {found.dtype} {tuple(found.shape)} in {model}, its tiles are of {wanted} "
            f"{saved.shapes[name]}; save the base in the dtype that it was trained in"
        )
    return found


def _swapped(name: str, t: Tensor, saved: SavedTiles, wanted: dict[str, Tensor]) -> stream.Source:
    plain = stream.mapped(t)
    if name not in saved.tiles:
        return plain

    def pieces() -> Any:
        copy = t.clone()
        put({name: copy}, {name: saved.tiles[name]}, wanted)
        yield copy.reshape(-1)

    return stream.Source(dtype=plain.dtype, shape=plain.shape, pieces=pieces)
