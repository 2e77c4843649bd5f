# SPDX-License-Identifier: Apache-2.0
"""Plain transformers folders from checkpoints: without ranks or a GPU, and with a piece of a tensor in memory at once.

A checkpoint holds whole weights in every ZeRO stage, so nothing has to be put together but an adapter's rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meft_ds import files
from meft_ds.cli import checkpoint as checkpoints
from meft_ds.cli import method_files, stream
from meft_ds.cli.checkpoint import Checkpoint
from meft_ds.options import listed
from meft_ds.plugin import registry
from meft_ds.sparse_adapter.folder import tell_of_adapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BESIDE = (
    *("config.json", "generation_config.json", "*token*.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "preprocessor_config.json", "processor_config.json", "*.py"),
)
"""Of a model's folder: what is copied."""


def export(
    source: Path, out: Path, *, base: Path | None, dtype: torch.dtype | None, shard_bytes: int, method_files_only: bool
) -> dict[str, Any]:
    """Write `out` from a checkpoint, whole or not at all, and return what was written.

    Args:
        source: as `checkpoint.read`.
        out: a folder that does not exist yet; with `method_files_only` and tiles, a file.
        base: folder with config.json and the tokenizer; None looks where Trainer puts them.
        dtype: of all floating point weights; None leaves them.
        shard_bytes: most bytes of a file of weights, but for a single tensor that is larger.
        method_files_only: write the adapter or the tiles and no weights.

    Raises:
        ValueError: for anything that cannot be exported so.
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} is there already; remove it or choose another name")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out.absolute().parent} is no folder; create it")
    found = checkpoints.read(source)
    about: dict[str, Any] = {"checkpoint": str(found.tag), "out": str(out), "methods": found.methods}
    if method_files_only:
        return about | _method_files(found, out, base)
    config_folder = _config_folder(found, base)
    weights = _weights(found, config_folder)
    shards = _shards({name: stream.mapped(t, dtype) for name, t in weights.items()}, shard_bytes)
    with whole_folder(out) as part:
        copy_beside(config_folder, part, dtype)
        for name, tensors in shards.items():
            files.write_new(part / name, lambda path, tensors=tensors: stream.write(path, tensors))  # type: ignore[misc]
        if len(shards) > 1:
            files.write_text(part / "model.safetensors.index.json", _index(shards))
        if "sparse_adapter" in found.methods:
            method_files.write_adapter(found, part, initializer_range(config_folder))
            tell_of_adapter(part, _class_of(found))
        files.sync_names(part)
    sizes = [sum(source.bytes for source in tensors.values()) for tensors in shards.values()]
    return about | {"tensors": len(weights), "bytes": sum(sizes), "shards": list(shards), "largest": max(sizes)}


def _method_files(found: Checkpoint, out: Path, base: Path | None) -> dict[str, Any]:
    if "sparse_adapter" in found.methods:
        config = (_config_folder(found, base) if base is not None else None) or _config_beside(found)
        with whole_folder(out) as part:
            method_files.write_adapter(found, part, None if config is None else initializer_range(config))
        return {"wrote": "adapter"}
    if "sparse_matrix" in found.methods:
        method_files.write_tile_file(found, out)
        return {"wrote": "tiles"}
    raise ValueError(f"{found.methods[0]} has no files of its own, its result is the weights; leave --method-files out")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` to fill, and rename it at the end. After a fault nothing is left."""
    part = out.absolute().with_name(f".{out.name[:40]}.{secrets.token_hex(8)}.tmp")
    part.mkdir()
    try:
        yield part
        os.rename(part, out)
        files.sync_names(out.absolute().parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _config_beside(found: Checkpoint) -> Path | None:
    places = (found.tag, found.tag.parent)
    return next((folder for folder in places if (folder / "config.json").is_file()), None)


def _config_folder(found: Checkpoint, base: Path | None) -> Path:
    folder = _config_beside(found) if base is None else base
    if folder is None or not (folder / "config.json").is_file():
        where = f"{found.tag.parent} nor in {found.tag}" if base is None else str(base)
        raise ValueError(
            f"no config.json in {where}: pass --base with the folder of the model that was trained, which has its "
            "config.json and tokenizer"
        )
    return folder


def _config(folder: Path) -> dict[str, Any]:
    config = files.parse_json(files.read_bytes(folder / "config.json"))
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} is no JSON object; pass --base with another folder")
    return config


def initializer_range(folder: Path) -> float | None:
    """Return what the config in `folder` says of new values."""
    found = _config(folder).get("initializer_range")
    return found if isinstance(found, float) else None


def _weights(found: Checkpoint, config_folder: Path) -> dict[str, Tensor]:
    """Return the base's own tensors, each storage once. Raise ValueError when they are not the config's model."""
    plain = {n: t for n, t in found.module.items() if not any(extras.owns(n) for extras in registry.EXTRAS)}
    _check_model(plain, found.manifest["about"]["model"], config_folder)
    seen: dict[tuple[int, Any], str] = {}
    for name, t in plain.items():  # of tied tensors transformers keeps the first, too
        seen.setdefault((t.data_ptr() if t.numel() else id(t), t.shape), name)
    return {name: plain[name] for name in seen.values()}


def _class_of(found: Checkpoint) -> Any:
    """Return something whose class has the model's name, which the README of the folder is written with."""
    return type(found.manifest["about"]["model"], (), {})()


def _check_model(plain: dict[str, Tensor], model: str, folder: Path) -> None:
    import transformers

    kind = getattr(transformers, model, None)
    if kind is None or not hasattr(kind, "config_class"):
        raise ValueError(
            f"the checkpoint is of a {model}, which is no model of transformers, so its tensors have names of its own; "
            "load it in your program and call save_pretrained of the model inside"
        )
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        expected = kind(config).state_dict()
    faults = [f"{name} is missing" for name in expected if name not in plain]
    faults += [f"{name} is not the config's" for name in plain if name not in expected]
    faults += [
        f"{name} is {tuple(t.shape)}, by the config {tuple(expected[name].shape)}"
        for name, t in plain.items()
        if name in expected and t.shape != expected[name].shape
    ]
    if faults:
        raise ValueError(
            f"the checkpoint's tensors are not those of {model} by {folder / 'config.json'}: {listed(faults, 4)}; pass "
            "--base with the folder of the model that was trained, and save without exclude_frozen_parameters"
        )


def _shards(sources: dict[str, stream.Source], most: int) -> dict[str, dict[str, stream.Source]]:
    groups: list[dict[str, stream.Source]] = [{}]
    size = 0
    for name, source in sources.items():
        if groups[-1] and size + source.bytes > most:
            groups.append({})
            size = 0
        groups[-1][name] = source
        size += source.bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def _index(shards: dict[str, dict[str, stream.Source]]) -> str:
    total = sum(source.bytes for tensors in shards.values() for source in tensors.values())
    where = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True) + "\n"


def copy_beside(folder: Path, part: Path, dtype: torch.dtype | None) -> None:
    """Copy config, tokenizer and the like."""
    for path in sorted({path for pattern in _BESIDE for path in folder.glob(pattern)}):
        files.check_file(path)
        files.write_new(part / path.name, lambda to, path=path: shutil.copyfile(path, to))  # type: ignore[misc]
    config = _config(folder)
    config.pop("meft_ds", None)  # of an adapter that an earlier export had beside it
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
    files.write_text(part / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
