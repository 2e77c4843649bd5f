# SPDX-License-Identifier: Apache-2.0
"""The only room that knows DeepSpeed: it gives `DeepSpeedEngine.__new__` one decision and holds every override.

A config with a `"meft_offload"` block yields `MeftEngine`, unless the engine cannot train; any other config yields
exactly what DeepSpeed would have built. Nothing else of DeepSpeed's is touched.

Files: decision (whose engine?), engine (the overrides), build (ranks, plan, memory check, units, pipeline), runtime
(what build made), registry (the methods), ds_config (what does not go with the block), optimizer and hyper (what
DeepSpeed sees of the pipeline), trainable (what trains of the base), zero3 (partitioned weights), telemetry
(`meft_stats()` and monitors), full_params, replaced and zero_grad (what programs do to parameters between steps),
successor (a second engine on a model), console (log lines),
build_locks (what a start waits for for ever). Room: checkpoint (files).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from meft_ds.plugin import build_locks
from meft_ds.plugin.decision import (
    BLOCK,
    ds_config_of,
    only_evaluates,
    say_why,
    warn_of_misspelt_block,
    without_training,
)

_MARK = "_meft_ds_new"


def install(engine_module: ModuleType) -> None:
    """Put the decision into `DeepSpeedEngine.__new__`; called once `deepspeed.runtime.engine` is loaded. Idempotent."""
    engine_class = engine_module.DeepSpeedEngine
    build_locks.watch()
    if _MARK in vars(engine_class):
        return
    original = engine_class.__new__

    def theirs(cls: type, *args: Any, **kwargs: Any) -> Any:
        return original(cls) if original is object.__new__ else original(cls, *args, **kwargs)

    def decide(cls: type, *args: Any, **kwargs: Any) -> Any:
        ds_config = ds_config_of(args, kwargs)
        if BLOCK not in ds_config:
            warn_of_misspelt_block(ds_config)
            return theirs(cls, *args, **kwargs)
        from meft_ds.plugin.engine import MeftEngine, refuse_engine

        if cls is not engine_class and not issubclass(cls, MeftEngine):
            refuse_engine(cls)
        if cls is engine_class and (why := only_evaluates(kwargs, ds_config)) is not None:
            say_why(why)
            without_training(kwargs, ds_config)
            return theirs(cls, *args, **kwargs)
        return object.__new__(MeftEngine)

    engine_class.__new__ = staticmethod(decide)
    setattr(engine_class, _MARK, True)


__all__ = ["BLOCK", "ds_config_of", "install"]
