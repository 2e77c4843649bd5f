# SPDX-License-Identifier: Apache-2.0
"""The only room that knows DeepSpeed: it gives `DeepSpeedEngine.__new__` one decision and holds every override.

A config with a `"meft_offload"` block yields `MeftEngine`; any other config yields exactly what DeepSpeed would have
built. Nothing else of DeepSpeed's is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

BLOCK = "meft_offload"
_MARK = "_meft_ds_new"


def install(engine_module: ModuleType) -> None:
    """Put the decision into `DeepSpeedEngine.__new__`; called once `deepspeed.runtime.engine` is loaded. Idempotent."""
    engine_class = engine_module.DeepSpeedEngine
    if _MARK in vars(engine_class):
        return
    original = engine_class.__new__

    def decide(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not _has_block(args, kwargs):
            return original(cls) if original is object.__new__ else original(cls, *args, **kwargs)
        from meft_ds.plugin.engine import MeftEngine, refuse_engine

        if cls is not engine_class and not issubclass(cls, MeftEngine):
            refuse_engine(cls)
        return object.__new__(MeftEngine)

    engine_class.__new__ = staticmethod(decide)
    setattr(engine_class, _MARK, True)


def _has_block(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return BLOCK in ds_config_of(args, kwargs)


def ds_config_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ds_config dict among an engine's constructor arguments.

    `config` may still be a file name (DeepSpeed 0.18), but `config_class` always holds the dict that was read from it.
    """
    config = kwargs.get("config")
    if not isinstance(config, Mapping):
        config = getattr(kwargs.get("config_class"), "_param_dict", {})
    return config if isinstance(config, Mapping) else {}


__all__ = ["BLOCK", "ds_config_of", "install"]
