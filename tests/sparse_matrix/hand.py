# SPDX-License-Identifier: Apache-2.0
"""Sparse matrix tuning without DeepSpeed: scores and units of a model, and what both must be, by brute force."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meft_ds.offload import update_gates
from meft_ds.offload.model.gradient_checkpointing import feed_checkpoints
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.window import StepSettings
from meft_ds.ops.adam import AdamHyper
from meft_ds.sparse_matrix.choice.choice import Choice, Tile
from meft_ds.sparse_matrix.choice.score import Scorer
from meft_ds.sparse_matrix.config import SparseMatrixConfig
from meft_ds.sparse_matrix.discover import Site, find_sites
from meft_ds.sparse_matrix.method import SparseMatrixMethod
from tests.subspace.hand import CPU, HYPER, run_of

Backward = Callable[[nn.Module, int], None]


def brute_force(model: nn.Module, sites: Sequence[Site], kind: str, backward: Backward, windows: Any) -> dict[str, Any]:
    """Scores from the whole gradients of a copy of the model; `windows`: lists of the micro-batches' seeds."""
    twin = copy.deepcopy(model).requires_grad_(True)
    scores = {site.name: torch.zeros(site.grid, dtype=torch.float64) for site in sites}
    sums: dict[str, Any] = dict.fromkeys(scores, 0.0)
    for seeds in windows:
        for seed in seeds:
            twin.zero_grad()
            backward(twin, seed)
            for site in sites:
                grad = twin.get_parameter(site.name).grad
                assert grad is not None
                sums[site.name] = sums[site.name] + grad.double()
                scores[site.name] += per_tile(site, grad.double(), kind)
    if kind == "paper":
        scores = {site.name: per_tile(site, sums[site.name], "abs_mean") for site in sites}
    return {name: score / len(windows) for name, score in scores.items()}


def per_tile(site: Site, grad: Tensor, kind: str) -> Tensor:
    """[experts, R, C]"""
    found = torch.zeros(site.grid, dtype=torch.float64)
    for e, g in enumerate(grad if grad.dim() == 3 else grad[None]):
        for r, rows in enumerate(site.rows):
            for c, cols in enumerate(site.cols):
                tile = g[slice(*rows), slice(*cols)]
                if kind == "l2":
                    found[e, r, c] = tile.square().mean().sqrt()
                else:
                    found[e, r, c] = tile.abs().mean() if kind in ("abs_mean", "paper") else tile.mean().abs()
    return found


def scorer_of(model: nn.Module, kind: str, **settings: Any) -> tuple[Scorer, list[Site]]:
    """Listens to `model`, of which nothing else requires grad."""
    sites, _ = find_sites(model, SparseMatrixConfig(score=kind, **settings))
    model.requires_grad_(False)
    for site in sites:
        site.weight.requires_grad_(True)
    return Scorer(sites, kind, Ranks(), CPU), sites


def choice_of(model: nn.Module, block_size: int = 4, keep: Callable[[int], bool] = lambda i: True) -> Choice:
    """The i-th tiles of the model for which `keep` says so."""
    sites, _ = find_sites(model, SparseMatrixConfig(block_size=block_size))
    tiles = [
        Tile(site.name, e if site.weight.dim() == 3 else None, rows, cols, site.role(r, c), site.layer)
        for site in sites
        for e in range(site.experts)
        for r, rows in enumerate(site.rows)
        for c, cols in enumerate(site.cols)
    ]
    kept = tuple(tile for i, tile in enumerate(tiles) if keep(i))
    shapes = {site.name: tuple(site.weight.shape) for site in sites if any(t.name == site.name for t in kept)}
    return Choice(kept, shapes, sum(p.numel() for p in model.parameters()), {})


def pipeline_of(
    model: nn.Module, path: Any, *, clip: float = 0.0, hyper: AdamHyper = HYPER, **settings: Any
) -> Pipeline:
    """What an engine does with a "sparse_matrix" block that names the choice at `path`."""
    method, run = SparseMatrixMethod(SparseMatrixConfig(choice_file=str(path), **settings)), run_of(model)
    feed_checkpoints(model)
    method.prepare(model)
    model.requires_grad_(False)
    method.claim(run)
    units = sorted(method.build(run, {}), key=lambda unit: (unit.layer, unit.name))
    step = StepSettings(hyper_of=lambda unit: hyper, grad_scale=1.0, clip=clip)
    pipeline = Pipeline(units, run.bus, run.ranks, lambda: step)
    update_gates.install(model, units, pipeline)
    pipeline.method = method  # type: ignore[attr-defined]  # what the hooks hold weakly
    return pipeline
