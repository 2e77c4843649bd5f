# SPDX-License-Identifier: Apache-2.0
"""Which tiles train: from scores to a choice within the budget."""

from __future__ import annotations

import hashlib
import logging
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meft_ds.offload.model.weights import WHOLE, Weights
from meft_ds.options import listed
from meft_ds.sparse_matrix.choice.choice import Choice, Tile
from meft_ds.sparse_matrix.config import SparseMatrixConfig
from meft_ds.sparse_matrix.discover import Site

_logger = logging.getLogger("meft_ds")


def choose(
    sites: Sequence[Site],
    scores: Mapping[str, Tensor],
    config: SparseMatrixConfig,
    total: int,
    made_by: dict[str, Any] | None = None,
) -> Choice:
    """Return the tiles with the highest scores that fit into the budget, which is counted in elements.

    The same scores give the same choice: of equal ones the first in the order of `sites` wins.

    Args:
        scores: float64 [experts, rows, columns] of each site's grid, at least 0, by its name.
        total: elements of all 2-D weights, which `density` is a fraction of.
        made_by: what else to remember about how the scores came about; JSON.

    Raises:
        ValueError: when scores are not finite or all 0, or when no tile fits.
    """
    grid = _Grid(sites, scores, config)
    chosen: list[int] = []
    for roles, budget in _budgets(sites, config, total):
        of = grid.of_roles(roles)
        chosen += grid.evenly(of, budget) if config.shared_out == "per_module" else grid.best(of, budget)
    if not chosen:
        asked = f"density {config.density}" if isinstance(config.shared_out, str) else f"budget {config.budget}"
        smallest = int(grid.sizes.min())
        lower = "" if config.block_size == "auto" else " or lower block_size"
        raise ValueError(
            f"sparse_matrix: {asked} gives 0 tiles of block_size {config.block_size} (the smallest has {smallest:,} "
            f"elements, the model {total:,}); raise the fraction{lower}"
        )
    tiles = tuple(grid.tile(i) for i in sorted(chosen))
    named = {tile.name for tile in tiles}
    settings = config.model_dump(include={"score", "density", "preset", "block_size", "seed"})
    if isinstance(config.budget, dict):
        del settings["density"]
    return Choice(
        tiles=tiles,
        shapes={site.name: tuple(site.shape) for site in sites if site.name in named},
        total=total,
        made_by={**settings, "budget": config.shared_out, "normalized": config.normalized, **(made_by or {})},
        cells=tuple((layer, role, n) for (layer, role), n in _elements_by_role(sites).items()),
    )


def warn_of_unreached(choice: Choice, scores: Mapping[str, Tensor]) -> None:
    """Warn of weights that have tiles although all their scores are 0: unused experts, or a cut graph."""
    unreached = {name for name, score in scores.items() if not score.any()}
    chosen = [tile.name for tile in choice.tiles if tile.name in unreached]
    if chosen:
        _logger.warning(
            "sparse_matrix: no gradient reached %s, and still %d tiles there are chosen to use up the budget; "
            "if these are no experts without tokens, look for what cuts the graph (frozen embeddings under reentrant "
            "gradient checkpointing, say)",
            listed(sorted(set(chosen))),
            len(chosen),
        )


def tell_of_matrices_without_tiles(choice: Choice, sites: Sequence[Site], config: SparseMatrixConfig) -> None:
    """Say how many of the matrices that may have tiles got none, and why."""
    there = [
        (site.name, expert if len(site.shape) == 3 else None)
        for site in sites
        for expert in range(site.experts)
        if config.roles is None or set(config.roles).intersection(site.roles)
    ]
    having = {(tile.name, tile.expert) for tile in choice.tiles}
    without = [
        name if expert is None else f"{name}[{expert}]" for name, expert in there if (name, expert) not in having
    ]
    if not without:
        return
    if config.shared_out != "per_module":
        why = "they have none of the best ones"
    elif config.block_size == "auto":
        why = "their share of the budget is less than one, and went to others"
    else:
        why = (
            f'tiles of {config.block_size} x {config.block_size} are larger than their share; block_size "auto" fits it'
        )
    _logger.info(
        "sparse_matrix: %d of %d matrices have no tile, because %s: %s",
        len(without),
        len(there),
        why,
        listed(without, 4),
    )


