# SPDX-License-Identifier: Apache-2.0
"""What a run will do about tiles: which weights may have them, which tiles train, and where their state lives.

Making a plan changes neither the model nor the method. All ranks make the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from meft_ds.files import check_writable
from meft_ds.offload.flat_unit import flat_footprint
from meft_ds.offload.method import Run
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.unit import Footprint
from meft_ds.options import listed
from meft_ds.sparse_matrix.choice.choice import Choice, check_choice
from meft_ds.sparse_matrix.choice.score import Scorer, tile_elements
from meft_ds.sparse_matrix.choice.select import (
    choose,
    most_elements,
    tell_of_matrices_without_tiles,
    warn_of_unreached,
    weight_scores,
)
from meft_ds.sparse_matrix.config import SparseMatrixConfig
from meft_ds.sparse_matrix.discover import Site, check_roles, narrow

_logger = logging.getLogger("meft_ds")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run does about tiles.

    Attributes:
        sites: the weights that may have tiles.
        elsewhere: why weights that looked like it cannot, by name.
        total: elements of all 2-D weights of the model, which `density` is a fraction of.
        choice: the tiles that train; None where windows score them first.
    """

    config: SparseMatrixConfig
    sites: list[Site]
    elsewhere: dict[str, str]
    total: int
    choice: Choice | None = None

    @property
    def chosen_sites(self) -> list[Site]:
        """The sites that have tiles; all of them as long as nothing is chosen."""
        named = None if self.choice is None else {tile.name for tile in self.choice.tiles}
        return [site for site in self.sites if named is None or site.name in named]

    @property
    def elements(self) -> int:
        """Elements that train, or at most will."""
        return most_elements(self.sites, self.config, self.total) if self.choice is None else self.choice.elements

    def state_bytes(self, run: Run) -> int:
        """Return the bytes of this rank's masters and moments."""
        return self.elements * (4 + 2 * run.moments_dtype.itemsize) // run.ranks.world

    def footprint(self, run: Run, *, on_device: bool) -> Footprint:
        """Return what the scorer and the units to come take at most. `on_device`: where their state will live."""
        units = flat_footprint(
            self.elements,
            self.elements // run.ranks.world + 1,
            dtype=run.dtype,
            wire_dtype=run.grad_dtype,
            state_bytes=4 + 2 * run.moments_dtype.itemsize + run.dtype.itemsize,
            several=run.ranks.world > 1,
            device=run.bus.device,
            on_device=on_device,
        )
        return replace(units, host_private=units.host_private + Scorer.host_bytes(self.sites, self.config.score))

    def decide(self, run: Run, scores: Mapping[str, Tensor], **made_by: int) -> Plan:
        """Choose the tiles with the highest scores, the same on all ranks, and write `choice_out`. Collective.

        Raises:
            ValueError: as `choose`, or when the file cannot be written; the same on every rank.
        """

        def decide() -> Choice:
            choice = choose(self.sites, scores, self.config, self.total, dict(made_by))
            warn_of_unreached(choice, scores)
            tell_of_matrices_without_tiles(choice, self.sites, self.config)
            if self.config.choice_out is not None:
                try:
                    choice.save(self.config.choice_out)
                except (OSError, ValueError) as fault:
                    raise _unwritable(self.config.choice_out, fault) from None
            return choice

        return replace(self, choice=_agreed(decide, run.ranks))


def make_plan(run: Run, config: SparseMatrixConfig, sites: Sequence[Site], left_out: Sequence[str], total: int) -> Plan:
    """Decide what a run does, and refuse now what would fail after scoring. Collective.

    Args:
        sites, left_out: what `find_sites` found.
        total: elements of all 2-D weights of the model.

    Raises:
        ValueError: when no weight is left, the budget holds no tile, a choice does not fit the model, or a file cannot
        be read or written; the same on every rank.
    """
    kept, elsewhere = narrow(sites, run.groups)
    left_out = [*left_out, *(f"{name} {why}" for name, why in elsewhere.items())]
    if left_out and run.ranks.rank == 0:
        _logger.info("sparse_matrix leaves out: %s", listed(left_out))
    check_roles(kept, config, left_out)
    plan = Plan(config=config, sites=kept, elsewhere=elsewhere, total=total)
    if config.choice_file is not None:
        choice = _agreed(lambda: Choice.load(str(config.choice_file)), run.ranks)
        check_choice(choice, kept, elsewhere)
        return replace(plan, choice=choice)
    if config.windows == 0:
        # on every rank, although one decides: reading partitioned weights takes all
        return plan.decide(run, weight_scores(kept, config, run.weights))
    # a budget that no tile fits into: with these scores the smallest tiles are the best
    sizes = {site.name: tile_elements(site).reciprocal().expand(site.grid) for site in kept}
    choose(kept, sizes, config.model_copy(update={"normalize": False}), total)
    if config.choice_out is not None:
        run.ranks.from_first(lambda: _check_choice_out(str(config.choice_out)))
    return plan


def _agreed(make: Callable[[], Choice], ranks: Ranks) -> Choice:
    """Return the first rank's choice on all ranks. Collective."""
    return Choice.from_json(ranks.from_first(lambda: make().to_json()))


def _check_choice_out(path: str) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)
    except (OSError, ValueError) as fault:
        raise _unwritable(path, fault) from None


def _unwritable(path: str, fault: Exception) -> ValueError:
    return ValueError(f"sparse_matrix.choice_out: cannot write {path}: {fault}; name a file that can be written")
