# SPDX-License-Identifier: Apache-2.0
"""Finds the matrices to compress: weights of linear layers, and expert tensors of mixture-of-experts blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from meft_ds.offload.matrices import Sharing, output_heads, weights
from meft_ds.offload.taps import can_tap
from meft_ds.offload.weights import shape_of
from meft_ds.subspace.config import SubspaceConfig

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
    sharing, heads = Sharing(model), output_heads(model)
    patterns = None if config.target_modules is None else {p: re.compile(p) for p in config.target_modules}
    unused = set(patterns or ())
    sites: list[Site] = []
    frozen: list[str] = []
    excluded: list[str] = []
    candidates = []
    for name, module, key, weight in weights(model):
        candidates.append(name)
        if patterns is not None:
            matching = {p for p, compiled in patterns.items() if compiled.fullmatch(name)}
            unused -= matching
            if not matching:
                continue
        full = f"{name}.{key}" if name else key
        if not weight.requires_grad or module in heads:
            why = "is the output head" if module in heads else "is frozen"
            (frozen if patterns is None else excluded).append(f"{full} {why}")
            continue
        if sharing.shares(module, weight):
            excluded.append(f"{full} is tied or used by several modules")
            continue
        d = config.dim_of(*shape_of(weight)[-2:])
        if d == 0:
            excluded.append(f"{full} {tuple(shape_of(weight))} is too small for subspace.dim {config.dim}")
            continue
        linear = len(shape_of(weight)) == 2
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


def _shares(name: str, weight: nn.Parameter, d: int) -> str:
    parent, _, own = name.rpartition(".")
    for group in _SHARE_INPUT:
        if own in group:
            return f"{parent}.{'+'.join(group)}[{shape_of(weight)[1]}->{d}]"
    return name
