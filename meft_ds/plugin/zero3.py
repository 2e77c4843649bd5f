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

from meft_ds.offload.flat import FlatUnit
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.weights import Weights, shape_of


class PartitionedWeights(Weights):
    """Parameters in slices, `ds_tensor` of ceil(numel / ranks) elements (the last ones may be padding)."""

    partitioned = True

    def __init__(self, device: torch.device, group: Any) -> None:
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._rank = torch.distributed.get_rank(group)

    @contextlib.contextmanager
    def whole(self, params: Sequence[Tensor]) -> Iterator[None]:
        with deepspeed.zero.GatheredParameters(list(params)):
            yield

    def local(self, p: Tensor) -> tuple[Tensor, int]:
        held: Any = p
        size = held.ds_tensor.ds_numel
        lo = min(size * self._rank, held.ds_numel)
        return held.ds_tensor.detach()[: max(0, min(size, held.ds_numel - lo))], lo

    def changed(self, p: Tensor) -> None:
        held: Any = p
        if held.ds_status.name == "AVAILABLE":  # small ones stay gathered: what they hold is old now
            held.partition(has_been_updated=False)

    def write(self, p: Tensor, flat: Tensor) -> None:
        local, lo = self.local(p)
        local.copy_(flat[lo : lo + local.numel()])
        self.changed(p)


def guard_gathers(model: nn.Module, units: Sequence[FlatUnit], pipeline: Pipeline) -> list[Any]:
    """Let no gather read a slice that is being updated; returns handles whose `remove` takes the guard away.

    A gate before a module's forward would come too late, because DeepSpeed gathers ahead.
    """
    of = {id(p): weakref.ref(unit) for unit in units for _, p in unit.params}
    find = weakref.ref(pipeline)

    def wait_for(params: Sequence[Tensor]) -> None:
        if (alive := find()) is None:
            return
        for p in params:
            if (unit := of.get(id(p), _nobody)()) is not None:
                alive.needed(unit)

    # every parameter, because any of them may be asked to gather a list of others
    return [_Guard(p, name, wait_for) for p in model.parameters() for name in ("all_gather", "all_gather_coalesced")]


class _Guard:
    """Stands before one of the two gathers of a parameter."""

    def __init__(self, p: Tensor, name: str, wait_for: Callable[[Sequence[Tensor]], None]) -> None:
        self._p, self._name, self._original = p, name, getattr(p, name)
        original = self._original

        def gather(params: Any = None, *args: Any, **kwargs: Any) -> Any:
            given = kwargs.pop("param_list", kwargs.pop("params", params))
            listed = [p] if given is None else list(given)
            wait_for(listed)
            return original(listed, *args, **kwargs)

        setattr(p, name, gather)

    def remove(self) -> None:
        """Put the parameter's own gather back."""
        setattr(self._p, self._name, self._original)


def _nobody() -> None:
    return None


def consolidated(model: nn.Module) -> dict[str, Tensor] | None:
    """The model's state dict with whole weights, on the host of the first rank (None elsewhere). Collective.

    One module's parameters are gathered at a time.
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
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
    shapes = {name: tuple(shape_of(t)) for name, t in [*model.named_parameters(remove_duplicate=False)]}
    faults = [f"missing {name}" for name in own if name not in state] if strict else []
    faults += [f"unexpected {name}" for name in state if name not in own] if strict else []
    faults += [
        f"{name} has shape {tuple(state[name].shape)}, expected {shapes[name]}"
        for name in state
        if name in shapes and tuple(state[name].shape) != shapes[name]
    ]
    if faults:
        raise RuntimeError(f"the checkpoint does not fit {type(model).__name__}: " + "; ".join(faults[:20]))
    with torch.no_grad():
        for name, p in model.named_parameters(remove_duplicate=False):
            if name in state:
                weights.write(p, state[name].to(p.dtype).reshape(-1))
        for name, buffer in model.named_buffers():
            if name in state:
                buffer.copy_(state[name])
