# SPDX-License-Identifier: Apache-2.0
"""Finds the feed-forward networks of a transformer, by the shape of its layers or by the user's expressions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from meft_ds.options import compiled
from meft_ds.sparse_adapter.widths import Widths, widths_of

__all__ = ["Site", "find_ffns", "make_site"]

# What Hugging Face's layers call their FFN or their mixture-of-experts block.
_FFN_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe", "DenseReluDense", "ff", "mlp_block")
# What layers call the first and the last linear layer of an FFN that is no module of its own (OPT, BART, Whisper; BERT
# and its like; ALBERT; torch's own layers).
_PAIRS = (
    ("fc1", "fc2"),
    ("intermediate.dense", "output.dense"),
    ("ffn", "ffn_output"),
    ("linear1", "linear2"),
    ("lin1", "lin2"),
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# Towers of multimodal models, which are not the language model.
_OTHER_TOWERS = re.compile(r"(^|\.)(vision|visual|audio|image|speech)\w*(\.|$)")
_MOST_LISTED = 20


@dataclass(frozen=True, eq=False)
class Site:
    """A place for an adapter, which becomes a submodule of ``module``.

    It reads what ``first`` reads, d wide, and its output is added to that of ``last``. Both are names inside
    ``module``: "" is ``module`` itself, an FFN; else ``module`` is a layer whose FFN is no module of its own.
    """

    name: str
    module: nn.Module
    d: int
    first: str = ""
    last: str = ""

    @property
    def pair(self) -> bool:
        """Whether the FFN is no module of its own."""
        return bool(self.first)

    @property
    def reads(self) -> str:
        """Name of the module whose input the adapter reads."""
        return f"{self.name}.{self.first}" if self.first else self.name


def find_ffns(model: nn.Module, target_modules: str | Sequence[str] | None = None) -> list[Site]:
    """Return the sites in the order of the layers.

    target_modules: regular expression(s) that the whole name of a module must match; None = look for layers with an
    FFN (Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX, T5 ...), a mixture-of-experts block (the adapter goes
    beside the whole block), or the FFN's linear layers (OPT, BART, BERT, ALBERT ...). Towers for pictures and sound
    are passed over unless there is nothing else. Raises ValueError, with the names to choose from, when none is found,
    and when something that is matched is no FFN.
    """
    patterns = [target_modules] if isinstance(target_modules, str) else target_modules
    sites = _discovered(model) if patterns is None else _matching(model, patterns)
    if not sites:
        told = "" if patterns is None else f" target_modules {list(patterns)} matches no whole module name."
        raise ValueError(
            f"no feed-forward network found in {type(model).__name__} for the sparse adapter.{told} Set "
            '"sparse_adapter": {"target_modules": ...} to a regular expression for whole module names; candidates: '
            + _candidates(model)
        )
    widths = {site.d: site.name for site in sites}
    if len(widths) > 1:
        listed = ", ".join(f"{name} has {d}" for d, name in widths.items())
        raise ValueError(f"FFNs of different input widths ({listed}); choose those of one width with target_modules")
    return sites


def make_site(model: nn.Module, name: str, module: nn.Module) -> Site:
    """Return the site for an adapter beside ``module``. Raises ValueError, saying why, when it is no FFN."""
    why, site = _looked_at(model, name, module)
    if site is None:
        raise ValueError(f"{name} ({type(module).__name__}) is no feed-forward network: {why}")
    return site


def _discovered(model: nn.Module) -> list[Site]:
    sites: list[Site] = []
    for site in _in_layers(model):
        if not any(site.name.startswith(outer.name + ".") for outer in sites if not outer.pair):
            sites.append(site)
    language = [site for site in sites if not _OTHER_TOWERS.search(site.name)]
    return language or sites


def _in_layers(model: nn.Module) -> Iterator[Site]:
    for list_name, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList | nn.Sequential):
            continue
        for index, layer in layers.named_children():
            name = f"{list_name}.{index}" if list_name else index
            ffn = next((n for n in _FFN_NAMES if isinstance(getattr(layer, n, None), nn.Module)), None)
            places = [(name, layer)] if ffn is None else [(f"{name}.{ffn}", getattr(layer, ffn)), (name, layer)]
            site = next((site for place in places if (site := _looked_at(model, *place)[1]) is not None), None)
            if site is not None and (site.pair or ffn is not None):
                yield site


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[Site]:
    sites: list[Site] = []
    for name, module in model.named_modules():
        if not name or not any(compiled(pattern).fullmatch(name) for pattern in patterns):
            continue
        outer = next((site.name for site in sites if name.startswith(site.name + ".")), None)
        if outer is not None:
            raise ValueError(
                f"target_modules {list(patterns)} matches {outer} and {name} inside it; an adapter goes beside a whole "
                "FFN, so let the expression end with the FFN's own name"
            )
        why, site = _looked_at(model, name, module)
        if site is None:
            raise ValueError(
                f"sparse_adapter.target_modules {list(patterns)} matches {name} ({type(module).__name__}), which is no "
                f"feed-forward network: {why}. Names that would do: {_candidates(model)}"
            )
        sites.append(site)
    return sites


def _looked_at(model: nn.Module, name: str, module: nn.Module) -> tuple[str, Site | None]:
    """Return the site at ``module``, or why there is none."""
    attention = next((n for n, child in module.named_modules() if n and _is_attention(n, child)), None)
    for first, last in _pairs(module):
        if attention is not None or "." in first:
            ends = widths_of(_inside(module, first)), widths_of(_inside(module, last))
            d = _common(model, f"{name}.{first}", *ends)
            if d is not None:
                return "", Site(name, module, d, first, last)
    if attention is not None:
        return f"there is attention in it ({attention})", None
    if _is_attention(name, module):
        return "it is attention", None
    if any(isinstance(inner, nn.Embedding) for inner in module.modules()):
        return "there are embeddings in it", None
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return "it only lists modules and is never called", None
    if isinstance(module, nn.Sequential):
        return "nn.Sequential would run the adapter as one more of its steps; make it a module with a forward", None
    widths = widths_of(module)
    if widths.weights < 2:
        told = f"a single linear layer from {widths.read[0]} to {widths.written[0]} values" if widths.weights else None
        return f"it is {told}" if told else "it has no linear layers", None
    d = _common(model, name, widths, widths)
    if d is None:
        read, written = sorted(set(widths.read)), sorted(set(widths.left or widths.written))
        return f"its output is not as wide as its input (it reads {read} and writes {written} values)", None
    return "", Site(name, module, d)


def _pairs(layer: nn.Module) -> Iterator[tuple[str, str]]:
    for first, last in _PAIRS:
        if _inside(layer, first) is not None and _inside(layer, last) is not None:
            yield first, last
    # A sequence cannot hold an adapter, but the layer around it can.
    for name, child in layer.named_children():
        if name in _FFN_NAMES and isinstance(child, nn.Sequential):
            linear = [n for n, step in child.named_children() if widths_of(step).weights == 1]
            if len(linear) >= 2:
                yield f"{name}.{linear[0]}", f"{name}.{linear[-1]}"


def _common(model: nn.Module, name: str, first: Widths, last: Widths) -> int | None:
    """Return the width that ``first`` reads and ``last`` writes; if sides are unclear, the one that a config names."""
    both = [d for d in first.read if d in last.written and set(last.left) <= {d}]
    if len(both) < 2:
        return both[0] if both else None
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        config: Any = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        for of in (config, _text_config(config)):
            size = getattr(of, "hidden_size", None)
            if size in both:
                return int(size)
    return both[0]


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):  # several, or none
        return None


def _is_attention(name: str, module: nn.Module) -> bool:
    """Tell it by its name or class; what only prepares or follows attention has no two linear layers."""
    last = name.rpartition(".")[2]
    return bool(_ATTENTION.search(last) or _ATTENTION.search(type(module).__name__)) and widths_of(module).weights >= 2


def _inside(module: nn.Module | None, path: str) -> nn.Module | None:
    for part in path.split("."):
        module = getattr(module, part, None)
    return module if isinstance(module, nn.Module) else None


def _candidates(model: nn.Module) -> str:
    """Return names that would do, numbers as ``\\d+``, so that they can be copied; or why those here would not."""
    found = [site.name for site in _in_layers(model)]
    faults: dict[str, str] = {}
    if not found:
        for name, module in model.named_modules():
            if name and not any(name.startswith(outer + ".") for outer in found):
                why, site = _looked_at(model, name, module)
                if site is None:
                    faults[_copied(name)] = why
                else:
                    found.append(name)
    names = dict.fromkeys(name if _copied(name) in faults else _copied(name) for name in found)
    if names:
        return ", ".join(list(names)[:_MOST_LISTED])
    return "none; " + "; ".join(f"{name}: {why}" for name, why in list(faults.items())[:_MOST_LISTED])


def _copied(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", r"\\d+", name)
