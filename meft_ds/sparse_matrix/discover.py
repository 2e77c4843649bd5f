# SPDX-License-Identifier: Apache-2.0
"""Finds the weights that may have tiles, and cuts each into a grid of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meft_ds.offload.model.capture import can_tap
from meft_ds.offload.model.discover import Search, first_number, output_heads, weights, whole_name
from meft_ds.offload.model.heads import peft_layer
from meft_ds.offload.model.weights import numel_of, shape_of
from meft_ds.options import listed
from meft_ds.sparse_matrix.config import SparseMatrixConfig
from meft_ds.sparse_matrix.roles import input_first, names_of_parts, parts_of


@dataclass(frozen=True, eq=False)
class Site:
    """A weight that may have tiles.

    Attributes:
        name: of the parameter.
        module: that holds it.
        weight: [m, n], or [experts, m, n].
        input_first: stored [in, out] rather than [out, in], as in GPT-2's Conv1D and some expert tensors.
        tapped: a linear layer whose input and output gradient can be had.
        rows, cols: [low, high) of each row and column of the grid. None along the output dimension spans two parts of
            a fused weight; those at the end of a part are smaller.
        roles: of each cut of the output dimension, so one per row, or one per column with `input_first`.
        layer: first number in the name.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    input_first: bool
    tapped: bool
    rows: tuple[tuple[int, int], ...]
    cols: tuple[tuple[int, int], ...]
    roles: tuple[str, ...]
    layer: int | None

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight, also where it is partitioned."""
        return shape_of(self.weight)

    @property
    def experts(self) -> int:
        """Number of matrices in the weight."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def grid(self) -> tuple[int, int, int]:
        """Experts, rows and columns of tiles: the shape of the site's scores."""
        return self.experts, len(self.rows), len(self.cols)

    @property
    def side(self) -> int:
        """Side of its largest tile."""
        return max(high - low for cuts in (self.rows, self.cols) for low, high in cuts)

    def role(self, r: int, c: int) -> str:
        """Return the role of the tile in row r and column c of the grid."""
        return self.roles[c if self.input_first else r]


def find_sites(model: nn.Module, config: SparseMatrixConfig) -> tuple[list[Site], list[str]]:
    """Return the weights that may have tiles, in the order of the model's parameters, and lines about others.

    There is a line for each weight that may not have tiles although it looks like it, and for each whose parts are not
    known. There is none for what `config` rules out by name or by role. Frozen weights and the output head have one
    only where `target_modules` asks for them.

    Raises:
        ValueError: when there are none; when the model has PEFT layers; when a pattern of `target_modules` or
        `segments`, or a role of `budget`, belongs to no weight; when the sizes of `segments` do not add up.
    """
    _refuse_peft(model)
    head = "is the output head"
    unfit = {id(p): head for module in output_heads(model) for p in module.parameters(recurse=False)}
    search = Search(model, config.target_modules, unfit, expected=("is frozen", head))
    sites: list[Site] = []
    found_roles: set[str] = set()
    for name, module, key, weight in search:
        site, unknown = _cut(model, name, module, key, weight, config)
        found_roles.update(site.roles)
        if config.roles is None or set(config.roles).intersection(site.roles):
            sites.append(site)
            if unknown:
                search.told.append(f"{site.name} counts as one matrix: {unknown}; sparse_matrix.segments can say")
    _refuse_idle(model, config, found_roles, search)
    if search.unused or not sites:
        roles = f" Roles: {', '.join(sorted(found_roles))}." if found_roles and not sites else ""
        raise search.fault("to have tiles for the sparse_matrix method", roles)
    return sites, search.told


def narrow(sites: Sequence[Site], groups: Sequence[dict[str, Any]]) -> tuple[list[Site], dict[str, str]]:
    """Return the sites that a run can train tiles of, and why it cannot of the others, by name.

    `groups` are the optimizer's parameter groups.
    """
    grouped = {id(p) for group in groups for p in group["params"]}
    kept, elsewhere = [], {}
    for site in sites:
        if site.weight.requires_grad:  # the base is frozen by now, all but this
            elsewhere[site.name] = "trains whole (meft_offload.train)"
        elif id(site.weight) not in grouped:
            elsewhere[site.name] = "belongs to no parameter group of the optimizer"
        else:
            kept.append(site)
    return kept, elsewhere


