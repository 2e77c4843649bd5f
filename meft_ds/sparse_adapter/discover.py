# SPDX-License-Identifier: Apache-2.0
"""Finds the feed-forward networks of a transformer, by the shape of its decoder layers or by the user's expressions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from meft_ds.offload.weights import shape_of

__all__ = ["Site", "find_ffns", "make_site"]

# What Hugging Face's decoder layers call their FFN or their mixture-of-experts block.
_FFN_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe")
# Towers of multimodal models, which are not the language model.
_OTHER_TOWERS = re.compile(r"(^|\.)(vision|visual|audio|image|speech)\w*(\.|$)")
_MOST_LISTED = 20


@dataclass(frozen=True, eq=False)
class Site:
    """A place for an adapter. ``pair``: ``module`` is a decoder layer whose FFN is its ``fc1`` ... ``fc2`` (OPT)."""

    name: str
    module: nn.Module
    d: int
    pair: bool = False


def find_ffns(model: nn.Module, target_modules: str | Sequence[str] | None = None) -> list[Site]:
    """Sites in the order of the layers.

    target_modules: regular expression(s) that the whole name of a module must match; None = look for decoder layers
    with an FFN (Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX ...), a mixture-of-experts block (the adapter goes
    beside the whole block), or fc1/fc2 of their own (OPT). Raises ValueError, with the names to choose from, when none
    is found.
    """
    patterns = [target_modules] if isinstance(target_modules, str) else target_modules
    sites = _discovered(model) if patterns is None else _matching(model, patterns)
    if not sites:
        told = "" if patterns is None else f" target_modules {list(patterns)} matches no whole module name."
        raise ValueError(
            f"no feed-forward network found in {type(model).__name__} for the sparse adapter.{told} Set "
            '"sparse_adapter": {"target_modules": ...} to a regular expression for whole module names; candidates: '
            + (", ".join(_candidates(model)) or "none, this model has no nested modules")
        )
    widths = {site.d: site.name for site in sites}
    if len(widths) > 1:
        listed = ", ".join(f"{name} has {d}" for d, name in widths.items())
        raise ValueError(f"FFNs of different input widths ({listed}); choose those of one width with target_modules")
    return sites


def _discovered(model: nn.Module) -> list[Site]:
    sites = []
    for list_name, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or _OTHER_TOWERS.search(list_name):
            continue
        for index, layer in layers.named_children():
            name = f"{list_name}.{index}" if list_name else index
            ffn = next((n for n in _FFN_NAMES if isinstance(getattr(layer, n, None), nn.Module)), None)
            if ffn is not None:
                sites.append(make_site(model, f"{name}.{ffn}", getattr(layer, ffn)))
            elif _is_pair(layer):
                sites.append(make_site(model, name, layer))
    return sites


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[Site]:
    sites: list[Site] = []
    for name, module in model.named_modules():
        if not name or not any(re.fullmatch(pattern, name) for pattern in patterns):
            continue
        outer = next((site.name for site in sites if name.startswith(site.name + ".")), None)
        if outer is not None:
            raise ValueError(
                f"target_modules {list(patterns)} matches {outer} and {name} inside it; an adapter goes beside a whole "
                "FFN, so let the expression end with the FFN's own name"
            )
        sites.append(make_site(model, name, module))
    return sites


def _is_pair(layer: nn.Module) -> bool:
    has_attention = any("attn" in n or "attention" in n for n, _ in layer.named_children())
    return has_attention and all(isinstance(getattr(layer, n, None), nn.Module) for n in ("fc1", "fc2"))


def make_site(model: nn.Module, name: str, module: nn.Module) -> Site:
    """The site for an adapter beside ``module``."""
    return Site(name, module, _input_width(model, name, module), _is_pair(module))


def _input_width(model: nn.Module, name: str, module: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    width = getattr(config, "hidden_size", None)
    if isinstance(width, int):
        return width
    for inner in module.modules():
        if isinstance(inner, nn.Linear):
            return inner.in_features
        weight = getattr(inner, "weight", None)
        if type(inner).__name__ == "Conv1D" and isinstance(weight, Tensor):
            return shape_of(weight)[0]
    raise ValueError(f"cannot tell the input width of {name}: the model has no config.hidden_size and it has no Linear")


def _candidates(model: nn.Module) -> list[str]:
    """Names of modules that hold at least two layers with weights, numbers as ``\\d+``, so that they can be copied."""
    names: dict[str, None] = {}
    for name, module in model.named_modules():
        weighted = sum(1 for child in module.children() if any(True for _ in child.parameters(recurse=False)))
        if name and weighted >= 2:
            names[re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", r"\\d+", name)] = None
    if not names:
        names = dict.fromkeys(name for name, _ in model.named_modules() if name)
    return list(names)[:_MOST_LISTED]
