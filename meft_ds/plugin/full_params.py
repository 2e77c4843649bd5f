# SPDX-License-Identifier: Apache-2.0
"""`deepspeed.utils.safe_get_full_fp32_param` and its relatives, which ask a parameter for its fp32 state.

DeepSpeed looks for the answer in attributes of the parameter: `get_full_hp_param` in stages 0 to 2, `_z3_optimizer` in
stage 3. Ours ask the unit that trains the parameter. As in DeepSpeed, all ranks must ask.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.unit import Unit

_OF_STAGES_0_TO_2 = ("_hp_mapping", "get_full_hp_param", "set_full_hp_param", "get_full_hp_grad", "set_full_hp_grad")


def attach(model: nn.Module, pipeline: Pipeline) -> None:
    """Let every parameter of `model` answer for its fp32 state."""
    state = _FullState(pipeline)
    for name, p in model.named_parameters():
        held: Any = p
        if hasattr(p, "ds_id"):
            held._z3_optimizer = state
        else:
            # DeepSpeed only looks whether it is there; our class tells it from DeepSpeed's own
            get, get_grad = state.get_full_hp_param, state.get_fp32_grad_for_param
            calls: tuple[Callable[..., Any], ...] = get, get, state.set_for, get_grad, state.refuse_grad
            p.__dict__.update({key: _Answer(call, p) for key, call in zip(_OF_STAGES_0_TO_2, calls, strict=True)})
        state.names[id(p)] = name


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for p in model.parameters():
        if isinstance(p.__dict__.get("_z3_optimizer"), _FullState):
            del p.__dict__["_z3_optimizer"]
        if isinstance(p.__dict__.get("_hp_mapping"), _Answer):
            for name in _OF_STAGES_0_TO_2:
                p.__dict__.pop(name, None)


class _FullState:
    """What DeepSpeed asks of a ZeRO-3 optimizer about one parameter, under the names that it uses there."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._find = weakref.ref(pipeline)
        self.names: dict[int, str] = {}

    def get_full_hp_param(self, param: Tensor, optim_state_key: str | None = None) -> Tensor | None:
        """Return the fp32 master in the parameter's shape, on its device; None where it is frozen. Collective.

        `optim_state_key`: return this moment of AdamW's instead.

        Raises:
            ValueError: for state that the method does not hold in the parameter's shape.
        """
        found = self._unit_of(param)
        if found is None:
            return None
        unit, index = found
        return unit.full(index) if optim_state_key is None else unit.full_moment(index, optim_state_key)

    def set_full_hp_param(self, value: Tensor, param: Tensor, optim_state_key: str | None = None) -> None:
        """Take back what `get_full_hp_param` gave; the model's own weight follows at once. Collective."""
        found = self._unit_of(param)
        if found is None:
            raise ValueError(
                f"meft-ds: {self.names.get(id(param), 'this parameter')} does not train under meft_offload, so it has "
                "no fp32 state to set; write the parameter itself"
            )
        unit, index = found
        if optim_state_key is None:
            unit.set_full(index, value)
        else:
            unit.set_full_moment(index, value, optim_state_key)

    def set_for(self, param: Tensor, value: Tensor, optim_state_key: str | None = None) -> None:
        """Call `set_full_hp_param` with the order of arguments of stages 0 to 2."""
        self.set_full_hp_param(value, param, optim_state_key)

    def get_fp32_grad_for_param(self, param: Tensor) -> None:
        """Return None, which DeepSpeed documents as "not there": gradients leave for the host during backward."""

    def refuse_grad(self, param: Tensor, value: Tensor) -> None:
        """Raise: a gradient that is set would not be the one that trains."""
        raise ValueError(
            f"meft-ds: the gradient of {self.names.get(id(param), 'this parameter')} cannot be set: it leaves for the "
            "host during backward. Change the loss or gradients by a tensor hook on the layer's output instead"
        )

    def set_fp32_grad_for_param(self, value: Tensor, param: Tensor) -> None:
        """See `refuse_grad`."""
        self.refuse_grad(param, value)

    def update_fp32_grad_for_param_vectorized(self, update: Any, params: list[Tensor]) -> None:
        """See `refuse_grad`."""
        self.refuse_grad(params[0], params[0])

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(("get_local", "set_local")):
            raise AttributeError(f"meft_offload has no {name}")

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise ValueError(
                "meft-ds: meft_offload does not slice its fp32 state as ZeRO-3 does; use safe_get_full_fp32_param or "
                "safe_set_full_fp32_param instead of the local ones"
            )

        return refuse

    def _unit_of(self, param: Tensor) -> tuple[Unit, int] | None:
        pipeline = self._find()
        if pipeline is None:
            return None
        for unit in pipeline.units:
            for index, (_, p) in enumerate(unit.params):
                if p is param:
                    pipeline.touched(unit)
                    return unit, index
        return None

    def __reduce__(self) -> Any:
        return OrderedDict, ()  # a pickled parameter is not trained by this engine


class _Answer:
    """A call about one parameter. It does not hold the parameter, which holds it."""

    def __init__(self, call: Callable[..., Any], p: Tensor) -> None:
        self._call, self._find = call, weakref.ref(p)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._find(), *args, **kwargs)

    def __reduce__(self) -> Any:
        return OrderedDict, ()  # which torch.load(weights_only=True) knows
