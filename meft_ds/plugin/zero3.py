# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3: DeepSpeed goes on partitioning and gathering the parameters, units read the gathered ones and write slices.

DeepSpeed's parameter hooks are built without its optimizer. Its gathers of parameters that units change are made to
wait for updates under way, prefetching ones too.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from meft_ds.offload.model.gradient_checkpointing import inside_backward
from meft_ds.offload.model.hooks import ModelHook
from meft_ds.offload.model.weights import Piece, Weights, rectangles, shape_of
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.unit import Unit
from meft_ds.options import MOST_LISTED, listed


class PartitionedWeights(Weights):
    """Parameters in slices, `ds_tensor` of ceil(numel / ranks) elements (the last ones may be padding).

    Args:
        device: where the model computes.
        group: of the ranks that hold slices.
        hooks: DeepSpeed's own that gather and partition (`DeepSpeedZeRoOffload`).

    Attributes:
        streams: on which slices are written and gathered.
    """

    partitioned = True

    def __init__(self, device: torch.device, group: Any, hooks: Any) -> None:
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.hooks = hooks
        self._device, self._rank = device, torch.distributed.get_rank(group)
        self._on_device: dict[int, Tensor] = {}  # copies of slices that are elsewhere, until they have changed
        self.streams = Streams(device)

    @contextlib.contextmanager
    def whole(self, params: Sequence[Tensor], *, change: bool = False) -> Iterator[None]:
        with deepspeed.zero.GatheredParameters(list(params), modifier_rank=0 if change else None):
            yield

    def pieces(self, p: Tensor, expert: int | None = None, *, write_only: bool = False) -> Iterator[Piece]:
        held, first = self._slice(p)
        if self._is_elsewhere(held) and not write_only:
            # one copy until `changed`: a tensor of several matrices (experts) is asked for once for each of them
            if id(p) not in self._on_device:
                self._on_device[id(p)] = held.to(self._device, copy=True)
            held = self._on_device[id(p)]
        *_, m, n = shape_of(p)
        first -= m * n * (expert or 0)  # counted from the matrix's first element
        for lo, hi, rows, cols in rectangles(max(first, 0), min(first + held.numel(), m * n), n):
            part = held[lo - first : hi - first].view(rows.stop - rows.start, cols.stop - cols.start)
            yield Piece(part, rows, cols, lo)

    def partition_again(self) -> None:
        self.hooks.partition_all_parameters()

    def changed(self, p: Tensor) -> None:
        held: Any = p
        if (copy := self._on_device.pop(id(p), None)) is not None:
            self._slice(p)[0].copy_(copy)
        if held.ds_status.name == "AVAILABLE":  # DeepSpeed keeps small ones gathered; what they hold is old now
            held.partition(has_been_updated=False)
        self.streams.wrote()

    def write(self, p: Tensor, flat: Tensor) -> None:
        local, lo = self._slice(p)
        local.copy_(flat[lo : lo + local.numel()])
        self.changed(p)

    def _is_elsewhere(self, held: Tensor) -> bool:
        return held.device.type != self._device.type

    def _slice(self, p: Tensor) -> tuple[Tensor, int]:
        held: Any = p
        size = held.ds_tensor.ds_numel
        lo = min(size * self._rank, held.ds_numel)
        return held.ds_tensor.detach()[: max(0, min(size, held.ds_numel - lo))], lo


