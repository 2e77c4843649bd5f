# SPDX-License-Identifier: Apache-2.0
"""Finds the matrices to compress: weights of linear layers, and expert tensors of mixture-of-experts blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from meft_ds.offload.model.capture import can_tap
from meft_ds.offload.model.discover import Search, whole_name
from meft_ds.offload.model.heads import head_parameters, peft_layer, peft_parameters, vocabulary_parameters
from meft_ds.offload.model.weights import shape_of
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
# What is made for one task and small beside the base: compressing it costs much and saves nothing.
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
    unfit = dict.fromkeys(head_parameters(model), "is a head")
    unfit |= dict.fromkeys(vocabulary_parameters(model), _OUTPUT) | dict.fromkeys(peft_parameters(model), _PEFT)
    # everybody knows of the output head, and what PEFT added is told of in one line
    search = Search(model, config.target_modules, unfit, expected=("is frozen", _OUTPUT, _PEFT))
    sites: list[Site] = []
    unfit_dim = False
    for name, module, key, weight in search:
        full = whole_name(name, key)
        d = config.dim_of(*shape_of(weight)[-2:])
        if d == 0:
            search.told.append(f"{full} {tuple(shape_of(weight))} is too small for subspace.dim {config.dim}")
            unfit_dim = True
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
    added = [line for line in search.untold if line.endswith(_PEFT)]
    search.untold = [line for line in search.untold if not line.endswith(_PEFT)]
    if added:
        search.told.insert(0, added[0] + (f", as are {len(added) - 1} more" if len(added) > 1 else ""))
    if search.unused or (not sites and _was_asked_for(model, config, search.modules, unfit_dim)):
        raise search.fault("to compress for the subspace method", _about_peft(model))
    return sites, search.told if sites else [*search.told, *search.untold]


def _was_asked_for(model: nn.Module, config: SubspaceConfig, candidates: list[str], unfit: bool) -> bool:
    """Return whether a model without a matrix to compress is a mistake; if not, only something small trains."""
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


def _shares(name: str, weight: nn.Parameter, d: int) -> str:
    parent, _, own = name.rpartition(".")
    for group in _SHARE_INPUT:
        if own in group:
            return f"{parent}.{'+'.join(group)}[{shape_of(weight)[1]}->{d}]"
    return name
