# SPDX-License-Identifier: Apache-2.0
"""The random mask in an engine."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from meft_ds.offload.method import Method, Run
from meft_ds.offload.model.discover import Search, count_layers, whole_name
from meft_ds.offload.unit import Footprint, Unit
from tests.fourth_method.config import RandomMaskConfig
from tests.fourth_method.unit import MaskUnit


class RandomMaskMethod(Method):
    """See `Method`."""

    name = "random_mask"
    memory_hint = 'lower "random_mask.fraction"'
    freezes_base = True

    def __init__(self, config: RandomMaskConfig) -> None:
        self._config = config
        self._layers = 1
        self._weights: dict[str, nn.Parameter] = {}
        self._units: list[MaskUnit] = []

    def conflicts(self, ds_config: Mapping[str, Any]) -> list[str]:
        stage = ds_config.get("zero_optimization", {}).get("stage", 0)
        return ["random_mask: writes whole weights; use ZeRO stage 0, 1 or 2"] if stage == 3 else []

    def prepare(self, model: nn.Module) -> None:
        search = Search(model, None, {}, expected=("is frozen",))
        self._weights = {whole_name(name, key): weight for name, _, key, weight in search}
        if not self._weights:
            raise search.fault("for the random mask")
        self._layers = count_layers(model)

    @property
    def layers(self) -> int:
        return self._layers

    def candidates(self) -> set[int]:
        return {id(weight) for weight in self._weights.values()}

    def claim(self, run: Run) -> set[int]:
        for weight in self._weights.values():
            weight.requires_grad_(True)
        places = run.places(self._weights.items(), self._layers, MaskUnit.wire, wire_dtype=run.grad_dtype)
        self._units = [MaskUnit(place, [self._draw(name, p) for name, p in place.params]) for place in places]
        return self.candidates()

    def _draw(self, name: str, weight: nn.Parameter) -> Tensor:
        g = torch.Generator().manual_seed(self._config.seed + zlib.crc32(name.encode()))
        count = max(1, round(self._config.fraction * weight.numel()))
        return torch.randperm(weight.numel(), generator=g, device="cpu")[:count].sort().values.to(weight.device)

    def footprints(self, run: Run) -> list[Footprint]:
        return [unit.footprint() for unit in self._units]

    def build(self, run: Run, memory: Mapping[str, Tensor]) -> list[Unit]:
        for unit in self._units:
            unit.allocate()
        return list(self._units)

    def fingerprint(self) -> dict[str, Any]:
        return {f"random_mask.{key}": value for key, value in self._config.model_dump().items()}

    def summary(self) -> str:
        return f"random mask of {sum(unit.numel for unit in self._units):,} elements"

    def stats(self) -> dict[str, Any]:
        return {"device_bytes": sum(unit.footprint().device for unit in self._units)}
