# SPDX-License-Identifier: Apache-2.0
"""What an engine asks of a method: one subclass per method room, and one registration (`meft_ds.plugin.registry`).

Order of the calls: `least_host_bytes` and `prepare` (the model is still as the program made it), then, with the model
cast and on its device, `claim`, `footprints` and `specs` (nothing is allocated yet), and `build`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from meft_ds.offload.flat_unit import Place
from meft_ds.offload.host.shared_memory import Specs
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.model.discover import layer_of
from meft_ds.offload.model.weights import WHOLE, Weights
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.unit import Footprint, Unit


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the engine has settled on.

    `weights` is how the model's parameters are read and written; `groups` are the optimizer's parameter groups; `dtype`
    is the compute dtype, `grad_dtype` that of a method's gradients on the bus.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    bus: Bus
    ranks: Ranks
    dtype: torch.dtype
    moments_dtype: torch.dtype
    grad_dtype: torch.dtype
    weights: Weights = WHOLE

    @property
    def group(self) -> int:
        """Index of the parameter group that rows and all parameters in no group follow: the first that has parameters
        and a learning rate above 0, now or (`initial_lr`) once its scheduler has warmed up; else the first with
        parameters."""
        filled = [i for i, group in enumerate(self.groups) if group["params"]] or [0]
        return next((i for i in filled if base_lr(self.groups[i]) > 0), filled[0])

    def places(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        layers: int,
        wire: str,
        kinds: Mapping[str, str] = MappingProxyType({}),
        **more: Any,
    ) -> list[Place]:
        """Sort parameters into units: one per layer, kind, parameter group and dtype, in this order.

        Args:
            named: name and parameter; those that no group of the optimizer has follow `group`.
            layers: how many the model has.
            wire: name of the format, in the units' names.
            kinds: by parameter name: what the unit's name says after the format.
            more: other fields of `Place`.
        """
        group_of = {id(p): index for index, group in enumerate(self.groups) for p in group["params"]}
        layer = layer_of(self.model, layers)
        found: dict[tuple[int, str, int, str], list[tuple[str, nn.Parameter]]] = {}
        for name, p in named:
            dtype = str(p.dtype).removeprefix("torch.")
            key = (layer[name], kinds.get(name, ""), group_of.get(id(p), self.group), dtype)
            found.setdefault(key, []).append((name, p))
        settled: dict[str, Any] = {"ranks": self.ranks, "weights": self.weights, "device": self.bus.device}
        settled |= {"moments_dtype": self.moments_dtype, **more}
        return [
            Place(name=f"layer{at}.{wire}{kind}.g{group}.{dtype}", layer=at, params=params, group=group, **settled)
            for (at, kind, group, dtype), params in sorted(found.items(), key=lambda item: item[0])
        ]


def base_lr(group: dict[str, Any]) -> float:
    """Return a parameter group's learning rate: what its scheduler starts from, if one of torch's drives it."""
    return max(float(group["lr"]), float(group.get("initial_lr", 0.0)))


class Extras(ABC):
    """What a method puts into a model beside the base: modules of its own, which have files of their own.

    It answers for any model, whether an engine trains it or not. Parameters may be partitioned.
    """

    @abstractmethod
    def present(self, model: nn.Module) -> bool:
        """Return whether `model` has them."""

    @abstractmethod
    def owns(self, name: str) -> bool:
        """Return whether a tensor of this name in a state dict is one of theirs; all others are the base's."""

    @abstractmethod
    def needed(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that `write` writes, by name."""

    @abstractmethod
    def write(
        self, folder: Path, model: nn.Module, state: Mapping[str, Tensor] | None = None, *, beside_base: bool = False
    ) -> None:
        """Write them to `folder`, on one rank. Nothing may be under way.

        Args:
            folder: made when missing.
            model: has them.
            state: whole tensors of `needed` where the model's own are partitioned.
            beside_base: the base is in `folder` too, and whoever loads it must be told of them.

        Raises:
            OSError: when the files cannot be written.
        """

    @abstractmethod
    def remember(self, model: nn.Module, names: Iterable[str], elsewhere: Iterable[str]) -> None:
        """Keep with `model` what an engine trains beside them.

        Args:
            model: has them, or will.
            names: of whole tensors of the base, which `write` then writes too.
            elsewhere: names of other methods, whose part of the base is not in the files.
        """

    @abstractmethod
    def remove(self, model: nn.Module) -> None:
        """Take them out, if there are any: the model computes what its base does."""


class Method(ABC):
    """One method at work in one engine."""

    name: str  # its key in the block, in checkpoints and in `meft_stats`
    extras: ClassVar[Extras | None] = None
    memory_hint: str  # how a user makes it take less host memory
    freezes_base: bool  # whether the base trains only where the block's "train" says so

    def conflicts(self, ds_config: Mapping[str, Any]) -> list[str]:
        """Return which settings elsewhere in the ds_config the method's own do not go with, each with the fix.

        Asked before there is an engine; the lines stand in the error that lists all faults of the block.
        """
        return []

    def least_host_bytes(self, model: nn.Module) -> int:
        """Return the host bytes that the settings take on every node at least; asked before `prepare`.

        Raises:
            ValueError: as `prepare`.
        """
        return 0

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
        """Return the parameters that the method added to the model."""
        return []

    def candidates(self) -> set[int]:
        """Return ids of the parameters that it may choose among although the base is frozen; after `prepare`."""
        return set()

    def claim(self, run: Run) -> set[int]:
        """Return ids of the parameters that the method's units update; other trainable ones go to `dense` units."""
        return set()

    @abstractmethod
    def footprints(self, run: Run) -> list[Footprint]:
        """Return what `build` will take and its units will move."""

    def shared_tensors_spec(self, run: Run) -> Specs:
        """Return the host tensors that a node's ranks share; `build` gets them."""
        return {}

    @abstractmethod
    def build(self, run: Run, memory: Mapping[str, Tensor]) -> list[Unit]:
        """Allocate, and return the units. Collective."""

    def end_window(self, loss_factor: float) -> None:  # noqa: B027 - most methods do nothing between windows
        """Note that a window ended (or the first begins); losses of the next are multiplied by `loss_factor`."""

    def forget_window(self) -> None:  # noqa: B027 - most methods keep what a window collects in their units
        """Forget what the open window has collected, as far as it is not in units."""

    def release(self) -> None:  # noqa: B027 - most methods leave the model to their units
        """Leave the model: the engine is gone and its units are released. May be called several times."""

    # -- windows that calibrate: units may change how they encode in the first backward that reaches them -------------

    def calibrates(self, steps: Mapping[str, int]) -> tuple[Sequence[Unit], bool]:
        """Return which units may calibrate in the window that begins, and whether no update may be under way then.

        Asked once per window. None of these units is updated before the verdict over all units.

        Args:
            steps: by a unit's name: its updates so far.
        """
        return (), False

    def begin_calibration(self, steps: Mapping[str, int]) -> None:  # noqa: B027 - most methods never calibrate
        """Begin such a window, or begin it again because what it collected was forgotten. `steps` as above."""

    def end_calibration(self) -> None:  # noqa: B027 - most methods never calibrate
        """End it: its backwards are over, no payload that this rank still has to send has been collected, and no update
        of a unit that calibrates is under way. Collective, of what other ranks may have run in their backwards."""

    def keep_calibration(self) -> None:  # noqa: B027 - most methods never calibrate
        """Keep what units changed: the verdict is to update. Collective, before any update of theirs."""

    # -- methods that watch some windows before they have units --------------------------------------------------------

    @property
    def observing(self) -> bool:
        """Whether windows are only watched: as long as any method does, nothing is updated."""
        return False

    def untrained(self, steps: int) -> str:
        """Return a warning if `steps` updates have trained nothing yet, with what the user can do; otherwise "".

        Shown when the model is saved or the run ends.
        """
        return ""

    def end_observed_window(self) -> bool:
        """End a window in which a method was observing. Collective.

        Return whether it counts; it does not if a gradient was not finite.
        """
        return True

    def observed(self, run: Run) -> list[Unit] | None:
        """Return the method's units, allocated, or None to watch another window. Collective; after a watched one."""
        return None

    def state(self, run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a checkpoint keeps beside the units: JSON, and tensors (of the first rank). Collective."""
        return {}, {}

    def load_state(self, run: Run, state: dict[str, Any], tensors: dict[str, Tensor], *, moments: bool) -> list[Unit]:
        """Take back what `state` gave; returns units that come with it, allocated. Collective.

        Without `moments` only what the model's weights need.

        Raises:
            ValueError: when it does not fit this model; nothing has been changed then.
        """
        return []

    def accepts_fingerprint(self, key: str, saved: Any) -> bool:
        """Return whether a checkpoint with another value `saved` under `key` may be loaded all the same."""
        return False

    def export(self) -> Callable[[str | Path], Any] | None:
        """Gather what the method's own file holds. Return what writes it, on one rank. Collective.

        None where the method has no such file.

        Raises:
            ValueError: when there is nothing to write yet.
        """
        return None

    # -- what is told of it --------------------------------------------------------------------------------------------

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return what shapes the function or the layout of the state (JSON types): a checkpoint must agree in it.

        Keys begin with the method's name and a dot.
        """

    @abstractmethod
    def summary(self) -> str:
        """Return what is active, for the log line at the start."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Return numbers for `engine.meft_stats()`, among them "device_bytes"."""
