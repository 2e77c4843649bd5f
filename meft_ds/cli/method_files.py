# SPDX-License-Identifier: Apache-2.0
"""The files of a method's own, an adapter or tiles, from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from meft_ds.cli import stream
from meft_ds.cli.checkpoint import Checkpoint
from meft_ds.config import BLOCK, parse_config
from meft_ds.sparse_adapter.attach import ADAPTER_NAME
from meft_ds.sparse_adapter.config import ResolvedSparseAdapter
from meft_ds.sparse_adapter.files import publish
from meft_ds.sparse_matrix.choice.choice import Choice
from meft_ds.sparse_matrix.files import collect_tiles, write_tiles
from meft_ds.sparse_matrix.tiles import Tiles

_ROUTER = f".{ADAPTER_NAME}.router.weight"
_OLD = "an older version saved the checkpoint; load it into an engine and call"


def write_adapter(checkpoint: Checkpoint, folder: Path, initializer_range: float | None) -> None:
    """Write the adapter as `meft_ds.save_adapter` does, from an engine that has loaded the checkpoint.

    Raises:
        ValueError: when the checkpoint does not say which of the base's tensors belong to it.
    """
    base = checkpoint.manifest.get("trained_base")
    if base is None:
        raise ValueError(f"{checkpoint.tag}: {_OLD} meft_ds.save_adapter")
    module = checkpoint.module
    routers = {name.removesuffix(_ROUTER): t for name, t in module.items() if name.endswith(_ROUTER)}
    config = _adapter_config(checkpoint, next(iter(routers.values())).shape[1], initializer_range)
    sources: dict[str, stream.Source] = {}
    for i, router in enumerate(routers.values()):
        rows = checkpoint.unit(f"layer{i}.rows", "master", (2 * config.d,), torch.float32)
        sources |= {f"layers.{i}.rows": rows, f"layers.{i}.router": stream.mapped(router, torch.float32)}
    sources |= {f"base.{name}": stream.mapped(module[name]) for name in base}
    publish(
        folder,
        lambda path: stream.write(path, sources),
        model_class=checkpoint.manifest["about"]["model"],
        config=config,
        modules=list(routers),
        base=list(base),
        elsewhere=[name for name in checkpoint.methods if name != "sparse_adapter"],
    )


def _adapter_config(checkpoint: Checkpoint, d: int, initializer_range: float | None) -> ResolvedSparseAdapter:
    asked = parse_config(checkpoint.ds_config[BLOCK]).sparse_adapter
    assert asked is not None
    start = "sparse_adapter."
    about: dict[str, Any] = {k.removeprefix(start): v for k, v in checkpoint.manifest["about"].items()}
    resolved = asked.resolve(d, initializer_range)
    # what shapes the function is what the engine had, which may have taken over an adapter that was there
    return replace(resolved, **{k: v for k, v in about.items() if k in ResolvedSparseAdapter.__dataclass_fields__})


def write_tile_file(checkpoint: Checkpoint, path: Path) -> None:
    """Write the tiles as `meft_ds.save_tiles` does.

    Raises:
        ValueError: when none were trained yet, or the checkpoint does not say where their values are.
    """
    kept = checkpoint.manifest["methods"]["sparse_matrix"]
    if "choice" not in kept:
        raise ValueError(f"{checkpoint.tag}: tiles were still being scored and nothing was trained; take a later one")
    if "layout" not in kept:
        raise ValueError(f"{checkpoint.tag}: {_OLD} meft_ds.save_tiles")
    choice = Choice.from_json(kept["choice"])
    units = [_unit(choice, matrices) for matrices in kept["layout"].values()]
    values, originals = [], []
    for name, unit in zip(kept["layout"], units, strict=True):
        weights = [checkpoint.module[of] for of, _ in unit.params]
        values.append(torch.cat([m.read(m.matrix(weights[m.param])) for m in unit.matrices]))
        original = checkpoint.unit(name, "original", (), values[-1].dtype)
        originals.append(torch.cat([piece.reshape(-1) for piece in original.pieces()]))
    write_tiles(path, collect_tiles(choice, units, values, originals))


def _unit(choice: Choice, matrices: list[tuple[str, int | None, bool]]) -> Any:
    """Return what `collect_tiles` asks of a unit: where its matrices' tiles lie in its flat values."""
    names = list(dict.fromkeys(name for name, _, _ in matrices))
    made: list[Tiles] = []
    offset = 0
    for name, expert, input_first in matrices:
        chosen = [(tile.rows, tile.cols) for tile in choice.tiles if (tile.name, tile.expert) == (name, expert)]
        features = choice.shapes[name][-2 if input_first else -1]
        made.append(
            Tiles(
                param=names.index(name),
                expert=expert,
                tiles=chosen,
                input_first=input_first,
                features=features,
                offset=offset,
                device=torch.device("cpu"),
            )
        )
        offset += made[-1].numel
    params: list[tuple[str, Tensor | None]] = [(name, None) for name in names]
    return SimpleNamespace(params=params, matrices=made)
