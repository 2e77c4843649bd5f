# SPDX-License-Identifier: Apache-2.0
"""What `zero_grad` forgets: what plain DeepSpeed forgets in the same place, measured on DeepSpeed 0.19.8.

    stage    engine.zero_grad()    optimizer.zero_grad()    module.zero_grad()
    0, 1     the window            the window               the window
    2        (*)                   (*)                      (*)
    3        nothing               the window               nothing

(*) The window once its last backward has come (with an accumulation of 1, any); before that nothing, because DeepSpeed
keeps what it accumulates apart from the gradients of parameters.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal

from torch import nn

from meft_ds.offload.model.hooks import ModelHook

Call = Literal["engine", "optimizer", "module"]


def forgets(call: Call, stage: int, *, closing: bool) -> bool:
    """Return whether `call` drops what the open window has collected. `closing`: its last backward has come."""
    if stage == 3:
        return call == "optimizer"
    return closing if stage == 2 else True


class ModuleZeroGrad(ModelHook):
    """A model's own `zero_grad`, which an engine learns of. Copies of the model get their class's."""

    def __init__(self, module: nn.Module, engine: Any = None) -> None:
        self._module = weakref.ref(module)
        self._engine = None if engine is None else weakref.ref(engine)

    def __call__(self, set_to_none: bool = True) -> None:
        if (module := self._module()) is not None:
            type(module).zero_grad(module, set_to_none)
        if self._engine is not None and (engine := self._engine()) is not None:
            engine._forget_window("module")

    def of_copy(self) -> tuple[Any, ...]:
        return (self._module(),)
