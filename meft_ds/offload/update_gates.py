# SPDX-License-Identifier: Apache-2.0
"""Update gates: hooks before a model's forwards that let no forward read a parameter while its update is under way.

A parameter has two gates: the module that holds it, and its numbered block (`layers.3`), which may read it without
calling that module. There a forward waits as late as it can. Reads outside a forward wait too
(`meft_ds.offload.waiting`).

A forward may begin at the model, at a model inside it, or at any gate: programs with a loss of their own call what is
inside.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

from meft_ds.offload.model.gradient_checkpointing import inside_backward
from meft_ds.offload.model.hooks import ModelHook
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.unit import Unit

_CALL = nn.Module._wrapped_call_impl.__code__


def install(model: nn.Module, units: Sequence[Unit], pipeline: Pipeline) -> list[Any]:
    """Register the hooks, and return their handles."""
    gates = _Gates(pipeline, units, model.modules())
    guarded: dict[nn.Module, set[int]] = defaultdict(set)
    names = {id(p): name for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    shared = _holders(model)
    for index, unit in enumerate(units):
        for _, p in unit.params:
            for holder in {*shared[id(p)], *_blocks(names[id(p)], modules)}:
                guarded[holder].add(index)
    handles: list[Any] = []
    for outer in {name: modules[name] for p in names.values() for name in _around(p)}.values():
        handles.append(outer.register_forward_pre_hook(_BeforeModelForward(gates), prepend=True))
        handles.append(outer.register_forward_hook(_AfterModelForward(gates), always_call=True))
    handles += [
        model.register_state_dict_pre_hook(_BeforeStateDict(gates)),
        model.register_load_state_dict_pre_hook(
            _BeforeStateDict(gates)
        ),  # what is under way would overwrite what was loaded
    ]
    # these come first: under ZeRO-3 DeepSpeed's hook gathers what the gate may still change
    handles += [
        module.register_forward_pre_hook(_BeforeBlockForward(gates, found), prepend=True)
        for module, found in guarded.items()
    ]
    return handles


def flush(model: nn.Module) -> None:
    """Apply what is under way in the engine that trains `model` or parts of it, if there is one."""
    hooks: list[Any] = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    found = [hook.gates.find() for hook in hooks if isinstance(hook, _Hook)]
    for pipeline in {id(p): p for p in found if p is not None}.values():
        pipeline.flush()


def inside_forward(model: nn.Module) -> bool:
    """Return whether a forward of `model` is running, so that the caller is a signal handler which interrupted it.

    We look on the stacks of all threads. A flag would stay up when Ctrl-C ends a forward, because torch then calls no
    hook.
    """
    for frame in sys._current_frames().values():
        below: FrameType | None = frame
        while below is not None:
            if below.f_code is _CALL and below.f_locals.get("self") is model:
                return True
            below = below.f_back
    return False


class _Gates:
    """What the hooks share. It holds the pipeline weakly, because a model may outlive its engine."""

    def __init__(self, pipeline: Pipeline | None, units: Sequence[Unit], modules: Iterable[nn.Module] = ()) -> None:
        self.find = weakref.ref(pipeline) if pipeline is not None else _nobody
        self.units = [weakref.ref(unit) for unit in units]
        self.outermost: nn.Module | None = None  # whose forward is running; left behind by Ctrl-C
        self._modules = list(modules)

    def need(self, pipeline: Pipeline, index: int) -> None:
        if (unit := self.units[index]()) is not None:
            pipeline.needed(unit)

    @property
    def compiled(self) -> bool:
        """Whether something runs as compiled code, whose guards must not meet a parameter that waits."""
        return any(module._compiled_call_impl is not None for module in self._modules)


class _Hook(ModelHook):
    def __init__(self, gates: _Gates | None = None) -> None:
        self.gates = _Gates(None, ()) if gates is None else gates


class _BeforeModelForward(_Hook):
    """Before the model's forward, or that of a part which holds blocks."""

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any) -> None:
        gates = self.gates
        pipeline = gates.find()
        if pipeline is None or inside_backward():
            return
        # not module.training: a model that `from_pretrained` leaves in eval mode trains too
        training = torch.is_grad_enabled()
        pipeline.begin_forward(training=training)
        if gates.outermost in (None, module):
            gates.outermost = module
            if gates.compiled:
                pipeline.flush()
            if training:
                pipeline.timeline.mark("forward")


class _AfterModelForward(_Hook):
    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        gates = self.gates
        pipeline = gates.find()
        if gates.outermost is not module or pipeline is None or inside_backward():
            return
        gates.outermost = None
        if torch.is_grad_enabled():
            pipeline.timeline.mark("forward_end")


class _BeforeStateDict(_Hook):
    def __call__(self, model: nn.Module, *of_state_dict: Any) -> None:
        if (pipeline := self.gates.find()) is not None:
            pipeline.flush()


class _BeforeBlockForward(_Hook):
    """Before a module's forward: wait for the updates of these units (indices)."""

    def __init__(self, gates: _Gates | None = None, units: Iterable[int] = ()) -> None:
        super().__init__(gates)
        self.units = sorted(units)

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any) -> None:
        pipeline = self.gates.find()
        if pipeline is None:
            return
        if not pipeline.window_begun and torch.is_grad_enabled() and not inside_backward():
            pipeline.begin_forward(training=True)  # the program called a part without `_BeforeModelForward`
        for index in self.units:
            self.gates.need(pipeline, index)


def _nobody() -> None:
    return None


def _holders(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Map the id of each parameter to the modules that hold it themselves; tied weights have several."""
    found: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                found[id(p)].append(module)
    return found


def _blocks(name: str, modules: dict[str, nn.Module]) -> list[nn.Module]:
    """Find the outermost numbered module on the way to a parameter, and those between it and the parameter."""
    parts = name.split(".")[:-1]
    number = _first_number(parts)
    return [modules[".".join(parts[:end])] for end in range(number + 1, len(parts) + 1)]


def _around(name: str) -> list[str]:
    """List the names of the modules around a parameter's block, or around its module; the model's name is ""."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:end]) for end in range(min(_first_number(parts), max(len(parts) - 1, 0)) + 1)]


def _first_number(parts: Sequence[str]) -> int:
    return next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