class Streams:
    """Lets gathers on DeepSpeed's own stream wait for what the stream that trains has written."""

    def __init__(self, device: torch.device) -> None:
        self._runtime = None if device.type == "cpu" else torch.get_device_module(device)
        self._training: Any = None
        self._written: Any = None
        self.enter()

    def enter(self) -> None:
        """Note the current stream as the one that trains."""
        if self._runtime is not None:
            self._training = self._runtime.current_stream()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Inside, work on the stream that trains."""
        if self._runtime is None:
            yield
            return
        with self._runtime.stream(self._training):
            yield

    def wrote(self) -> None:
        """Note that the current stream has been given a write."""
        if self._runtime is not None:
            self._written = self._runtime.current_stream().record_event(self._written)

    def read(self) -> None:
        """Let the current stream wait for the last write before it reads."""
        if self._written is not None:
            assert self._runtime is not None
            self._runtime.current_stream().wait_event(self._written)


def guard_gathers(
    model: nn.Module, units: Sequence[Unit], pipeline: Pipeline, weights: PartitionedWeights
) -> list[Any]:
    """Let no gather read a slice that is being updated. Return handles whose `remove` takes the guard away.

    A gate before a module's forward would come too late, because DeepSpeed gathers ahead.
    """
    of = {id(p): weakref.ref(unit) for unit in units for _, p in unit.params}
    find, streams = weakref.ref(pipeline), weights.streams

    def wait_for(params: Sequence[Tensor]) -> None:
        if (alive := find()) is None:
            return
        with streams.training():
            for p in params:
                if (unit := of.get(id(p), _nobody)()) is not None:
                    alive.needed(unit)
        streams.read()

    def before_gather(original: Callable[..., Any], p: Tensor) -> Any:
        def gather(params: Any = None, *args: Any, **kwargs: Any) -> Any:
            given = kwargs.pop("param_list", kwargs.pop("params", params))
            listed = [p] if given is None else list(given)
            wait_for(listed)
            return original(listed, *args, **kwargs)

        return gather

    def around_partition(original: Callable[..., Any], p: Tensor) -> Any:
        def partition(param_list: Any = None, *args: Any, **kwargs: Any) -> Any:
            listed = [p] if param_list is None else list(param_list)
            if kwargs.get("has_been_updated"):  # `GatheredParameters(modifier_rank=...)` says what the program wrote
                for q in listed:
                    if (unit := of.get(id(q), _nobody)()) is not None:
                        unit.adopt_one(q)  # now, while it is whole
            return original(listed, *args, **kwargs)

        return partition

    # DeepSpeed may ask any parameter to gather a list of others, so each of them gets a guard
    guards = [
        _Guard(p, name, before_gather) for p in model.parameters() for name in ("all_gather", "all_gather_coalesced")
    ]
    guards += [_Guard(p, "partition", around_partition) for p in model.parameters()]
    return [*guards, model.register_forward_pre_hook(_Enter(streams), prepend=True)]


class _Enter(ModelHook):
    """Before the model's forward: note the stream that trains."""

    def __init__(self, streams: Streams | None = None) -> None:
        self._streams = streams

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._streams is not None and not inside_backward():
            self._streams.enter()


class _Guard:
    """Puts another function in the place of a parameter's method, until `remove`."""

    def __init__(self, p: Tensor, name: str, standing_in: Callable[[Callable[..., Any], Tensor], Any]) -> None:
        self._p, self._name, self._original = p, name, getattr(p, name)
        setattr(p, name, standing_in(self._original, p))

    def remove(self) -> None:
        """Put the parameter's own method back."""
        setattr(self._p, self._name, self._original)


def _nobody() -> None:
    return None


def consolidated(model: nn.Module) -> dict[str, Tensor] | None:
    """Return the model's state dict with whole weights, on the host of the first rank; None elsewhere. Collective.

    One module's parameters are gathered at a time.
    """
    first = Ranks.everyone().rank == 0
    found: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        params = {name: p for name, p in module._parameters.items() if p is not None}
        with deepspeed.zero.GatheredParameters(list(params.values())):
            for name, p in params.items() if first else ():
                key = f"{prefix}.{name}" if prefix else name
                known = seen.setdefault(id(p), key)
                found[key] = found[known] if known != key else p.detach().cpu().clone()
        for name, buffer in module._buffers.items() if first else ():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer.detach().cpu().clone()
    if not first:
        return None
    order: Mapping[str, Any] = model.state_dict()
    return {key: found[key] for key in order if key in found}


def load_consolidated(model: nn.Module, state: Mapping[str, Tensor], weights: Weights, *, strict: bool) -> None:
    """Take a whole state dict's values into slices and buffers; every rank calls it with the same state.

    Raises:
        RuntimeError: as `nn.Module.load_state_dict` does; nothing has been changed then.
    """
    own = model.state_dict()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    shapes = {name: tuple(shape_of(t)) for name, t in named}
    faults = [f"missing {name}" for name in own if name not in state] if strict else []
    faults += [f"unexpected {name}" for name in state if name not in own] if strict else []
    faults += [
        f"{name} has shape {tuple(state[name].shape)}, expected {shapes[name]}"
        for name in state
        if name in shapes and tuple(state[name].shape) != shapes[name]
    ]
    if faults:
        raise RuntimeError(f"the checkpoint does not fit {type(model).__name__}: " + listed(faults, MOST_LISTED))
    with torch.no_grad():
        for name, p in model.named_parameters(remove_duplicate=False):
            if name in state:
                weights.write(p, state[name].to(p.dtype).reshape(-1))
        for name, buffer in model.named_buffers():
            if name in state:
                buffer.copy_(state[name])
