# SPDX-License-Identifier: Apache-2.0
"""Gates: hooks before a model's forwards that let no parameter be read while its update is under way.

A parameter's gates are the module that holds it and, for parameters inside a numbered block (`layers.3`), that block,
which may read them without calling their module. Until a unit's gates were seen to open before its gradients came, the
whole model's forward waits for it instead.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

from meft_ds.offload.flat import FlatUnit
from meft_ds.offload.pipeline import Pipeline

_CALL = nn.Module._wrapped_call_impl.__code__


def install(model: nn.Module, units: Sequence[FlatUnit], pipeline: Pipeline) -> list[Any]:
    """Register the hooks; returns their handles."""
    gates = _Gates(pipeline, units)
    guarded: dict[nn.Module, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    names = {id(p): name for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    shared = _holders(model)
    for index, unit in enumerate(units):
        for slot, (_, p) in enumerate(unit.params):
            for holder in {*shared[id(p)], *_blocks(names[id(p)], modules)}:
                guarded[holder][index].add(slot)
    handles: list[Any] = [
        model.register_forward_pre_hook(_Open(gates), prepend=True),
        model.register_forward_hook(_Close(gates), always_call=True),
        model.register_state_dict_pre_hook(_Flush(gates)),
        model.register_load_state_dict_pre_hook(_Flush(gates)),  # what is under way would overwrite what was loaded
    ]
    # first, because under ZeRO-3 a hook of DeepSpeed's gathers what the gate may still change
    handles += [
        module.register_forward_pre_hook(_Pass(gates, found), prepend=True) for module, found in guarded.items()
    ]
    return handles


def flush(model: nn.Module) -> None:
    """Apply what is under way in the engine that trains `model` or parts of it, if there is one."""
    hooks: list[Any] = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    found = [hook.gates.find() for hook in hooks if isinstance(hook, _Hook)]
    for pipeline in {id(p): p for p in found if p is not None}.values():
        pipeline.flush()


def inside_forward(model: nn.Module) -> bool:
    """Whether a forward of `model` is running, which whoever asks has then interrupted, as signal handlers do.

    It is looked up on the stacks: a flag would stay up when Ctrl-C ends a forward, for which torch calls no hook.
    """
    for frame in sys._current_frames().values():
        below: FrameType | None = frame
        while below is not None:
            if below.f_code is _CALL and below.f_locals.get("self") is model:
                return True
            below = below.f_back
    return False


class _Gates:
    """What the hooks share. It holds the pipeline weakly: a model may outlive its engine."""

    def __init__(self, pipeline: Pipeline | None, units: Sequence[FlatUnit]) -> None:
        self.find = weakref.ref(pipeline) if pipeline is not None else _nobody
        self.units = [weakref.ref(unit) for unit in units]
        self.unseen = [set(range(len(unit.params))) for unit in units]  # parameters whose gates never opened yet

    def need(self, pipeline: Pipeline, index: int) -> None:
        if (unit := self.units[index]()) is not None:
            pipeline.needed(unit)


class _Hook:
    def __init__(self, gates: _Gates) -> None:
        self.gates = gates

    def __reduce__(self) -> Any:
        # a copy of the model is not trained by this engine: its hooks find nobody
        return type(self), (_Gates(None, ()),)


class _Open(_Hook):
    def __call__(self, model: nn.Module, args: Any) -> None:
        pipeline = self.gates.find()
        if pipeline is None or _recomputing():
            return
        pipeline.begin_forward(training=model.training)
        for index, unseen in enumerate(self.gates.unseen):
            if unseen:
                self.gates.need(pipeline, index)
        if model.training:
            pipeline.timeline.mark("forward")


class _Close(_Hook):
    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        pipeline = self.gates.find()
        if pipeline is not None and model.training and not _recomputing():
            pipeline.timeline.mark("forward_end")


class _Flush(_Hook):
    def __call__(self, model: nn.Module, *of_state_dict: Any) -> None:
        if (pipeline := self.gates.find()) is not None:
            pipeline.flush()


class _Pass(_Hook):
    """Gate of the parameters `slots` of units by their index."""

    def __init__(self, gates: _Gates, slots: Mapping[int, set[int]] | None = None) -> None:
        super().__init__(gates)
        self.slots = dict(slots or {})

    def __call__(self, module: nn.Module, args: Any) -> None:
        pipeline = self.gates.find()
        if pipeline is None:
            return
        for index, slots in self.slots.items():
            if self.gates.unseen[index]:
                self.gates.unseen[index] -= slots
            self.gates.need(pipeline, index)


def _nobody() -> None:
    return None


def _recomputing() -> bool:
    """A forward inside backward repeats one for gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def _holders(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Modules that hold each parameter themselves, by its id; several for tied weights."""
    found: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                found[id(p)].append(module)
    return found


def _blocks(name: str, modules: dict[str, nn.Module]) -> list[nn.Module]:
    """The outermost numbered module on the way to a parameter, and those between it and the parameter."""
    parts = name.split(".")[:-1]
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return []
    return [modules[".".join(parts[:end])] for end in range(number + 1, len(parts) + 1)]
