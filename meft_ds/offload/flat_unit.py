# SPDX-License-Identifier: Apache-2.0
"""Units whose payload is one flat vector: a float32 sum on the device over the window, of which each rank's 1/N goes
down, is updated on the host and comes up again for everybody.

What a wire format adds: how gradients get into the sum, what the host computes from it, and what the reply does to the
parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meft_ds import ops
from meft_ds.offload.host.page_locked import page_locked, taken
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.model.capture import hand_over, tap, untap
from meft_ds.offload.model.weights import WHOLE, Weights, shape_of
from meft_ds.offload.ranks import Ranks, owned_range
from meft_ds.offload.unit import MOMENTS, Footprint, Unit
from meft_ds.offload.waiting import unwatch, watch
from meft_ds.ops.adam import AdamHyper


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a unit stands in a run.

    Attributes:
        name: of the unit, e.g. "layer3.dense".
        layer: position in layer order.
        params: (name, parameter) pairs on the device that the unit updates, all of one dtype.
        group: index of the user's parameter group.
        ranks: data-parallel ranks; this one owns a contiguous 1/N of the vector.
        wire_dtype: dtype of the payload on the bus.
        moments_dtype: float32 or bfloat16.
        on_device: keep the state where the model is and update it there; then nothing uses the bus.
        weights: how to get at the parameters.
        device: where the model computes; None: where the parameters are.
    """

    name: str
    layer: int
    params: list[tuple[str, nn.Parameter]]
    group: int = 0
    ranks: Ranks = Ranks()
    wire_dtype: torch.dtype = torch.float32
    moments_dtype: torch.dtype = torch.float32
    on_device: bool = False
    weights: Weights = WHOLE
    device: torch.device | None = None


