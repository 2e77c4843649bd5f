# SPDX-License-Identifier: Apache-2.0
"""Finds the matrices to compress: weights of linear layers, and expert tensors of mixture-of-experts blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from meft_ds.offload.model.capture import can_tap
from meft_ds.offload.model.discover import Sharing, weights
from meft_ds.offload.model.heads import head_parameters, peft_layer, peft_parameters, vocabulary_parameters
from meft_ds.offload.model.weights import shape_of
from meft_ds.options import compiled
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
_OUTPUT, _PEFT = "is the output head", "is PEFT's"


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

    There may be none: what a program trains can be a head, or what PEFT added, alone.

    Raises:
        ValueError: when there are none and nothing trains, or none that `target_modules` or a whole `dim` asks for; or
        a pattern of `target_modules` matches no module name; with names to choose from.
    """
    sharing, small = Sharing(model), _SmallParts(model)
    patterns = None if config.target_modules is None else {p: compiled(p) for p in config.target_modules}
    unused = set(patterns or ())
    sites: list[Site] = []
    frozen: list[str] = []
    excluded: list[str] = []
    added: list[str] = []
    candidates = []
    unfit = False
    for name, module, key, weight in weights(model):
        candidates.append(name)
        if patterns is not None:
            matching = {p for p, pattern in patterns.items() if pattern.fullmatch(name)}
            unused -= matching
            if not matching:
                continue
        full = f"{name}.{key}" if name else key
        if not weight.requires_grad:
            (frozen if patterns is None else excluded).append(f"{full} is frozen")
            continue
        why = small.why(weight)
        if why == _PEFT and patterns is None:
            added.append(full)
            continue
        if why:
            # everybody knows of the output head; it is told of where a pattern asks for it by name
            (frozen if why == _OUTPUT and patterns is None else excluded).append(f"{full} {why}")
            continue
        if sharing.shares(module, weight):
            excluded.append(f"{full} is tied or used by several modules")
            continue
        d = config.dim_of(*shape_of(weight)[-2:])
        if d == 0:
            excluded.append(f"{full} {tuple(shape_of(weight))} is too small for subspace.dim {config.dim}")
            unfit = True
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
    if added:
        excluded.insert(0, f"{added[0]} {_PEFT}" + (f", as are {len(added) - 1} more" if len(added) > 1 else ""))
    if unused or (not sites and _was_asked_for(model, config, candidates, unfit)):
        told = f" target_modules {sorted(unused)} matches no whole module name." if unused else ""
        raise ValueError(
            f"no matrix of {type(model).__name__} to compress for the subspace method.{told}{_about_peft(model)} "
            f"Linear layers: {', '.join(candidates[:_MOST_LISTED]) or 'none'}. "
            + ("Left out: " + "; ".join([*excluded, *frozen][:_MOST_LISTED]) if excluded or frozen else "")
        )
    return sites, [*excluded, *frozen] if not sites else excluded


def _was_asked_for(model: nn.Module, config: SubspaceConfig, candidates: list[str], unfit: bool) -> bool:
    """Whether a model without a matrix to compress is a mistake; else only something small trains, and may do so."""
    asked = config.target_modules is not None or (unfit and isinstance(config.dim, int))
    return asked or not candidates or not any(p.requires_grad for p in model.parameters())


def _about_peft(model: nn.Module) -> str:
    adapted = peft_layer(model)
    if adapted is None:
        return ""
    return (
        f" PEFT has frozen the base ({adapted} is a PEFT layer), and what it added trains uncompressed: pass the base, "
        "unfrozen (merge_and_unload().requires_grad_(True) keeps what an adapter has learned), or take target_modules "
        "or subspace out of the meft_offload block."
    )


class _SmallParts:
    """What is made for one task and small beside the base, so that compressing it costs much and saves nothing."""

    def __init__(self, model: nn.Module) -> None:
        self._why = dict.fromkeys(head_parameters(model), "is a head")
        self._why |= dict.fromkeys(vocabulary_parameters(model), _OUTPUT)
        self._why |= dict.fromkeys(peft_parameters(model), _PEFT)

    def why(self, weight: nn.Parameter) -> str:
        """Why `weight` stays uncompressed; "" if it is none of them."""
        return self._why.get(id(weight), "")


def _shares(name: str, weight: nn.Parameter, d: int) -> str:
    parent, _, own = name.rpartition(".")
    for group in _SHARE_INPUT:
        if own in group:
            return f"{parent}.{'+'.join(group)}[{shape_of(weight)[1]}->{d}]"
    return name
