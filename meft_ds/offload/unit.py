# SPDX-License-Identifier: Apache-2.0
"""The wire-format contract: what a unit must answer so that the pipeline can carry it without knowing its method.

A *unit* is what one layer moves in one wire format. The pipeline drives every unit through the same stages, once per
accumulation window:

    collect -> reduce -> send -> sq_norm -> host_step -> fetch -> apply
    device     down lane         host lane               up lane  device

with `discard` in place of the last three when the window overflowed.

A lane runs one stage at a time, in an order that is the same on every rank, so stages of different units overlap and
those of one unit never do. `collect` and `apply` run on the thread that trains. A new wire format is one subclass and
one registration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.ranks import Ranks
from meft_ds.ops.adam import AdamHyper


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes a unit needs, known before anything is allocated.

    `host_shared` is held once per node however many ranks share it, `host_private` by this rank alone, page-locked
    memory as it is taken (`page_locked.taken`). `payload` is the size of the page-locked buffer for the way down.
    `down` and `up` are upper bounds for one accumulation window.
    """

    host_shared: int = 0
    host_private: int = 0
    payload: int = 0
    device: int = 0
    down: int = 0
    up: int = 0


MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments in `Unit.state_tensors`. They may be loaded in another dtype than they were saved in."""


class Listener(Protocol):
    """Whom a unit tells what happens to it on the thread that trains."""

    def gradient(self, unit: Unit) -> None:
        """Note that a gradient arrived; called before it is added to the window."""

    def complete(self, unit: Unit) -> None:
        """Note that the backward has probably given everything it will (wrong guesses only cost time)."""

    def needed(self, unit: Unit) -> None:
        """Bring up to date what the unit updates: it is about to be read."""


class Unit(ABC):
    """What one layer sends in one wire format; see the module docstring for the order of the calls."""

    name: str
    layer: int
    wire: str  # name of the format, in statistics (bytes by channel) and in manifests
    group: int  # index of the user's parameter group whose lr, betas, eps and weight decay apply
    listener: Listener | None = None
    params: Sequence[tuple[str, nn.Parameter]] = ()  # of the model, by name, that the unit changes
    weight_state: frozenset[str] = frozenset()  # what of `state_tensors` belongs to the weights, not to the optimizer

    def release(self) -> None:  # noqa: B027 - most units listen to nothing
        """Stop listening to the model; called once, at the end."""

    def hold(self, apply: Callable[[], None]) -> None:  # noqa: B027 - rows wait by themselves
        """Have `apply` called before anything touches what the update that is under way changes."""

    def unhold(self) -> None:  # noqa: B027 - rows wait by themselves
        """Let go: the update was applied, or never will be."""

    def adopt(self) -> None:  # noqa: B027 - not all formats keep a copy of what the model holds
        """Let the state follow what the program wrote into the unit's parameters. Nothing of the unit is under way."""

    def versions(self) -> tuple[int, ...]:
        """Return numbers that change when the program writes into the unit's parameters.

        None where `adopt` is not the pipeline's to call.
        """
        return ()

    @abstractmethod
    def footprint(self) -> Footprint:
        """Return the bytes that this unit holds and moves at most."""

    @abstractmethod
    def collect(self) -> None:
        """Take what the device accumulated in the window as the payload, still on the device.

        The accumulated gradient itself stays until `apply` or `discard`: when more of it arrives, the unit is
        collected again and everything up to `sq_norm` is repeated.
        """

    @abstractmethod
    def reduce(self, ranks: Ranks) -> None:
        """Sum the payload over the data-parallel ranks, deterministically; keep the part this rank owns."""

    @abstractmethod
    def send(self, bus: Bus) -> None:
        """Move the owned payload down into the unit's page-locked buffer; it is there when the lane's job ends.

        What `collect` made is kept until then: the stream that made it does not wait for the lane's.
        """

    @abstractmethod
    def sq_norm(self) -> float:
        """Return the sum of squares of the owned payload as sent (float64); inf or nan if a value is not finite."""

    @abstractmethod
    def host_step(self, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        """Update the owned state on the host from payload * grad_scale; `step` counts the unit's updates from 1."""

    @abstractmethod
    def fetch(self, bus: Bus, ranks: Ranks) -> None:
        """Move the reply up, beside what the model reads, and wait until every rank's part of it is there."""

    @abstractmethod
    def apply(self) -> None:
        """Make the reply what the next forward sees and open the next window. Device work only."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what the open window has collected. A payload of it may be under way on a lane: leave that alone, it
        goes again."""

    def clear_gradients(self) -> None:  # noqa: B027 - rows take theirs at once
        """Drop gradients that autograd made and an interrupt kept from being taken; a forward begins."""

    @abstractmethod
    def discard(self) -> None:
        """Drop the window's payload, open the next window, leave weights, moments and counters as they were."""

    @property
    def saves_state(self) -> bool:
        """Whether this rank's slice belongs into a checkpoint, and into the norm: not where another node has it too."""
        return True

    # -- of units with `params` ----------------------------------------------------------------------------------------

    def adopt_one(self, p: Tensor) -> None:  # noqa: B027 - not all formats keep a copy of what the model holds
        """Do what `adopt` does for one parameter, which is whole now: partitioned ones are so inside a gather."""

    def full(self, index: int) -> Tensor:
        """Return parameter `index` in float32, on the device, as exactly as the unit knows it. Collective.

        Raises:
            ValueError: when the format cannot tell; so do the three below.
        """
        raise self._has_no_full()

    def set_full(self, index: int, value: Tensor) -> None:
        """Take back what `full` gave; the parameter follows. Every rank gives the same value."""
        raise self._has_no_full()

    def full_moment(self, index: int, key: str) -> Tensor:
        """Return AdamW's moment `key` of parameter `index`, float32, as `full`. Collective."""
        raise self._has_no_full()

    def set_full_moment(self, index: int, value: Tensor, key: str) -> None:
        """Take back what `full_moment` gave."""
        raise self._has_no_full()

    def _has_no_full(self) -> ValueError:
        return ValueError(f"meft-ds: parameters that train in the {self.wire!r} format cannot be read or set in full")

    # -- state ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """Return the slice of the state that this rank owns, by name; the tensors are live, not copies."""

    def shared_tensors(self) -> dict[str, Tensor]:
        """Return the state that every rank holds whole, by name."""
        return {}

    def load_shared(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `shared_tensors` gave."""
        assert not tensors, f"unit {self.name} shares no state"

    @abstractmethod
    def state_range(self) -> tuple[int, int, int]:
        """Return (lo, hi, total) of the owned slice along dim 0 of every state tensor."""

    def scalars(self) -> dict[str, Any]:
        """Return the numbers beside the tensors that resuming needs (JSON types)."""
        return {}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Take back what `scalars` gave."""
        assert not scalars, f"unit {self.name} keeps no scalars"

    @abstractmethod
    def after_load(self) -> None:
        """Derive what is not stored on the host (transfer replicas) from freshly loaded state tensors."""
