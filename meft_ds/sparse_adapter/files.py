# SPDX-License-Identifier: Apache-2.0
"""An adapter on disk, and back into a plain model on one device for inference.

``meft_adapter.json`` says what the adapter is (``layout.About``) and names the tensor file with its size and SHA-256;
``meft_adapter-<hash>.safetensors`` holds fp32 ``layers.<i>.rows`` [r, 2 d] (key || value) and ``layers.<i>.router``
[N, d], and ``base.<name>`` for each tensor of the base that was trained beside the adapter, as the model has it. The
tensor file is named by its content and the JSON is replaced last, so a directory always holds one complete adapter.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from meft_ds import files
from meft_ds.sparse_adapter.attach import ADAPTER_NAME, find_adapters, place
from meft_ds.sparse_adapter.base import check_fits, remember, take_over, trained_in
from meft_ds.sparse_adapter.config import ResolvedSparseAdapter
from meft_ds.sparse_adapter.discover import Site, make_site
from meft_ds.sparse_adapter.layer import SparseAdapter
from meft_ds.sparse_adapter.layout import FORMAT, JSON_NAME, About, TensorFile, read_about, text_of
from meft_ds.sparse_adapter.rows.source import DeviceRows

__all__ = [
    "FORMAT",
    "JSON_NAME",
    "SavedAdapter",
    "load_adapter",
    "needed_from",
    "publish",
    "read_adapter",
    "write_adapter",
]

_logger = logging.getLogger("meft_ds")


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """A read adapter.

    modules: name of the FFN of every layer. rows fp32 [r, 2 d] and routers fp32 [N, d] per layer. base: tensors of the
    base that were trained with it, by name. elsewhere: methods that trained more of the base.
    """

    config: ResolvedSparseAdapter
    model_class: str
    modules: list[str]
    rows: list[Tensor]
    routers: list[Tensor]
    base: dict[str, Tensor]
    elsewhere: list[str]


def needed_from(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that ``write_adapter`` writes, by name: routers, and what was trained of the base."""
    named = dict(model.named_parameters(remove_duplicate=False))
    routers = [f"{module}.{ADAPTER_NAME}.router.weight" for module in find_adapters(model)]
    return {name: named[name] for name in [*routers, *trained_in(model).names] if name in named}


def write_adapter(directory: str | Path, model: nn.Module, state: Mapping[str, Tensor] | None = None) -> Path:
    """Write the adapter of ``model``; return the path of the JSON. Raises ValueError when the model has none.

    ``state`` has the whole tensors of ``needed_from`` where the model's own are partitioned. Ranks that share rows must
    not write at the same time: call it on one of them.
    """
    adapters = find_adapters(model)
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no sparse adapter to save")
    directory = files.checked_folder(directory)
    directory.mkdir(parents=True, exist_ok=True)
    given: Mapping[str, Tensor] = needed_from(model) if state is None else state
    trained = trained_in(model)
    base = [name for name in trained.names if name in needed_from(model)]
    tensors: dict[str, Tensor] = {}
    for i, (module, adapter) in enumerate(adapters.items()):
        router = given[f"{module}.{ADAPTER_NAME}.router.weight"]
        tensors[f"layers.{i}.rows"] = adapter.rows.master.detach().float().cpu().contiguous()
        tensors[f"layers.{i}.router"] = router.detach().float().cpu().contiguous()
    for name in base:
        tensors[f"base.{name}"] = given[name].detach().cpu().clone().contiguous()
    return publish(
        directory,
        lambda path: save_file(tensors, path, metadata={"format": "pt"}),
        model_class=type(model).__name__,
        config=next(iter(adapters.values())).config,
        modules=list(adapters),
        base=base,
        elsewhere=list(trained.elsewhere),
    )