class FlatUnit(Unit):
    """One layer's flat payload.

    Args:
        place: where it stands.
        numel: length of the vector.
        state_bytes: bytes of state per element.
        modules: by parameter: the linear layer that hands its activations to `tapped`; None where autograd gives the
            gradient.
    """

    def __init__(self, place: Place, *, numel: int, state_bytes: int, modules: Sequence[nn.Module | None] = ()) -> None:
        self.name, self.layer, self.group, self._ranks = place.name, place.layer, place.group, place.ranks
        self.on_device, self.weights, self.params = place.on_device, place.weights, place.params
        self._wire_dtype, self._moments_dtype = place.wire_dtype, place.moments_dtype
        self.numel, self._state_bytes, self._modules = numel, state_bytes, modules
        self._lo, self._hi = owned_range(numel, place.ranks)
        first = place.params[0][1]
        self._dtype, self._device = first.dtype, first.device if place.device is None else place.device
        self._on_host = self._device.type == "cpu"
        self._payload: Tensor | None = None
        self._host_payload: Tensor | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._waiting: set[int] = set()
        self._update: tuple[AdamHyper, int, float] | None = None  # the last one, until it is applied
        self._norm: float | None = None

    def allocate(self) -> None:
        """Take the memory that `footprint` announced and start collecting gradients."""
        world = self._ranks.world
        own = self._hi - self._lo
        self._acc = torch.zeros(self.numel, dtype=torch.float32, device=self._device)
        # the sum over ranks must not replace the gradient: more of it may come, and then it is summed again
        self._sum = torch.empty_like(self._acc) if world > 1 else None
        self._replies = self._rows(self._dtype) if world > 1 or not self._on_host else None
        if self.on_device and self._replies is not None:
            self._reply = self._replies[-1][:own]
        else:
            self._reply = page_locked(own * self._dtype.itemsize, self._device).view(self._dtype)
        self._await_all()
        for index, (_, p) in enumerate(self.params):
            if p.requires_grad:  # not the weight of a layer that is tapped by an anchor
                self._hooks.append(hand_over(p, self, index))
        for index, module in enumerate(self._modules):
            if module is not None:
                tap(module, self, index, self._kept(index), self.weights.anchor)

    def release(self) -> None:
        """Stop collecting gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for module in self._modules:
            if module is not None:
                untap(module, self)

    def hold(self, apply: Callable[[], None]) -> None:
        if not self.weights.partitioned:  # slices are guarded where they are gathered
            watch((p for _, p in self.params), apply)

    def unhold(self) -> None:
        unwatch(p for _, p in self.params)

    def adopt(self) -> None:
        for _, p in self.params:
            with self.weights.whole([p]):
                self.adopt_one(p)

    def versions(self) -> tuple[int, ...]:
        return () if self.weights.partitioned else tuple(p._version for _, p in self.params)

    def footprint(self) -> Footprint:
        return flat_footprint(
            self.numel,
            self._hi - self._lo,
            dtype=self._dtype,
            wire_dtype=self._wire_dtype,
            state_bytes=self._state_bytes,
            several=self._ranks.world > 1,
            device=self._device,
            on_device=self.on_device,
        )

    # -- gradients -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def add_gradient(self, index: int, grad: Tensor) -> None:
        """Add the gradient of parameter `index` to the window's sum."""

    def tapped(self, index: int, x: Tensor, dy: Tensor) -> None:
        """Add the gradient of parameter `index`, a linear layer's weight: x [..., kept], dy [..., out]."""
        raise AssertionError(f"{type(self).__name__} has modules, and no `tapped` of its own")

    def _kept(self, index: int) -> Tensor | None:
        """Return the input features, int64 [kept], that `tapped` wants of a layer; None for all."""
        return None

    def take(self, index: int, grad: Tensor) -> None:
        """Take parameter `index`'s gradient, which is complete for this backward."""
        self._begin()
        self.add_gradient(index, grad)
        self._received(index)

    def _begin(self) -> None:
        if self.listener is not None:
            self.listener.gradient(self)

    def _received(self, index: int) -> None:
        self._waiting.discard(index)
        if not self._waiting:
            self._await_all()
            self._all_received()

    def _all_received(self) -> None:
        if self.listener is not None:
            self.listener.complete(self)

    def _await_all(self) -> None:
        self._waiting = set(range(len(self.params)))

    # -- stages --------------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        self._payload = self._acc

    def reduce(self, ranks: Ranks) -> None:
        assert self._payload is not None
        if self._sum is not None:
            self._sum.copy_(self._payload)
            dist.all_reduce(self._sum, group=ranks.group)
            self._payload = self._sum[self._lo : self._hi]

    def send(self, bus: Bus) -> None:
        assert self._payload is not None
        if self.on_device:
            self._host_payload = self._payload
            # read here, on the stream that waits for this payload alone: where `sq_norm` runs, a read would wait for
            # all of the backward that is queued by then
            self._norm = float(torch.linalg.vector_norm(self._payload, dtype=torch.float64).square())
        else:
            self._host_payload = bus.send(self._payload, self._wire_dtype, self.wire, key=self.name)
        self._payload = None

    def sq_norm(self) -> float:
        if self.on_device:
            assert self._norm is not None
            return self._norm
        assert self._host_payload is not None
        return ops.sq_norm(self._host_payload)

    @abstractmethod
    def update(self, grad: Tensor, reply: Tensor, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        """Update the owned state from grad * grad_scale and write what goes up, both [own] where the state lives."""

    def host_step(self, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        self._update = hyper, step, grad_scale
        if not self.on_device:
            self._run_update()

    def _run_update(self) -> None:
        assert self._update is not None and self._host_payload is not None
        hyper, step, grad_scale = self._update
        self.update(self._host_payload, self._reply, hyper, step=step, grad_scale=grad_scale)

    def fetch(self, bus: Bus, ranks: Ranks) -> None:
        if self.on_device and self._update is not None:
            # here and not in `host_step`, because this runs on the stream that `apply` waits for
            self._run_update()
        if self._replies is None:
            if not self.on_device:
                bus.count(self.wire, up=self._reply.numel() * self._reply.element_size())
            return
        *everyone, mine = self._replies.unbind(0)
        if not self.on_device:
            bus.up_into(mine[: self._reply.numel()], self._reply, self.wire)
        if everyone:
            dist.all_gather(everyone, mine, group=ranks.group)

    @abstractmethod
    def change(self, reply: Tensor) -> None:
        """Let the whole reply, flat [numel], change the parameters; under `no_grad`."""

    @torch.no_grad()
    def apply(self) -> None:
        # alone, this rank's part is all there is, and where the state is on the device it is the reply itself
        self.change(self._joined([self._reply] if self._replies is None else self._replies[: self._ranks.world]))
        self._update = None
        self._open_window()

    def clear_gradients(self) -> None:
        for _, p in self.params:
            if p.grad is not None:
                p.grad = None

    def forget(self) -> None:
        self._acc.zero_()
        self._await_all()

    def discard(self) -> None:
        self._update = None
        self._open_window()

    # -- state in the shapes of parameters --------------------------------------------------------------------------

    def full(self, index: int) -> Tensor:
        _, p = self.params[index]
        with self.weights.whole([p]):
            return p.detach().to(torch.float32, copy=True)

    @torch.no_grad()
    def set_full(self, index: int, value: Tensor) -> None:
        _, p = self.params[index]
        self.weights.write(p, self._checked(index, value).to(p.dtype).reshape(-1))

    def full_moment(self, index: int, key: str) -> Tensor:
        raise ValueError(self._no_moment(index, key))

    def set_full_moment(self, index: int, value: Tensor, key: str) -> None:
        raise ValueError(self._no_moment(index, key))

    def _no_moment(self, index: int, key: str) -> str:
        name = self.params[index][0]
        if key not in MOMENTS:
            return f"meft-ds: {name} has no optimizer state {key!r}; AdamW's are {' and '.join(MOMENTS)}"
        return f"meft-ds: {name} has no {key} in its own shape: it trains in the {self.wire!r} format"

    def _checked(self, index: int, value: Tensor) -> Tensor:
        name, p = self.params[index]
        if value.shape != shape_of(p):
            raise ValueError(f"meft-ds: {name} has shape {tuple(shape_of(p))}, but the value has {tuple(value.shape)}")
        return value.to(self._device, torch.float32)

    def gathered(self, own: Tensor) -> Tensor:
        """Gather a vector [numel], on the device, of which every rank gives its slice `own`. Collective."""
        if self._ranks.world == 1:
            return own.to(self._device)
        *everyone, mine = self._rows(own.dtype).unbind(0)
        mine[: self._hi - self._lo] = own
        dist.all_gather(everyone, mine, group=self._ranks.group)
        return self._joined(everyone)

    def state_range(self) -> tuple[int, int, int]:
        return self._lo, self._hi, self.numel

    def _open_window(self) -> None:
        self._acc.zero_()
        self._payload = self._host_payload = None
        self._await_all()

    def _rows(self, dtype: torch.dtype) -> Tensor:
        """Return a row per rank, and one more for what this rank gives if there are others.

        All are as long as the longest slice, because not every backend gathers slices of different sizes.
        """
        world, longest = self._ranks.world, max(hi - lo for lo, hi in self._slices())
        return torch.zeros(world + (world > 1), longest, dtype=dtype, device=self._device)

    def _joined(self, rows: Iterable[Tensor]) -> Tensor:
        """Return the slices that begin the ranks' rows as one vector [numel]."""
        parts = [row[: hi - lo] for row, (lo, hi) in zip(rows, self._slices(), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _slices(self) -> list[tuple[int, int]]:
        world = self._ranks.world
        return [owned_range(self.numel, Ranks(rank=k, world=world)) for k in range(world)]


def flat_footprint(
    numel: int,
    own: int,
    *,
    dtype: torch.dtype,
    wire_dtype: torch.dtype,
    state_bytes: int,
    several: bool,
    device: torch.device,
    on_device: bool,
) -> Footprint:
    """Return what a `FlatUnit` of `numel` elements takes and moves, of which this rank owns `own`.

    Args:
        dtype: of the parameters, and so of what comes up.
        wire_dtype: of what goes down.
        state_bytes: bytes of state per owned element.
        several: whether there is more than one rank.
        device: where the model is.
        on_device: whether the state is where the model is.
    """
    size, wire = dtype.itemsize, wire_dtype.itemsize
    # a float32 sum of gradients, its sum over ranks, and the replies of all ranks
    there = numel * (4 + 4 * several + size * (several or device.type != "cpu"))
    if on_device:
        return Footprint(device=there + own * state_bytes)
    return Footprint(
        host_private=own * state_bytes + taken(own * size, device) + taken(own * wire, device),
        payload=own * wire,
        device=there,
        down=own * wire,
        up=own * size,
    )