def most_elements(sites: Sequence[Site], config: SparseMatrixConfig, total: int) -> int:
    """Return the most elements that a choice can have, whatever the scores."""
    return sum(budget for _, budget in _budgets(sites, config, total))


def weight_scores(sites: Sequence[Site], config: SparseMatrixConfig, weights: Weights = WHOLE) -> dict[str, Tensor]:
    """Return scores that need no gradients: float64 [experts, rows, columns] on the host, by the weight's name.

    "random" draws uniformly by seed, name and shape of the grid, and leaves torch's global state alone. "magnitude" is
    the mean |W| of each tile, made without a copy of W larger than one row of tiles. Collective where weights are
    partitioned.
    """
    assert config.score in ("random", "magnitude"), config.score
    if config.score == "random":
        return {site.name: _random(site, config.seed) for site in sites}
    found = {}
    for site in sites:
        with weights.whole([site.weight]):
            found[site.name] = _magnitude(site)
    return found


def _budgets(sites: Sequence[Site], config: SparseMatrixConfig, total: int) -> list[tuple[tuple[str, ...] | None, int]]:
    """Return the roles that compete with each other (None for all), and how many elements they may have together."""
    of_role: dict[str, int] = defaultdict(int)
    for (_, role), elements in _elements_by_role(sites).items():
        of_role[role] += elements
    # by way of its digits, because 0.29 * 100 is below 29
    if isinstance(config.budget, dict):
        shares = config.budget.items()
        return [((role,), math.floor(Fraction(str(share)) * of_role[role])) for role, share in shares]
    there = sum(n for role, n in of_role.items() if config.roles is None or role in config.roles)
    return [(config.roles, min(math.floor(Fraction(str(config.density)) * total), there))]


def _elements_by_role(sites: Sequence[Site]) -> dict[tuple[int | None, str], int]:
    """Return the elements of each role of each layer, in the order of sites."""
    found: dict[tuple[int | None, str], int] = defaultdict(int)
    for site in sites:
        outer, inner = (site.cols, site.rows) if site.input_first else (site.rows, site.cols)
        for (low, high), role in zip(outer, site.roles, strict=True):
            found[site.layer, role] += site.experts * (high - low) * inner[-1][1]
    return found


