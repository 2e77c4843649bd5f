# SPDX-License-Identifier: Apache-2.0
"""`save_adapter` and `save_tiles`, and HF's `save_pretrained` of a training model: plain weights of the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meft_ds.offload.partition import Ranks, owned_range
from meft_ds.sparse_adapter.attach import ADAPTER_NAME, find_adapters
from meft_ds.sparse_adapter.files import write_adapter
from meft_ds.sparse_matrix.files import collect_tiles, merge_tiles, write_tiles
from meft_ds.sparse_matrix.method import SparseMatrixMethod
from meft_ds.sparse_matrix.unit import BlocksUnit


def save_adapter(model_or_engine: nn.Module, directory: str | Path) -> None:
    """Write the adapter (float32 master rows, routers, settings) to `directory`, for `load_adapter`.

    Args:
        model_or_engine: the engine that `deepspeed.initialize` returned, or the model inside it.
        directory: made when missing; existing adapter files in it are replaced atomically.

    Raises:
        ValueError: when the model has no adapter.

    May be called on any one rank: a node's ranks share the master rows.
    """
    model = getattr(model_or_engine, "module", model_or_engine)
    if not find_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has no meft-ds adapter; pass the engine that deepspeed.initialize returned for a "
            'config with a "meft_offload" block'
        )
    write_adapter(Path(directory), model)


def save_tiles(engine: Any, path: str | Path) -> None:
    """Write the tiles that sparse matrix tuning trains, and what they were before, for `apply_tiles` and
    `revert_tiles`. Collective: all ranks call it, and the file is complete when it returns.

    Base weights that the block's "train" names are no tiles and are not in the file.

    Args:
        engine: what `deepspeed.initialize` returned (with HF's Trainer: `trainer.deepspeed`).
        path: of the safetensors file; replaced atomically.

    Raises:
        ValueError: when the engine trains no tiles, or still scores them.
        OSError: when the file cannot be written.
    """
    method = next((m for m in getattr(engine, "_meft_methods", ()) if isinstance(m, SparseMatrixMethod)), None)
    if method is None:
        raise ValueError(
            f"this {type(engine).__name__} trains no tiles; pass the engine that deepspeed.initialize returned for a "
            'config with a "sparse_matrix" object in its "meft_offload" block'
        )
    if method.choice is None:
        raise ValueError(
            f"tiles are still being scored ({method.stats()['scored_steps']} steps so far) and nothing has been "
            "trained; call save_tiles when training has begun"
        )
    engine.meft_flush()
    ranks = engine._meft_run.ranks
    units = [unit for unit in engine.optimizer.pipeline.units if isinstance(unit, BlocksUnit)]
    originals = [_gathered(unit, ranks) for unit in units]
    fault: Exception | None = None
    if ranks.rank == 0:
        try:
            write_tiles(path, collect_tiles(method.choice, units, [unit.values().cpu() for unit in units], originals))
        except Exception as e:  # the other ranks must not wait for ever
            fault = e
    if ranks.world > 1:
        told: list[Any] = [None if fault is None else f"{type(fault).__name__}: {fault}"]
        dist.broadcast_object_list(
            told, src=dist.get_global_rank(ranks.group, 0) if ranks.group else 0, group=ranks.group
        )
        if ranks.rank > 0 and told[0] is not None:
            raise OSError(f"the first rank could not write {path}: {told[0]}")
    if fault is not None:
        raise fault


def save_plain_weights(model: nn.Module) -> None:
    """Make the model's `save_pretrained` write plain weights of the base: no tensors of ours, tiles of the delta form
    merged in, and an adapter beside them."""
    if hasattr(model, "save_pretrained"):
        # a method, so that copies of the model save themselves
        model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[assignment]


def _save_pretrained(model: Any, directory: Any, *args: Any, **kwargs: Any) -> Any:
    state: dict[str, Tensor] | None = kwargs.pop("state_dict", None)
    state = model.state_dict() if state is None else state
    kwargs["state_dict"] = merge_tiles(model, {k: t for k, t in state.items() if ADAPTER_NAME not in k.split(".")})
    result = type(model).save_pretrained(model, directory, *args, **kwargs)
    if kwargs.get("is_main_process", True) and find_adapters(model):
        save_adapter(model, directory)
    return result


def _gathered(unit: BlocksUnit, ranks: Ranks) -> Tensor:
    """The unit's original values, flat [numel] on the host. Collective."""
    if ranks.world == 1:
        return unit.original.cpu()
    sizes = [hi - lo for lo, hi in (owned_range(unit.numel, replace(ranks, rank=k)) for k in range(ranks.world))]
    # rows of one length, because not every backend gathers slices of different sizes
    rows = torch.zeros(ranks.world + 1, max(sizes), dtype=unit.original.dtype, device=unit.params[0][1].device)
    rows[-1, : sizes[ranks.rank]] = unit.original
    dist.all_gather(list(rows[:-1].unbind(0)), rows[-1], group=ranks.group)
    return torch.cat([row[:size] for row, size in zip(rows[:-1].cpu(), sizes, strict=True)])
