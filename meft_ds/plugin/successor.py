# SPDX-License-Identifier: Apache-2.0
"""One engine after another on the same model, and the way back to a model without adapters."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from torch import nn

from meft_ds.offload.model.hooks import ModelHook
from meft_ds.plugin import registry, trainable

_logger = logging.getLogger("meft_ds")


def detach(model_or_engine: nn.Module) -> None:
    """Remove sparse adapters from a model, which then computes what its base does.

    The model trains again what the program had left trainable. Tensors of the base keep what they have learned. An
    engine that trains the model is destroyed first. A model without adapters stays as it is.

    Args:
        model_or_engine: the model, or the engine that `deepspeed.initialize` returned.

    Example:
        meft_ds.save_adapter(engine, "adapter")
        meft_ds.detach(engine)  # `model` is the base again, ready for another engine
    """
    model = getattr(model_or_engine, "module", model_or_engine)
    make_way(model)
    for extras in registry.EXTRAS:
        extras.remove(model)
    trainable.thaw(model)
    model.__dict__.pop("save_pretrained", None)  # what wrote the adapter beside the base


def make_way(model: nn.Module) -> None:
    """Destroy the engine that trains `model` or parts of it, and let train again what it froze.

    Another engine is about to take the model. Programs that start anew (another batch size, another call of train) do
    not always destroy the one before.
    """
    for engine in {id(e): e for module in model.modules() for e in trained_by(module)}.values():
        _logger.debug("another engine takes the model; the one before is destroyed")
        try:
            engine.destroy()
        except RuntimeError as error:  # it has failed before, or it would still be in use
            _logger.warning("the engine before this one could not end well: %s", error)
    trainable.thaw(model)


class BeforeExport(ModelHook):
    """Before the `state_dict` of the model that an engine was given; it also says which engine that is."""

    def __init__(self, engine: Any = None) -> None:
        self.find = None if engine is None else weakref.ref(engine)

    def __call__(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        if self.find is not None and (engine := self.find()) is not None:
            engine._warn_untrained()


def trained_by(model: nn.Module) -> list[Any]:
    """Return the engines that live and were given `model`, and have not been destroyed."""
    hooks = [hook for hook in model._state_dict_pre_hooks.values() if isinstance(hook, BeforeExport)]
    return [engine for hook in hooks if hook.find is not None and (engine := hook.find()) is not None]