class _Grid:
    """All tiles of all sites in one row, in the order of sites, experts, rows and columns; [T] each."""

    def __init__(self, sites: Sequence[Site], scores: Mapping[str, Tensor], config: SparseMatrixConfig) -> None:
        self._sites = sites
        self._roles = sorted({role for site in sites for role in site.roles})
        number = {role: i for i, role in enumerate(self._roles)}
        sizes, values, roles, matrices, n = [], [], [], [], 0
        for site in sites:
            experts, _, _ = site.grid
            rows, cols = (
                torch.tensor([high - low for low, high in cuts], device="cpu") for cuts in (site.rows, site.cols)
            )
            along = torch.tensor([number[role] for role in site.roles], device="cpu")
            sizes.append((rows[:, None] * cols).expand(site.grid).flatten())
            roles.append((along if site.input_first else along[:, None]).expand(site.grid).flatten())
            matrices.append(torch.arange(n, n + experts, device="cpu")[:, None, None].expand(site.grid).flatten())
            values.append(_checked(scores[site.name], site).flatten())
            n += experts
        self.sizes, self._role, self._matrix = torch.cat(sizes), torch.cat(roles), torch.cat(matrices)
        self._first = [0, *torch.tensor([len(v) for v in values], device="cpu").cumsum(0).tolist()]
        self.scores = torch.cat(values)
        if not self.scores.any():
            raise ValueError(
                f'all scores "{config.score}" are 0, so there is nothing to choose by: no gradient reached the layers '
                "that may have tiles; check the loss, or use score magnitude or random"
            )
        if config.normalized:
            self._normalize()

    def of_roles(self, roles: tuple[str, ...] | None) -> Tensor:
        """Return the rising indices, int64, of tiles of any of these roles; of all tiles for None."""
        wanted = torch.tensor([roles is None or role in roles for role in self._roles], device="cpu")
        return wanted[self._role].nonzero().flatten()

    def best(self, of: Tensor, budget: int) -> list[int]:
        """Return tiles by falling score until the next one does not fit."""
        ranked, fit = self._ranked(of, budget)
        return ranked[:fit].tolist()

    def evenly(self, of: Tensor, budget: int) -> list[int]:
        """Return tiles so that every matrix has the same share.

        What whole tiles leave over of a share goes, tile by tile, to the matrices that miss the largest part of their
        next tile. Where two miss the same, it goes to the better next tile.
        """
        chosen: list[int] = []
        waiting: list[tuple[Fraction, float, int]] = []
        whole = int(self.sizes[of].sum())
        counts = self._matrix[of].unique_consecutive(return_counts=True)[1]
        for mine in of.split(counts.tolist()):
            share = Fraction(budget * int(self.sizes[mine].sum()), whole)
            ranked, fit = self._ranked(mine, math.floor(share))
            chosen += ranked[:fit].tolist()
            if fit < len(ranked):
                after = int(ranked[fit])
                left = share - int(self.sizes[ranked[:fit]].sum())
                waiting.append((-left / int(self.sizes[after]), -float(self.scores[after]), after))
        spent = int(self.sizes[chosen].sum()) if chosen else 0
        for _, _, after in sorted(waiting):
            spent += int(self.sizes[after])
            if spent > budget:
                break
            chosen.append(after)
        return chosen

    def tile(self, index: int) -> Tile:
        at = bisect_right(self._first, index) - 1
        site = self._sites[at]
        _, n_rows, n_cols = site.grid
        expert, rest = divmod(index - self._first[at], n_rows * n_cols)
        r, c = divmod(rest, n_cols)
        return Tile(
            name=site.name,
            expert=expert if len(site.shape) == 3 else None,
            rows=site.rows[r],
            cols=site.cols[c],
            role=site.role(r, c),
            layer=site.layer,
            score=float(self.scores[index]),
        )

    def _ranked(self, of: Tensor, budget: int) -> tuple[Tensor, int]:
        """Return indices by falling score, equal ones in order, and how many of them fit."""
        ranked = of[self.scores[of].argsort(descending=True, stable=True)]
        return ranked, int(torch.searchsorted(self.sizes[ranked].cumsum(0), budget, right=True))

    def _normalize(self) -> None:
        n = len(self._roles)
        # the mean over elements, not over tiles: small ones at the edges would count too much
        sums = torch.zeros(n, dtype=torch.float64, device="cpu").index_add_(0, self._role, self.scores * self.sizes)
        means = sums / torch.zeros(n, dtype=torch.float64, device="cpu").index_add_(0, self._role, self.sizes.double())
        self.scores = self.scores / torch.where(means > 0, means, 1.0)[self._role]


def _checked(score: Tensor, site: Site) -> Tensor:
    assert tuple(score.shape) == site.grid, (site.name, score.shape, site.grid)
    score = score.detach().to("cpu", torch.float64)
    bad = int((~score.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{bad} of {score.numel()} scores of {site.name} are NaN or infinite: a gradient overflowed or a batch "
            "had no loss; check the data of the warm-up, lower the loss scale, or use bf16"
        )
    assert not score.numel() or score.min() >= 0, site.name
    return score


def _random(site: Site, seed: int) -> Tensor:
    word = hashlib.sha256(f"{seed}:{site.name}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(word, "little") >> 1)
    return torch.rand(site.grid, dtype=torch.float64, generator=generator, device="cpu")


def _magnitude(site: Site) -> Tensor:
    weight = site.weight.detach()
    sizes = np.outer([high - low for low, high in site.rows], [high - low for low, high in site.cols])
    starts = [low for low, _ in site.cols]
    out = torch.empty(site.grid, dtype=torch.float64, device="cpu")
    for expert, matrix in enumerate(weight if weight.dim() == 3 else weight[None]):
        sums = torch.stack([matrix[low:high].abs().sum(0, dtype=torch.float64) for low, high in site.rows])
        out[expert] = torch.from_numpy(np.add.reduceat(sums.cpu().numpy(), starts, axis=1) / sizes)
    return out
