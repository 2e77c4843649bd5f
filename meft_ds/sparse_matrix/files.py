# SPDX-License-Identifier: Apache-2.0
"""Trained tiles in one file: what they are and what they were, to be put into a plain model and taken out again.

A safetensors file holds, per weight that has tiles, two flat tensors in the weight's dtype: `values.<name>` and
`original.<name>`, tile after tile, each row by row. Its header says under "meft_tiles" (JSON) where the tiles lie and
what SHA-256 all of it has. The same tiles give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from meft_ds.files import check_file, checked_folder, parse_json, write_whole
from meft_ds.offload.model.capture import is_tapped
from meft_ds.options import MOST_LISTED, listed
from meft_ds.sparse_matrix.choice.choice import Choice, Range, misplaced, overlapping
from meft_ds.sparse_matrix.unit import TilesUnit

_FORMAT = 1
_KEY = "meft_tiles"
StoredTile = tuple[int | None, Range, Range]
"""Expert (None without), rows and columns."""


@dataclass(frozen=True, kw_only=True)
class SavedTiles:
    """What a file of tiles holds; all by the weight's name.

    Attributes:
        digest: of the choice that these tiles are.
        shapes: of the weights.
        tiles: in the order of their values.
        values, originals: flat, in the weight's dtype, on the host.
    """

    digest: str
    shapes: dict[str, tuple[int, ...]]
    tiles: dict[str, list[StoredTile]]
    values: dict[str, Tensor]
    originals: dict[str, Tensor]


def apply_tiles(model: nn.Module, path: str | Path) -> nn.Module:
    """Write the tiles that `save_tiles` wrote into a plain model, and return the model.

    Args:
        model: the base that the tiles were trained on, in the dtype it was trained in.
        path: of the file.

    Raises:
        ValueError: when the file is damaged or holds values that are not finite. When a weight has another shape or
        dtype, or does not hold, bit for bit, what its tiles were trained from. The model is then as it was.

    Example:
        model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.bfloat16)
        meft_ds.apply_tiles(model, "tiles.safetensors")
    """
    saved = read_tiles(path)
    weights = _weights(model, saved, path)
    check_applies(weights, saved, path)
    put(weights, saved.tiles, saved.values)
    return model


def revert_tiles(model: nn.Module, path: str | Path) -> nn.Module:
    """Undo `apply_tiles`, or the training itself, and return the model. The tiles get back what they were, bit for bit.

    Args:
        model: a model that holds the values of the file's tiles.
        path: of the file.

    Raises:
        ValueError: as `apply_tiles`, and when the model's tiles do not hold the file's values.

    Example:
        meft_ds.apply_tiles(model, "first.safetensors")
        meft_ds.revert_tiles(model, "first.safetensors")
        meft_ds.apply_tiles(model, "second.safetensors")
    """
    saved = read_tiles(path)
    weights = _weights(model, saved, path)
    check_reverts(weights, saved, path)
    put(weights, saved.tiles, saved.originals)
    return model


def check_applies(weights: dict[str, Tensor], saved: SavedTiles, path: str | Path) -> None:
    """Raise ValueError unless `weights` hold what the tiles of `path` were trained from."""
    if differing := _differing(weights, saved.tiles, saved.originals):
        if not _differing(weights, saved.tiles, saved.values):
            raise ValueError(f"{path}: these tiles are applied already; revert_tiles takes them out")
        raise ValueError(
            f"{path}: these tiles were not trained from what is in {listed(differing)}: the model is not the base "
            "that they belong to, or other tiles are applied to it; load that base, or revert those first"
        )
    if broken := [name for name, values in saved.values.items() if not torch.isfinite(values).all()]:
        raise ValueError(
            f"{path}: NaN or infinite values in tiles of {listed(broken)}; save the tiles of an earlier checkpoint"
        )


def check_reverts(weights: dict[str, Tensor], saved: SavedTiles, path: str | Path) -> None:
    """Raise ValueError unless `weights` hold the values of the tiles of `path`."""
    if differing := _differing(weights, saved.tiles, saved.values):
        if not _differing(weights, saved.tiles, saved.originals):
            raise ValueError(f"{path}: these tiles are not applied to this model; there is nothing to revert")
        raise ValueError(
            f"{path}: the values of these tiles are not what is in {listed(differing)}: the model is another one, or "
            "other tiles are applied to it, or it was trained further; revert with the file applied or saved last"
        )


def collect_tiles(
    choice: Choice, units: Sequence[TilesUnit], values: Sequence[Tensor], originals: Sequence[Tensor]
) -> SavedTiles:
    """Return the tiles of a choice from the units' flat payloads `values` and `originals`."""
    now, was = (_by_tile(units, flats) for flats in (values, originals))
    tiles: dict[str, list[StoredTile]] = defaultdict(list)
    for tile in choice.tiles:
        tiles[tile.name].append((tile.expert, tile.rows, tile.cols))
    return SavedTiles(
        digest=choice.digest(),
        shapes={name: choice.shapes[name] for name in tiles},
        tiles=dict(tiles),
        values={name: torch.cat([now[name, at].reshape(-1) for at in found]) for name, found in tiles.items()},
        originals={name: torch.cat([was[name, at].reshape(-1) for at in found]) for name, found in tiles.items()},
    )


