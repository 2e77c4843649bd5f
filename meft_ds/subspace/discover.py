# SPDX-License-Identifier: Apache-2.0
"""Finds the matrices to compress: weights of linear layers, and expert tensors of mixture-of-experts blocks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from meft_ds.subspace.config import SubspaceConfig
from meft_ds.subspace.linear import can_tap

# Siblings that read the same tensor in the models of Hugging Face: they share the sketch of it, and so its projector.
_SHARE_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
_MOST_LISTED = 20


@dataclass(frozen=True, eq=False)
class Site:
    """A weight to compress.

    Attributes:
        name: of the parameter.
        module: that holds it.
        weight: [m, n], or [experts, m, n].
        d: side of S.
        input_first: the weight is [in, out], as in GPT-2's Conv1D.
        tapped: S can be computed from the module's input and output gradient.
        shares: sites with an equal key read the same input.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    d: int
    input_first: bool
    tapped: bool
    shares: str


def find_matrices(model: nn.Module, config: SubspaceConfig) -> tuple[list[Site], list[str]]:
    """Trainable matrices in the order of the model's parameters, and why others stay uncompressed, one line each.

    Raises:
        ValueError: when there are none, or a pattern of `target_modules` matches no module name; with names to choose
        from.
    """
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    times_named = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    embeddings = {id(m) for m in (_output_embeddings(model),) if m is not None}
    patterns = None if config.target_modules is None else {p: re.compile(p) for p in config.target_modules}
    unused = set(patterns or ())
    sites: list[Site] = []
    frozen, excluded, candidates = [], [], []
    for name, module, key, weight in _weights(model):
        candidates.append(name)
        if patterns is not None:
            matching = {p for p, compiled in patterns.items() if compiled.fullmatch(name)}
            unused -= matching
            if not matching:
                continue
        full = f"{name}.{key}" if name else key
        if not weight.requires_grad or id(module) in embeddings:
            why = "is the output head" if id(module) in embeddings else "is frozen"
            frozen.append(f"{full} {why}")
            continue
        if holders[id(weight)] > 1 or times_named[id(module)] > 1:
            excluded.append(f"{full} is tied or used by several modules")
            continue
        d = config.dim_of(*weight.shape[-2:])
        if d == 0:
            excluded.append(f"{full} {tuple(weight.shape)} is too small for subspace.dim {config.dim}")
            continue
        linear = weight.dim() == 2
        site = Site(
            name=full,
            module=module,
            weight=weight,
            d=d,
            input_first=linear and not isinstance(module, nn.Linear),
            tapped=linear and config.gradient_side == "activation" and can_tap(module),
            shares=_shares(name, weight, d) if isinstance(module, nn.Linear) else full,
        )
        sites.append(site)
    if unused or not sites:
        told = f" target_modules {sorted(unused)} matches no whole module name." if unused else ""
        listed = ", ".join(candidates[:_MOST_LISTED]) or "none"
        raise ValueError(
            f"no matrix of {type(model).__name__} to compress for the subspace method.{told} Linear layers: {listed}. "
            + ("Left out: " + "; ".join([*excluded, *frozen][:_MOST_LISTED]) if excluded or frozen else "")
        )
    return sites, excluded


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D) and "weight" in module._parameters:  # else weight norm computes it
            yield name, module, "weight", module.weight  # type: ignore[misc]
        elif not isinstance(module, nn.modules.conv._ConvNd):
            for key, p in module._parameters.items():
                if p is not None and p.dim() == 3 and min(p.shape[-2:]) > 1:
                    yield name, module, key, p  # type: ignore[misc]


def _shares(name: str, weight: nn.Parameter, d: int) -> str:
    parent, _, own = name.rpartition(".")
    for group in _SHARE_INPUT:
        if own in group:
            return f"{parent}.{'+'.join(group)}[{weight.shape[1]}->{d}]"
    return name


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        found = getter() if getter is not None else None
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None