def publish(directory: Path, write: Callable[[Path], Any], **about: Any) -> Path:
    """Let ``write`` write the tensor file, then write the JSON and remove what was there; return the JSON's path.

    ``about``: the fields of ``layout.About`` but ``tensors``.
    """
    # named by its content, which is known when it is written
    staged = directory / f".meft_adapter-{secrets.token_hex(8)}.tmp"
    try:
        with files.named(directory):
            files.write_new(staged, write)
            found = files.fingerprint(staged)
            name = f"meft_adapter-{found['sha256'][:16]}.safetensors"
            file = directory / name
            was_there = file.exists()
            os.replace(staged, file)
    finally:
        staged.unlink(missing_ok=True)
    try:
        files.write_text(directory / JSON_NAME, text_of(About(**about, tensors=TensorFile(file=name, **found))))
    except Exception:
        if not was_there:
            file.unlink()
        raise
    for old in directory.glob("meft_adapter-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)
    return directory / JSON_NAME


def read_adapter(directory: str | Path) -> SavedAdapter:
    """Read and check an adapter. Raises ValueError for anything missing, cut short, changed, or of another format."""
    path = files.checked_folder(directory) / JSON_NAME
    about = read_about(path)
    config, file = about.config, path.parent / about.tensors.file
    try:
        found = files.fingerprint(file)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; copy the whole directory of the adapter") from None
    except OSError as fault:
        raise ValueError(f"{file} cannot be read: {fault.strerror or fault}; make it readable") from None
    if found != {"bytes": about.tensors.bytes, "sha256": about.tensors.sha256}:
        raise ValueError(
            f"{file} was cut short or changed: its size or SHA-256 is not the one in {JSON_NAME}; copy or save the "
            "adapter again"
        )
    try:
        tensors = load_file(file)
    except SafetensorError as fault:
        raise ValueError(f"{file} cannot be read: {fault}; save the adapter again") from None
    rows, routers, base = [], [], {}
    for i in range(len(about.modules)):
        rows.append(_checked(tensors, f"layers.{i}.rows", (config.rows, 2 * config.d), file))
        routers.append(_checked(tensors, f"layers.{i}.router", (config.experts, config.d), file))
    for name in about.base:
        if f"base.{name}" not in tensors:
            raise ValueError(f"{file}: base.{name} is missing, which {JSON_NAME} names; save the adapter again")
        base[name] = tensors[f"base.{name}"]
    if len(tensors) != 2 * len(rows) + len(base):
        raise ValueError(f"{file} has tensors that {JSON_NAME} does not name; save the adapter again")
    return SavedAdapter(
        config=config,
        model_class=about.model_class,
        modules=about.modules,
        rows=rows,
        routers=routers,
        base=base,
        elsewhere=about.elsewhere,
    )


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Put a saved adapter into a plain model, for inference on its device and in its dtype, and return the model.

    Tensors of the base that were trained with the adapter (heads, LoRA, what "train" named) get their trained values.
    A new engine on the model goes on training what was loaded.

    Args:
        model: of the class that the adapter was trained in, without adapters.
        directory: that `save_adapter`, `save_pretrained` or Trainer's `save_model` wrote.

    Raises:
        ValueError: when the files are damaged or belong to another architecture. The model is then as it was.

    Example:
        model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.bfloat16)
        model = meft_ds.load_adapter(model, "adapter")
        model.generate(**tokenizer("Hello", return_tensors="pt"))
    """
    saved = read_adapter(directory)
    if find_adapters(model):
        raise ValueError(f"{type(model).__name__} already has sparse adapters; load into a fresh model")
    sites = _sites(model, saved)
    params = check_fits(model, saved.base)
    adapters = []
    for layer, site in enumerate(sites):
        like = next(p for p in site.module.parameters() if p.is_floating_point())
        rows = DeviceRows(saved.rows[layer].to(like.device, like.dtype))
        adapters.append(SparseAdapter(saved.config, saved.routers[layer].to(like.device, like.dtype), rows, layer))
    place(model, sites, adapters)
    take_over(params, saved.base)
    remember(model, saved.base, saved.elsewhere)
    if saved.elsewhere:
        _logger.warning(
            "%s trained the base that the adapter in %s was saved with, and that is not in its file; load the "
            "adapter into what save_pretrained wrote, or apply the tiles first",
            " and ".join(saved.elsewhere),
            directory,
        )
    return model


def _sites(model: nn.Module, saved: SavedAdapter) -> list[Site]:
    name = type(model).__name__
    if name != saved.model_class:
        raise ValueError(f"the adapter was trained in a {saved.model_class}, this model is a {name}")
    modules = dict(model.named_modules())
    missing = [module for module in saved.modules if module not in modules]
    if missing:
        raise ValueError(
            f"this model lacks {len(missing)} of the adapter's {len(saved.modules)} places, the first is {missing[0]}; "
            "load it into the architecture that it was trained in"
        )
    sites = [make_site(model, module, modules[module]) for module in saved.modules]
    for site in sites:
        if site.d != saved.config.d:
            raise ValueError(
                f"the adapter has hidden size d = {saved.config.d}, {site.name} of this model has {site.d}"
            )
    return sites


def _checked(tensors: dict[str, Tensor], name: str, shape: tuple[int, int], file: Path) -> Tensor:
    t = tensors.get(name)
    if t is None or tuple(t.shape) != shape or t.dtype != torch.float32:
        found = "nothing" if t is None else f"{t.dtype} {tuple(t.shape)}"
        raise ValueError(f"{file}: {name} should be float32 {shape} by {JSON_NAME}, found {found}")
    if not torch.isfinite(t).all():
        raise ValueError(f"{file}: {name} holds NaN or infinite values; save the adapter of an earlier checkpoint")
    return t