def _by_tile(units: Sequence[TilesUnit], flats: Sequence[Tensor]) -> dict[tuple[str, StoredTile], Tensor]:
    found: dict[tuple[str, StoredTile], Tensor] = {}
    for unit, flat in zip(units, flats, strict=True):
        for of_matrix in unit.matrices:
            name = unit.params[of_matrix.param][0]
            for (rows, cols), values in of_matrix.tiles(of_matrix.part(flat)):
                found[name, (of_matrix.expert, rows, cols)] = values
    return found


# -- the file ----------------------------------------------------------------------------------------------------------


def write_tiles(path: str | Path, saved: SavedTiles) -> None:
    """Write tiles. A program that reads `path` meanwhile finds the old file, or the new one whole."""
    path = checked_folder(path)
    tensors = {f"values.{name}": t.contiguous() for name, t in saved.values.items()}
    tensors |= {f"original.{name}": t.contiguous() for name, t in saved.originals.items()}
    weights = {name: {"shape": saved.shapes[name], "tiles": tiles} for name, tiles in saved.tiles.items()}
    about: dict[str, Any] = {"format": _FORMAT, "digest": saved.digest, "weights": weights}
    about["sha256"] = _sha256(about, tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    # one key: safetensors writes several in any order
    write_whole(path, lambda part: save_file(tensors, part, metadata={_KEY: _compact(about)}))


def read_tiles(path: str | Path) -> SavedTiles:
    """Read and check what `write_tiles` wrote. Raises ValueError, with the path, for anything else."""
    try:
        check_file(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()} if _KEY in about else {}
    except OSError as fault:
        raise ValueError(f"{path}: cannot read these tiles: {fault.strerror or fault}") from None
    except SafetensorError as fault:
        raise ValueError(f"{path}: damaged, or not a safetensors file: {fault}; save the tiles again") from None
    if _KEY not in about:
        raise ValueError(f"{path} holds no tiles; pass a file that meft_ds.save_tiles wrote")
    try:
        found = parse_json(about[_KEY])
        version = found["format"]
        if version == _FORMAT and _sha256(found, tensors) != found["sha256"]:
            raise ValueError("its SHA-256 is not the one that it was written with")
        saved = _parsed(found, tensors) if version == _FORMAT else None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as fault:
        why = fault if isinstance(fault, ValueError) else repr(fault)
        raise ValueError(f"{path}: damaged: {why}; save the tiles again") from None
    if saved is None:
        raise ValueError(f"{path}: format {version!r}, this version reads {_FORMAT}; update meft-ds")
    return saved


def _parsed(about: dict[str, Any], tensors: dict[str, Tensor]) -> SavedTiles:
    shapes: dict[str, tuple[int, ...]] = {}
    tiles: dict[str, list[StoredTile]] = {}
    for name, weight in about["weights"].items():
        shapes[name] = tuple(weight["shape"])
        tiles[name] = [(expert, (rows[0], rows[1]), (cols[0], cols[1])) for expert, rows, cols in weight["tiles"]]
        elements = 0
        of_expert: dict[int | None, list[tuple[Range, Range]]] = defaultdict(list)
        for expert, rows, cols in tiles[name]:
            if fault := misplaced(shapes[name], expert, rows, cols):
                raise ValueError(f"{name}: {fault}")
            of_expert[expert].append((rows, cols))
            elements += (rows[1] - rows[0]) * (cols[1] - cols[0])
        if any(overlapping(tiles) for tiles in of_expert.values()):
            raise ValueError(f"{name}: tiles overlap")
        now, was = tensors[f"values.{name}"], tensors[f"original.{name}"]
        if not (now.shape == was.shape == (elements,) and now.dtype == was.dtype):
            raise ValueError(f"{name}: expected {elements} values and as many originals")
    return SavedTiles(
        digest=about["digest"],
        shapes=shapes,
        tiles=tiles,
        values={name: tensors[f"values.{name}"] for name in tiles},
        originals={name: tensors[f"original.{name}"] for name in tiles},
    )


def _sha256(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(_compact({key: value for key, value in about.items() if key != "sha256"}).encode())
    for key in sorted(tensors):
        found.update(f"\n{key} {tensors[key].dtype}\n".encode())
        found.update(tensors[key].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _compact(about: Mapping[str, Any]) -> str:
    return json.dumps(about, separators=(",", ":"))


# -- the model ---------------------------------------------------------------------------------------------------------


def _weights(model: nn.Module, saved: SavedTiles, path: str | Path) -> dict[str, Tensor]:
    """Return the weights that the tiles belong to, detached. Raises ValueError when some do not fit."""
    for name, module in model.named_modules():
        if is_tapped(module):
            raise ValueError(
                f"{name or type(model).__name__} is being trained by an engine, which goes on from values of its own; "
                "call engine.destroy() first, or load the model anew"
            )
    found = dict(model.named_parameters(remove_duplicate=False))
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, weight in found.items():
        names_of[id(weight)].append(name)
    faults = []
    for name, shape in saved.shapes.items():
        p = found.get(name)
        if fault := _misfit(p, shape, saved.values[name].dtype):
            faults.append(f"{name}: {fault}")
        elif len(same := names_of[id(p)]) > 1:
            faults.append(f"{name}: it is tied to {', '.join(other for other in same if other != name)} here")
    if faults:
        raise ValueError(f"{path}: these tiles do not fit this {type(model).__name__}: {listed(faults, MOST_LISTED)}")
    return {name: found[name].detach() for name in saved.shapes}


def _misfit(p: nn.Parameter | None, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Return why a weight cannot be the one that a file means; "" if it can."""
    if p is None:
        return "the model has no such parameter"
    if type(p.data) is not Tensor or p.is_meta:
        kind = "on the meta device" if p.is_meta else f"a {type(p.data).__name__}"
        return f"it is {kind}; load the model whole, without sharding, offload or quantization"
    if tuple(p.shape) != shape:
        return f"shape {tuple(p.shape)}, the tiles' weight had {shape}"
    if p.dtype != dtype:
        return f"{p.dtype}, the tiles are {dtype}: load the model with that dtype, or nothing could be reverted exactly"
    return ""


def _differing(weights: dict[str, Tensor], tiles: dict[str, list[StoredTile]], wanted: dict[str, Tensor]) -> list[str]:
    """Return the names of weights whose tiles do not hold these bits."""
    differing = []
    for name, weight in weights.items():
        held = torch.cat([tile.reshape(-1) for tile, _ in _tiles(weight, tiles[name], wanted[name])])
        if not torch.equal(held.cpu().view(torch.uint8), wanted[name].view(torch.uint8)):
            differing.append(name)
    return differing


@torch.no_grad()
def put(weights: Mapping[str, Tensor], tiles: dict[str, list[StoredTile]], flats: dict[str, Tensor]) -> None:
    """Write each weight's tiles from their flat values."""
    for name, weight in weights.items():
        for tile, values in _tiles(weight, tiles[name], flats[name].to(weight.device)):
            tile.copy_(values)


def _tiles(weight: Tensor, tiles: list[StoredTile], flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tile of a weight, a view, with its values in a flat vector."""
    start = 0
    for expert, (top, bottom), (left, right) in tiles:
        matrix = weight if expert is None else weight[expert]
        shape = bottom - top, right - left
        yield matrix[top:bottom, left:right], flat[start : start + shape[0] * shape[1]].view(shape)
        start += shape[0] * shape[1]
