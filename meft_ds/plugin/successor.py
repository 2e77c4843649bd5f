# SPDX-License-Identifier: Apache-2.0
"""One engine after another on the same model, and the way back to a model without adapters."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from meft_ds.plugin import trainable
from meft_ds.sparse_adapter import attach, base

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
    for module in list(model.modules()):
        attach.detach(module)
        base.forget(module)
    trainable.thaw(model)
    model.__dict__.pop("save_pretrained", None)  # what wrote the adapter beside the base


def make_way(model: nn.Module) -> None:
    """Before another engine takes `model`: destroy the one that trains it or parts of it, and let train again what it
    froze. Programs that start anew (another batch size, another call of train) do not always destroy it."""
    for engine in {id(e): e for module in model.modules() for e in _engines_of(module)}.values():
        _logger.debug("another engine takes the model; the one before is destroyed")
        try:
            engine.destroy()
        except RuntimeError as error:  # it has failed before, or it would still be in use
            _logger.warning("the engine before this one could not end well: %s", error)
    trainable.thaw(model)


def _engines_of(module: nn.Module) -> list[Any]:
    """Engines that live and train exactly this module; a copy of it is trained by none."""
    from meft_ds.plugin.checkpoint.overrides import trained_by

    return [engine for engine in trained_by(module) if engine.module is module]
