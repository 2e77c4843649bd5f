# SPDX-License-Identifier: Apache-2.0
"""Sparse matrix tuning in an engine: score tiles or load the choice, then one unit per layer for the chosen ones."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meft_ds.offload.host.memory import state_on_device
from meft_ds.offload.method import Method, Run
from meft_ds.offload.model.capture import is_tapped
from meft_ds.offload.model.discover import count_layers
from meft_ds.offload.unit import Footprint, Unit
from meft_ds.sparse_matrix.choice.choice import Choice, check_choice
from meft_ds.sparse_matrix.choice.score import Scorer
from meft_ds.sparse_matrix.config import SparseMatrixConfig
from meft_ds.sparse_matrix.discover import Site, elements_of_2d_weights, find_sites
from meft_ds.sparse_matrix.files import collect_tiles, write_tiles
from meft_ds.sparse_matrix.plan import Plan, make_plan
from meft_ds.sparse_matrix.tiles import RowsCols, Tiles
from meft_ds.sparse_matrix.unit import TilesUnit

_NOT_CHOSEN = "not chosen yet"
_TILE_BYTES = 300  # of a chosen tile as a Python object, at least


class SparseMatrixMethod(Method):
    """See `Method`."""

    name = "sparse_matrix"
    memory_hint = 'lower "sparse_matrix.density", raise "sparse_matrix.block_size"'
    freezes_base = True

    def __init__(self, config: SparseMatrixConfig) -> None:
        self._config = config
        self._layers = 1
        self._sites: list[Site] = []
        self._left_out: list[str] = []
        self._total = 0
        self._units: list[TilesUnit] = []
        self._scorer: Scorer | None = None
        self._ended: Scorer | None = None  # one that is being released
        self._on_device = False
        self._trainable: list[nn.Parameter] = []
        self._plan: Plan  # made by `claim`
        self._scored = False

    @property
    def choice(self) -> Choice | None:
        """The tiles that train; None while they are being scored."""
        return self._plan.choice

    def least_host_bytes(self, model: nn.Module) -> int:
        config = self._config
        if config.choice_file is not None:
            return 0
        # a float64 score for each tile, and an object for each that is chosen: very many where tiles are small
        tiles = sum(math.prod(site.grid) for site in find_sites(model, config)[0])
        share = 0.0 if isinstance(config.budget, dict) else config.density
        return 8 * tiles + int(_TILE_BYTES * share * tiles)

    def prepare(self, model: nn.Module) -> None:
        # now, because what the program froze can no longer be told once the base is frozen
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        self._sites, self._left_out = find_sites(model, self._config)
        self._total = elements_of_2d_weights(model)
        self._layers = count_layers(model)

    @property
    def layers(self) -> int:
        return self._layers

    def candidates(self) -> set[int]:
        return {id(site.weight) for site in self._sites}

    def claim(self, run: Run) -> set[int]:
        plan = self._plan = make_plan(run, self._config, self._sites, self._left_out, self._total)
        self._on_device = state_on_device(self._config.state_device, run.bus.device, plan.state_bytes(run))
        self._train_only(plan.chosen_sites, run)
        if plan.choice is not None:
            self._units = self._make_units(run, plan)
        return {id(site.weight) for site in plan.chosen_sites}

    def footprints(self, run: Run) -> list[Footprint]:
        if self.choice is None:
            return [self._plan.footprint(run, on_device=self._on_device)]
        return [unit.footprint() for unit in self._units]

    def build(self, run: Run, memory: Mapping[str, Tensor]) -> list[Unit]:
        if self.choice is None:
            self._scorer = Scorer(self._plan.sites, self._config.score, run.ranks, run.bus.device, run.weights.anchor)
        for unit in self._units:
            unit.allocate()
        return list(self._units)

    def release(self) -> None:
        """Let the model train what it did before, so that another engine finds the same weights to choose from."""
        for scorer in (self._scorer, self._ended):
            if scorer is not None:
                scorer.release()
        if not any(is_tapped(site.module) for site in self._sites):  # else it has come
            for p in self._trainable:
                p.requires_grad_(True)
        self._trainable = []

    # -- observing -----------------------------------------------------------------------------------------------------

    @property
    def observing(self) -> bool:
        return self._scorer is not None

    def untrained(self, steps: int) -> str:
        wanted = self._config.windows
        if self._scorer is not None:
            done = f"is still scoring ({self._scorer.windows} of {wanted} windows)"
        elif self._scored and not steps and self._config.choice_out is None:
            done = f"has scored {wanted} windows, and no step came after them"
        else:
            return ""
        return (
            f"sparse_matrix {done}: nothing was trained, and what is saved is the base; lower "
            "sparse_matrix.warmup_steps, or train for longer"
        )

    def end_observed_window(self) -> bool:
        assert self._scorer is not None
        return self._scorer.close_window()

    def observed(self, run: Run) -> list[Unit] | None:
        scorer = self._scorer
        assert scorer is not None
        if scorer.windows < self._config.windows:
            return None
        scores, self._scored = scorer.scores(), True
        return self._begin(run, self._plan.decide(run, scores, windows=scorer.windows, world=run.ranks.world))

    def forget_window(self) -> None:
        if self._scorer is not None:
            self._scorer.drop_window()

    def end_window(self, loss_factor: float) -> None:
        if self._scorer is not None:
            self._scorer.begin_window(loss_factor)

    def state(self, run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self._scorer is not None:
            return {"windows": self._scorer.windows, **self._scorer.about()}, self._scorer.state()
        assert self.choice is not None
        # only who takes tiles out of a checkpoint reads the layout
        layout = {
            unit.name: [[unit.params[m.param][0], m.expert, m.input_first] for m in unit.matrices]
            for unit in self._units
        }
        units = {unit.name: unit.numel for unit in self._units}
        return {"choice": self.choice.to_json(), "units": units, "layout": layout}, {}

    def load_state(self, run: Run, state: dict[str, Any], tensors: dict[str, Tensor], *, moments: bool) -> list[Unit]:
        if self._scorer is None:
            return []  # what `about` says has been compared
        if "choice" not in state:
            if not moments:
                return []
            self._scorer.check(state)
            self._scorer.load_state(tensors, int(state["windows"]))
            return []
        choice = Choice.from_json(state["choice"])
        check_choice(choice, self._plan.sites, self._plan.elsewhere)
        plan = replace(self._plan, choice=choice)
        here = {unit.name: unit.numel for unit in self._make_units(run, plan)}
        if here != state["units"]:
            raise ValueError(
                f"the checkpoint's tiles are kept as {state['units']}, this run would keep them as {here}; make the "
                "precision and the optimizer's parameter groups those of the run that saved it"
            )
        return self._begin(run, plan)

    def _begin(self, run: Run, plan: Plan) -> list[Unit]:
        """End scoring and train the plan's choice."""
        # first, because an interrupt could leave a scorer that hears only some of the modules
        self._ended, self._scorer, self._plan = self._scorer, None, plan
        assert self._ended is not None
        self._ended.release()
        self._ended = None
        self._train_only(plan.chosen_sites, run)
        self._units = self._make_units(run, plan)
        for unit in self._units:
            unit.allocate()
        return list(self._units)

    def _train_only(self, sites: list[Site], run: Run) -> None:
        """Let the weights of `sites` require grad, and those of the plan's other sites not.

        Under ZeRO-3 a tapped layer's weight requires none either: its layer is tapped by an anchor.
        """
        chosen = {id(site) for site in sites}
        for site in self._plan.sites:
            needs = run.weights.anchor is None or not site.tapped
            site.weight.requires_grad_(needs and id(site) in chosen)

    def export(self) -> Callable[[str | Path], Any]:
        if (choice := self.choice) is None:
            raise ValueError(
                f"tiles are still being scored ({self.stats()['scored_steps']} steps so far) and nothing has been "
                "trained; call save_tiles when training has begun"
            )
        units = self._units
        originals = [unit.originals().cpu() for unit in units]
        values = [unit.values().cpu() for unit in units]
        return lambda path: write_tiles(path, collect_tiles(choice, units, values, originals))

    # -- about ---------------------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        tiles = _NOT_CHOSEN if self.choice is None else self.choice.digest()
        return {"sparse_matrix.tiles": tiles}

    def accepts_fingerprint(self, key: str, saved: Any) -> bool:
        if key == "sparse_matrix.tiles" and saved == _NOT_CHOSEN and not self.observing:
            raise ValueError(
                "the checkpoint was saved while sparse_matrix scored tiles and nothing was trained, but this engine "
                "has its tiles already; load it into a new engine without choice_file, or load a later checkpoint"
            )
        # an engine that has not chosen yet takes the checkpoint's tiles
        return key == "sparse_matrix.tiles" and self.observing

    def summary(self) -> str:
        where = "accelerator" if self._on_device else "host"
        if self.choice is None:
            return (
                f"sparse_matrix scores {len(self._plan.sites)} matrices ({self._config.score}) for "
                f"{self._config.warmup_steps} steps that train nothing, then trains tiles of {self._sides()} "
                f"with at most {self._plan.elements:,} parameters (state on the {where})"
            )
        tiles = self.choice.tiles
        return (
            f"sparse_matrix on {len(tiles):,} tiles of {len({(t.name, t.expert) for t in tiles})} matrices "
            f"({self.choice.elements:,} parameters, {self.choice.density:.2%} of all matrices; state on the {where})"
        )

    def _sides(self) -> str:
        sides = {site.side for site in self._plan.sites}
        return " to ".join(f"{side} x {side}" for side in sorted({min(sides), max(sides)}))

    def stats(self) -> dict[str, Any]:
        units = self._units
        stats: dict[str, Any] = {
            "device_bytes": sum(unit.footprint().device for unit in units),
            "parameters": sum(unit.numel for unit in units),
            # those matrices require grad as a whole, so who counts what trains must know how much is in them
            "matrix_parameters": 0 if self.choice is None else sum(map(math.prod, self.choice.shapes.values())),
            "tiles": 0 if self.choice is None else len(self.choice.tiles),
            "state_bytes": sum(unit.state_bytes for unit in units),
            "gradient_bytes": sum(4 * unit.numel for unit in units),
            "scored_steps": None if self._scorer is None else self._scorer.windows,
        }
        return stats

    # -- units ---------------------------------------------------------------------------------------------------------

    def _make_units(self, run: Run, plan: Plan) -> list[TilesUnit]:
        assert plan.choice is not None
        sites = {site.name: site for site in plan.chosen_sites}
        # weights whose gradient autograd must make have units of their own, under the names that checkpoints know
        kinds = {name: ".stored" for name, site in sites.items() if not site.tapped}
        places = run.places(
            [(name, site.weight) for name, site in sites.items()],
            self._layers,
            TilesUnit.wire,
            kinds,
            wire_dtype=run.grad_dtype,
            on_device=self._on_device,
        )
        units = []
        for place in places:
            found = [sites[name] for name, _ in place.params]
            modules = [site.module if site.tapped else None for site in found]
            units.append(TilesUnit(place, matrices=_matrices(found, plan.choice, run.bus.device), modules=modules))
        return units


def _matrices(sites: list[Site], choice: Choice, device: torch.device) -> list[Tiles]:
    """Return the tiles of each matrix of these sites, in the order of a payload."""
    tiles: dict[str, dict[int | None, list[RowsCols]]] = defaultdict(lambda: defaultdict(list))
    for tile in choice.tiles:
        tiles[tile.name][tile.expert].append((tile.rows, tile.cols))
    matrices: list[Tiles] = []
    offset = 0
    for index, site in enumerate(sites):
        for expert, chosen in tiles[site.name].items():
            matrices.append(
                Tiles(
                    param=index,
                    expert=expert,
                    tiles=chosen,
                    input_first=site.input_first,
                    features=site.shape[-2 if site.input_first else -1],
                    offset=offset,
                    device=device,
                )
            )
            offset += matrices[-1].numel
    return matrices