def check_roles(sites: Sequence[Site], config: SparseMatrixConfig, left_out: Sequence[str]) -> None:
    """Refuse a budget of which some share has no weight.

    Raises:
        ValueError: when there are no sites, or none of a role that `budget` names.
    """
    if not sites:
        raise ValueError(
            f"sparse_matrix has no weight left to choose tiles in: {listed(left_out)}. Remove patterns from "
            "meft_offload.train, or hand the base's weights to the optimizer"
        )
    idle = set(config.roles or ()) - {role for site in sites for role in site.roles}
    if idle and isinstance(config.budget, dict):
        raise ValueError(
            f"sparse_matrix.budget gives {', '.join(sorted(idle))} a share, but no weight of that role may have tiles: "
            f"{listed(left_out)}. Take it out of budget"
        )


def elements_of_2d_weights(model: nn.Module) -> int:
    """Return the elements of all matrices of the model, which `density` is a fraction of.

    Embeddings, the head and expert tensors count too, tied weights once.
    """
    matrices = {
        id(p): numel_of(p) for n, p in model.named_parameters() if len(shape_of(p)) == 2 and not n.endswith("bias")
    }
    matrices.update((id(weight), numel_of(weight)) for _, _, _, weight in weights(model))
    return sum(matrices.values())


def _cut(
    model: nn.Module,
    name: str,
    module: nn.Module,
    key: str,
    weight: nn.Parameter,
    config: SparseMatrixConfig,
) -> tuple[Site, str]:
    """Return the weight's site, and what is not known about its parts."""
    full, shape, given = whole_name(name, key), shape_of(weight), _segments(config, name, key, weight)
    linear = len(shape) == 2
    above, _, last = name.rpartition(".")
    if linear:
        holder, first, own = model.get_submodule(above), not isinstance(module, nn.Linear), name
    else:
        first = input_first(model, module, last if key == "weight" else key, tuple(shape))
        holder, own = module, full.removesuffix(".weight")
    inputs, out = shape[-2:] if first else reversed(shape[-2:])
    if given is None:
        parts, unknown = parts_of(model, own, holder, out, inputs)
    else:
        pattern, sizes = given
        if sum(sizes) != out:
            raise ValueError(
                f"sparse_matrix.segments {pattern!r}: sizes {sizes} sum to {sum(sizes)}, but {own} has an output "
                f"dimension of {out}; give the sizes of its parts in the order in which they are stored"
            )
        parts, unknown = list(zip(sizes, names_of_parts(own, len(sizes)), strict=True)), ""
    side = config.side_of(out * inputs, [role for _, role in parts])
    outer, roles = _cuts(parts, side)
    inner, _ = _cuts([(inputs, "")], side)
    return Site(
        name=full,
        module=module,
        weight=weight,
        input_first=first,
        tapped=linear and can_tap(module),
        rows=inner if first else outer,
        cols=outer if first else inner,
        roles=roles,
        layer=first_number(full),
    ), unknown


def _cuts(parts: list[tuple[int, str]], side: int) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    cuts, roles, start = [], [], 0
    for size, role in parts:
        for low in range(start, start + size, side):
            cuts.append((low, min(low + side, start + size)))
            roles.append(role)
        start += size
    return tuple(cuts), tuple(roles)


def _refuse_peft(model: nn.Module) -> None:
    """Refuse a model with PEFT layers: it is frozen but for PEFT's own matrices."""
    adapted = peft_layer(model)
    if adapted is not None:
        raise ValueError(
            f"sparse_matrix chooses among the weights of the base, but PEFT has frozen them ({adapted} is a PEFT "
            "layer); pass the base, unfrozen (merge_and_unload().requires_grad_(True) keeps what an adapter has "
            "learned), or take sparse_matrix out of the meft_offload block"
        )


def _segments(config: SparseMatrixConfig, name: str, key: str, weight: nn.Parameter) -> tuple[str, list[int]] | None:
    """Return the user's segments of a weight: of a linear layer by its name, of expert tensors by the parameter's."""
    return config.segments_of(name if len(shape_of(weight)) == 2 else whole_name(name, key))


def _refuse_idle(model: nn.Module, config: SparseMatrixConfig, found_roles: set[str], search: Search) -> None:
    segments = set(config.segments)
    for name, _, key, weight in weights(model) if segments else ():
        if (given := _segments(config, name, key, weight)) is not None:
            segments.discard(given[0])
    if segments:
        raise ValueError(
            f"sparse_matrix.segments {sorted(segments)} matches no whole module name (of an expert tensor: parameter "
            f"name). Linear layers: {search.listed_modules}"
        )
    missing = set(config.budget) - found_roles if isinstance(config.budget, dict) else set()
    if missing and found_roles:
        raise ValueError(
            f"sparse_matrix.budget: no matrix has role {', '.join(sorted(missing))}; roles of this model: "
            f"{', '.join(sorted(found_roles))}"
        )
