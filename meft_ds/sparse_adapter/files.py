# SPDX-License-Identifier: Apache-2.0
"""An adapter on disk, and back into a plain model on one device for inference.

``meft_adapter.json`` says what the adapter is and names the tensor file with its size and SHA-256;
``meft_adapter-<hash>.safetensors`` holds fp32 ``layers.<i>.rows`` [r, 2 d] (key || value) and ``layers.<i>.router``
[N, d]. The tensor file is named by its content and the JSON is replaced last, so a directory always holds one complete
adapter.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from meft_ds import files
from meft_ds.sparse_adapter.attach import find_adapters, place
from meft_ds.sparse_adapter.config import ResolvedSparseAdapter
from meft_ds.sparse_adapter.discover import Site, make_site
from meft_ds.sparse_adapter.module import SparseAdapter
from meft_ds.sparse_adapter.rows import DeviceRows

__all__ = ["FORMAT", "JSON_NAME", "SavedAdapter", "load_adapter", "read_adapter", "write_adapter"]

JSON_NAME = "meft_adapter.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """A read adapter. modules: name of the FFN of every layer. rows fp32 [r, 2 d] and routers fp32 [N, d] per layer."""

    config: ResolvedSparseAdapter
    model_class: str
    modules: list[str]
    rows: list[Tensor]
    routers: list[Tensor]


def write_adapter(directory: str | Path, model: nn.Module, routers: Mapping[str, Tensor] | None = None) -> Path:
    """Writes the adapter of ``model``; returns the path of the JSON. Raises ValueError when the model has none.

    ``routers`` by the names of their modules, as in ``find_adapters``, where the model's own are partitioned. Ranks
    that share rows must not write at the same time: call it on one of them.
    """
    adapters = find_adapters(model)
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no sparse adapter to save")
    directory = files.checked_folder(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for i, (module, adapter) in enumerate(adapters.items()):
        router = adapter.router.weight if routers is None else routers[module]
        tensors[f"layers.{i}.rows"] = adapter.rows.master.detach().float().cpu().contiguous()
        tensors[f"layers.{i}.router"] = router.detach().float().cpu().contiguous()
    # named by its content, which is known when it is written
    staged = directory / f".meft_adapter-{secrets.token_hex(8)}.tmp"
    try:
        with files.named(directory):
            files.write_new(staged, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
            found = files.fingerprint(staged)
            name = f"meft_adapter-{found['sha256'][:16]}.safetensors"
            file = directory / name
            was_there = file.exists()
            os.replace(staged, file)
    finally:
        staged.unlink(missing_ok=True)
    first = next(iter(adapters.values()))
    about = {
        "format": FORMAT,
        "method": "sparse_adapter",
        "model_class": type(model).__name__,
        "hidden_size": first.config.d,
        "config": asdict(first.config),
        "modules": list(adapters),
        "tensors": {"file": name, **found, "dtype": "float32"},
    }
    try:
        files.write_text(directory / JSON_NAME, json.dumps(about, indent=2) + "\n")
    except Exception:
        if not was_there:
            file.unlink()
        raise
    for old in directory.glob("meft_adapter-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)
    return directory / JSON_NAME


def read_adapter(directory: str | Path) -> SavedAdapter:
    """Reads and checks an adapter. Raises ValueError for anything missing, cut short, changed, or of another format."""
    path = Path(directory) / JSON_NAME
    try:
        about = files.parse_json(files.read_bytes(path))
        if about["format"] != FORMAT:
            raise ValueError(f"{path}: format {about['format']!r}, this version reads {FORMAT}; update meft-ds")
        config = _config(about["config"])
        modules, model_class, stored = about["modules"], about["model_class"], about["tensors"]
        file = path.parent / Path(stored["file"]).name
        size, digest = stored["bytes"], stored["sha256"]
    except ValidationError as fault:
        raise ValueError(f"{path} is damaged: {fault}") from None
    except FileNotFoundError:
        raise ValueError(f"{path} not found; save_adapter writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as fault:
        raise ValueError(f"{path} is damaged ({fault!r}); save the adapter again") from None
    try:
        found = files.fingerprint(file)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; copy the whole directory of the adapter") from None
    if found != {"bytes": size, "sha256": digest}:
        raise ValueError(f"{file} was cut short or changed: its size or SHA-256 is not the one in {JSON_NAME}")
    try:
        tensors = load_file(file)
    except SafetensorError as fault:
        raise ValueError(f"{file} cannot be read: {fault}") from None
    rows, routers = [], []
    for i in range(len(modules)):
        rows.append(_checked(tensors, f"layers.{i}.rows", (config.rows, 2 * config.d), file))
        routers.append(_checked(tensors, f"layers.{i}.router", (config.experts, config.d), file))
    return SavedAdapter(config=config, model_class=model_class, modules=modules, rows=rows, routers=routers)


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Puts a saved adapter into a plain model, for inference on the model's device and in its dtype; returns the model.

    Raises ValueError, and leaves the model as it was, when the files are damaged or belong to another architecture.
    """
    saved = read_adapter(directory)
    if find_adapters(model):
        raise ValueError(f"{type(model).__name__} already has sparse adapters; load into a fresh model")
    sites = _sites(model, saved)
    adapters = []
    for layer, site in enumerate(sites):
        like = next(p for p in site.module.parameters() if p.is_floating_point())
        rows = DeviceRows(saved.rows[layer].to(like.device, like.dtype))
        adapters.append(SparseAdapter(saved.config, saved.routers[layer].to(like.device, like.dtype), rows, layer))
    place(model, sites, adapters)
    return model


def _sites(model: nn.Module, saved: SavedAdapter) -> list[Site]:
    name = type(model).__name__
    if name != saved.model_class:
        raise ValueError(f"the adapter was trained in a {saved.model_class}, this model is a {name}")
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", saved.config.d)
    if width != saved.config.d:
        raise ValueError(f"the adapter has hidden size d = {saved.config.d}, this model has {width}")
    modules = dict(model.named_modules())
    missing = [module for module in saved.modules if module not in modules]
    if missing:
        raise ValueError(
            f"this model lacks {len(missing)} of the adapter's {len(saved.modules)} places, the first is {missing[0]}; "
            "load it into the architecture that it was trained in"
        )
    return [make_site(model, module, modules[module]) for module in saved.modules]


def _config(stored: dict[str, Any]) -> ResolvedSparseAdapter:
    """The resolved settings; pydantic checks the type of every field, and the dataclass the sizes."""
    known = {f.name for f in fields(ResolvedSparseAdapter)}
    if set(stored) != known:
        raise KeyError(f"config keys {sorted(set(stored) ^ known)}")
    return TypeAdapter(ResolvedSparseAdapter).validate_json(json.dumps(stored), strict=True)


def _checked(tensors: dict[str, Tensor], name: str, shape: tuple[int, int], file: Path) -> Tensor:
    t = tensors.get(name)
    if t is None or tuple(t.shape) != shape or t.dtype != torch.float32:
        found = "nothing" if t is None else f"{t.dtype} {tuple(t.shape)}"
        raise ValueError(f"{file}: {name} should be float32 {shape} by {JSON_NAME}, found {found}")
    return t
