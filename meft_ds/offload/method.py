# SPDX-License-Identifier: Apache-2.0
"""What an engine asks of a method: one subclass per method room, and one registration (`meft_ds.plugin.methods`).

Order of the calls: `prepare` (the model is still as the program made it), then, with the model cast and on its device,
`claim`, `footprints` and `specs` (nothing is allocated yet), and `build`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meft_ds.offload.arena import Specs
from meft_ds.offload.bus import Bus
from meft_ds.offload.partition import Ranks
from meft_ds.offload.wire import Footprint, Unit


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the engine has settled on.

    `groups` are the optimizer's parameter groups; `dtype` is the compute dtype, `grad_dtype` that of a method's
    gradients on the bus.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    bus: Bus
    ranks: Ranks
    dtype: torch.dtype
    moments_dtype: torch.dtype
    grad_dtype: torch.dtype


class Method(ABC):
    """One method at work in one engine."""

    name: str
    knob: str  # how a user makes it take less host memory
    freezes_base: bool  # whether the base trains only where the block's "train" says so

    @abstractmethod
    def prepare(self, model: nn.Module) -> None:
        """Change the model where the method needs it, before the engine casts, moves and broadcasts it.

        Raises:
            ValueError: when the model has nothing for the method to work on.
        """

    @property
    @abstractmethod
    def layers(self) -> int:
        """How many layers it works on."""

    def own_parameters(self) -> list[nn.Parameter]:
        """Parameters that the method added to the model."""
        return []

    def claim(self, run: Run) -> set[int]:
        """ids of the parameters that the method's units update; all other trainable ones go to `dense` units."""
        return set()

    @abstractmethod
    def footprints(self, run: Run) -> list[Footprint]:
        """What `build` will take and its units will move."""

    def specs(self, run: Run) -> Specs:
        """Host tensors that a node's ranks share; `build` gets them."""
        return {}

    @abstractmethod
    def build(self, run: Run, memory: Mapping[str, Tensor]) -> list[Unit]:
        """Allocate, and return the units. Collective."""

    def end_window(self, loss_factor: float) -> None:  # noqa: B027 - most methods do nothing between windows
        """A window ended (or the first one begins); losses of the next one are multiplied by `loss_factor`."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What shapes the function or the layout of the state (JSON types): a checkpoint must agree in it."""

    @abstractmethod
    def summary(self) -> str:
        """What is active, for the log line at the start."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Numbers for `engine.meft_stats()`, among them "device_bytes"."""
