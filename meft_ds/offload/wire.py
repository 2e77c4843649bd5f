# SPDX-License-Identifier: Apache-2.0
"""The wire-format contract: what a unit must answer so that the pipeline can carry it without knowing its method.

A *unit* is what one layer moves in one wire format. The pipeline drives every unit through the same six calls, in layer
order, once per accumulation window:

    collect (device) -> reduce (ranks) -> send (down) -> sq_norm -> host_step (host) -> apply (up, device)

or `discard` in place of the last two when the window overflowed. A new wire format is one subclass and one
registration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from meft_ds.offload.bus import Bus


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes a unit needs, known before anything is allocated.

    `host_shared` is held once per node however many ranks share it, `host_private` by this rank alone. `down` and `up`
    are upper bounds for one accumulation window.
    """

    host_shared: int = 0
    host_private: int = 0
    device: int = 0
    down: int = 0
    up: int = 0


@dataclass(frozen=True, kw_only=True)
class AdamHyper:
    """AdamW's numbers of one step, read from the user's parameter group at that step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Unit(ABC):
    """What one layer sends in one wire format; see the module docstring for the order of the calls."""

    name: str
    layer: int
    wire: str
    group: int  # index of the user's parameter group whose lr, betas, eps and weight decay apply

    def release(self) -> None:  # noqa: B027 - most units listen to nothing
        """Stop listening to the model; called once, at the end."""

    @abstractmethod
    def footprint(self) -> Footprint:
        """Bytes this unit holds and moves at most."""

    @abstractmethod
    def collect(self) -> None:
        """Close the window: turn what the device accumulated into one payload, still on the device."""

    @abstractmethod
    def reduce(self) -> None:
        """Sum the payload over the data-parallel ranks, deterministically; keep the part this rank owns."""

    @abstractmethod
    def send(self, bus: Bus) -> None:
        """Move the owned payload down to the host."""

    @abstractmethod
    def sq_norm(self) -> float:
        """Sum of squares of the owned payload as sent (float64); inf or nan if it holds a non-finite value."""

    @abstractmethod
    def host_step(self, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        """Update the owned state on the host from payload * grad_scale; `step` counts applied updates from 1."""

    @abstractmethod
    def apply(self, bus: Bus) -> None:
        """Move the reply up and make it what the next forward sees. Called once all ranks did their host_step."""

    @abstractmethod
    def discard(self) -> None:
        """Drop the window's payload and leave weights, moments and counters as they were."""

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """The slice of the state that this rank owns, by name; the tensors are live, not copies."""

    @abstractmethod
    def state_range(self) -> tuple[int, int, int]:
        """(lo, hi, total) of the owned slice along dim 0 of every state tensor."""

    def scalars(self) -> dict[str, Any]:
        """Numbers beside the tensors that resuming needs (JSON types)."""
        return {}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Take back what `scalars` gave."""
        assert not scalars, f"unit {self.name} keeps no scalars"

    @abstractmethod
    def after_load(self, bus: Bus) -> None:
        """Derive what is not stored (transfer replicas, device copies) from freshly loaded state tensors."""
