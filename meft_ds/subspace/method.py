# SPDX-License-Identifier: Apache-2.0
"""Learned subspace projectors in an engine: which matrices, their first projectors, and one unit per layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from meft_ds.offload.host.memory import state_on_device
from meft_ds.offload.method import Method, Run
from meft_ds.offload.model.capture import is_tapped
from meft_ds.offload.model.discover import count_layers
from meft_ds.offload.model.weights import shape_of
from meft_ds.offload.unit import Footprint, Unit
from meft_ds.options import listed
from meft_ds.subspace.calibrate import Calibrator, first_draw
from meft_ds.subspace.config import SubspaceConfig
from meft_ds.subspace.discover import Site, find_matrices
from meft_ds.subspace.matrix import Matrix, Side
from meft_ds.subspace.unit import SubspaceUnit

_logger = logging.getLogger("meft_ds")


class SubspaceMethod(Method):
    """See `Method`."""

    name = "subspace"
    memory_hint = 'lower "subspace.dim"'
    freezes_base = False

    def __init__(self, config: SubspaceConfig) -> None:
        self._config = config
        self._layers = 1
        self._units: list[SubspaceUnit] = []
        self._anchored: list[Site] = []
        self._calibrator: Calibrator
        self._told: int | None = None  # matrices of which the log last said that they wait for a gradient
        self._tells = self._has_calibrated = False

    def conflicts(self, ds_config: Mapping[str, Any]) -> list[str]:
        zero = ds_config.get("zero_optimization")
        if self._config.rounding != "residual" or not isinstance(zero, Mapping) or zero.get("stage") != 3:
            return []
        return [
            'meft_offload.subspace.rounding: "residual" keeps what rounding loses of whole weights, which ZeRO-3 does '
            'not have; use "stochastic"'
        ]

    def prepare(self, model: nn.Module) -> None:
        find_matrices(model, self._config)
        self._layers = count_layers(model)

    @property
    def layers(self) -> int:
        return self._layers

    def claim(self, run: Run) -> set[int]:
        sites, excluded = find_matrices(run.model, self._config)
        if run.ranks.rank == 0 and not sites:
            _logger.warning(
                "subspace compresses nothing: what trains here trains uncompressed. %s. If that is all that "
                "is to train, take subspace out of the meft_offload block; if not, unfreeze the rest, or name matrices "
                "in subspace.target_modules",
                listed(excluded) or "The model has no linear layers",
            )
        elif excluded and run.ranks.rank == 0:
            _logger.info("subspace leaves uncompressed: %s", listed(excluded))
        if run.weights.partitioned:
            # a tapped layer needs no gradient of autograd's, and must not get one where weights are swapped
            self._anchored = [site for site in sites if site.tapped]
            for site in self._anchored:
                site.weight.requires_grad_(False)
        self._calibrator = Calibrator(self._config, run.ranks)
        self._tells = run.ranks.rank == 0
        self._units = self._make_units(run, sites)
        return {id(site.weight) for site in sites}

    def footprints(self, run: Run) -> list[Footprint]:
        return [unit.footprint() for unit in self._units]

    def build(self, run: Run, memory: Mapping[str, Tensor]) -> list[Unit]:
        for unit in self._units:
            unit.allocate()
        return list(self._units)

    def calibrates(self, steps: Mapping[str, int]) -> tuple[list[SubspaceUnit], bool]:
        due = {unit.name for unit in self._units if self._calibrator.due(steps[unit.name])}
        return [unit for unit in self._units if unit.name in due or unit.awaited], bool(due)

    def begin_calibration(self, steps: Mapping[str, int]) -> None:
        self._calibrator.begin(self.calibrates(steps)[0], steps)

    def end_calibration(self) -> None:
        self._calibrator.end()

    def keep_calibration(self) -> None:
        for unit in self._units:
            unit.keep_calibration()
        self._has_calibrated = True

    def end_window(self, loss_factor: float) -> None:
        if self._tells and self._has_calibrated:
            self._tell_who_waits([m.name for unit in self._units for m in unit.awaited])

    def _tell_who_waits(self, names: list[str]) -> None:
        told, self._told = self._told, len(names)
        if told is None and names:
            _logger.info(
                "no gradient reached %d of %d matrices in the first window; their projectors stay random "
                "until one does, and are fitted to it then: %s",
                len(names),
                sum(len(unit.matrices) for unit in self._units),
                listed(names),
            )
        elif told is not None and names and 8 * (told - len(names)) < told:
            self._told = told  # a line for each of many experts would be too much
        elif told:
            _logger.info(
                "%d more matrices got their first gradient, and a fit to it; %d wait",
                told - len(names),
                len(names),
            )

    def release(self) -> None:
        for site in self._anchored:
            if not is_tapped(site.module):  # else another engine has come
                site.weight.requires_grad_(True)
        self._anchored = []

    def fingerprint(self) -> dict[str, Any]:
        shaping = ("dim", "nonzeros", "projectors", "rounding", "seed")
        return {
            "subspace.matrices": sum(len(unit.matrices) for unit in self._units),
            **{f"subspace.{key}": getattr(self._config, key) for key in shaping},
        }

    def summary(self) -> str:
        matrices = [m for unit in self._units for m in unit.matrices]
        if not matrices:
            return "subspace on no matrix"
        whole = sum(m.left.projector.m * m.right.projector.m for m in matrices)
        where = "accelerator" if self._units[0].on_device else "host"
        return (
            f"subspace on {len(matrices)} matrices (d={self._config.dim}, k={self._config.nonzeros}, "
            f"{self._config.projectors} projectors, moments on the {where}), {whole:,} parameters through "
            f"{sum(m.numel for m in matrices):,} compressed values"
        )

    def stats(self) -> dict[str, Any]:
        matrices = [m for unit in self._units for m in unit.matrices]
        held_out = [m.bias["held_out"] for m in matrices if "held_out" in m.bias]
        finite = [b for b in held_out if math.isfinite(b)]
        return {
            "device_bytes": sum(unit.footprint().device for unit in self._units),
            "parameters": sum(m.left.projector.m * m.right.projector.m for m in matrices),
            "compressed": sum(m.numel for m in matrices),
            "bias": {m.name: m.bias for m in matrices},
            "waiting_for_gradient": [m.name for unit in self._units for m in unit.awaited],
            "held_out_bias_mean": sum(finite) / len(finite) if finite else None,
            "held_out_bias_max": max(finite, default=None),
            "checks": self._calibrator.checks,
            "check_s": self._calibrator.seconds,
        }

    # -- units ---------------------------------------------------------------------------------------------------------

    def _make_units(self, run: Run, sites: list[Site]) -> list[SubspaceUnit]:
        config, by_name = self._config, {site.name: site for site in sites}
        stacks: dict[str, int] = {}
        stack_of = {site.name: stacks.setdefault(_stack_of(site.name), len(stacks)) for site in sites}
        values = sum(site.d**2 * math.prod(shape_of(site.weight)[:-2]) for site in sites)
        nbytes = values * 2 * run.moments_dtype.itemsize // run.ranks.world
        places = run.places(
            [(site.name, site.weight) for site in sites],
            self._layers,
            SubspaceUnit.wire,
            {name: f".s{stack}" for name, stack in stack_of.items() if stack},
            wire_dtype=run.grad_dtype,
            on_device=state_on_device(config.state_device, run.bus.device, nbytes),
        )
        units = []
        for place in places:
            found = [by_name[name] for name, _ in place.params]
            units.append(
                SubspaceUnit(
                    place,
                    matrices=self._matrices(found, run.bus.device),
                    modules=[site.module if site.tapped else None for site in found],
                    scale=config.scale,
                    residual=config.rounding == "residual",
                    seed=config.seed,
                    learned=config.projectors == "learned",
                    arriving=self._calibrator.arriving,
                    captured_all=self._calibrator.received,
                    stack=stack_of[place.params[0][0]],
                )
            )
        return units

    def _matrices(self, sites: list[Site], device: torch.device) -> list[Matrix]:
        sides: dict[str, Side] = {}

        def side(name: str, m: int, site: Site) -> Side:
            if name not in sides:
                sides[name] = Side(name, first_draw(self._config, name, m, site.d, 0, device))
            sides[name].users += 1
            return sides[name]

        matrices: list[Matrix] = []
        offset = 0
        for index, site in enumerate(sites):
            *experts, m, n = shape_of(site.weight)
            for expert in range(experts[0]) if experts else (None,):
                name = site.name if expert is None else f"{site.name}.{expert}"
                shares = site.shares if expert is None else name
                matrices.append(
                    Matrix(
                        name=name,
                        param=index,
                        left=side(f"{name}.left", m, site),
                        right=side(f"{shares}.right", n, site),
                        offset=offset,
                        input_first=site.input_first,
                        expert=expert,
                    )
                )
                offset += matrices[-1].numel
        return matrices


def _stack_of(name: str) -> str:
    """Return what stands before the number of a parameter's block; "" outside blocks.

    Models with several lists of blocks that run one after another (encoder and decoder, vision tower and language
    model) have as many stacks.
    """
    parts = name.split(".")
    return next((".".join(parts[:i]) for i, part in enumerate(parts) if part.isdigit()), "")
