# SPDX-License-Identifier: Apache-2.0
"""Whether an engine's constructor arguments ask for our engine; small, because every DeepSpeed program imports it.

Programs copy their ds_config for reference, reward and teacher models, and evaluate before they train. Such an engine
is DeepSpeed's own, as if the block and the optimizer were not there. All that counts is equal on every rank.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

BLOCK = "meft_offload"
_log = logging.getLogger("meft_ds")
_told: set[str] = set()  # one warning for each key, however often the program copies its ds_config


def ds_config_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the ds_config dict among an engine's constructor arguments.

    `config` may still be a file name (DeepSpeed 0.18), but `config_class` always holds the dict that was read from it.
    """
    config = kwargs.get("config")
    if not isinstance(config, Mapping):
        config = getattr(kwargs.get("config_class"), "_param_dict", {})
    return config if isinstance(config, Mapping) else {}


def only_evaluates(kwargs: Mapping[str, Any], ds_config: Mapping[str, Any]) -> str | None:
    """Return why an engine with these constructor arguments cannot train, or None if it can.

    An optimizer that the program made itself always means training: adapters train beside a base that is all frozen.
    """
    optimizer = kwargs.get("optimizer")
    if optimizer is not None and type(optimizer).__name__ != "DummyOptim":  # accelerate's stands for the JSON's
        return None
    if not (ds_config.get("optimizer") or {}).get("type"):
        return "it has no optimizer"
    if _are_none(kwargs.get("model_parameters")):
        return "it was given no parameters to train"
    model = kwargs.get("model")
    if model is not None and not any(p.requires_grad for p in model.parameters()):
        return f"no parameter of {type(model).__name__} requires grad"
    return None


def say_why(it_only_evaluates: str) -> None:
    """Log on the first rank that this engine is DeepSpeed's own, and what would make it ours."""
    if not _first_rank():
        return
    _log.info(
        "this engine is DeepSpeed's own and only evaluates, because %s. To train, leave requires_grad on and give it "
        'an optimizer, as {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}} in the ds_config',
        it_only_evaluates,
    )


def without_training(kwargs: Mapping[str, Any], ds_config: Mapping[str, Any]) -> None:
    """Take out of the parsed config what DeepSpeed accepts only with an optimizer."""
    left = {key: value for key, value in ds_config.items() if key not in ("optimizer", "scheduler", BLOCK)}
    if isinstance(zero := ds_config.get("zero_optimization"), Mapping):
        left["zero_optimization"] = {key: value for key, value in zero.items() if key != "offload_optimizer"}
        if zero.get("stage") in (1, 2):  # they only partition what an optimizer holds
            left["zero_optimization"]["stage"] = 0
    kwargs["config_class"].__init__(left, kwargs.get("mpu"), mesh_device=kwargs.get("mesh_device"))


def warn_of_misspelt_block(ds_config: Mapping[str, Any]) -> None:
    """Warn once, on the first rank, of a key that may be meant for the block: DeepSpeed ignores unknown keys."""
    for path in near_misses(ds_config):
        if path not in _told and _first_rank():
            _log.warning(
                'the ds_config has no top-level key "%s" but one named "%s", which nobody reads, so this is '
                "DeepSpeed's training without meft-ds. Rename it, or move it to the top level",
                BLOCK,
                path,
            )
        _told.add(path)


def _first_rank() -> bool:
    from meft_ds.plugin.console import show_log

    show_log()
    return os.environ.get("RANK", "0") == "0"


def near_misses(ds_config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the paths of keys that may be meant for the block."""
    for key, value in ds_config.items():
        if _is_near(key):
            yield str(key)
        elif isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in value if _is_near(inner))


def _is_near(key: Any) -> bool:
    plain = str(key).lower().replace("-", "_").replace(" ", "_")
    if "meft" in plain:
        return True
    if abs(len(plain) - len(BLOCK)) > 2:
        return False
    from difflib import SequenceMatcher

    return SequenceMatcher(None, plain, BLOCK).ratio() > 0.8  # DeepSpeed's own nearest key, cpu_offload, is at 0.70


def _are_none(model_parameters: Any) -> bool:
    """Return whether a list of parameters or groups has nothing in it; iterators are not looked into."""
    if not isinstance(model_parameters, list | tuple):
        return False
    return not any(group.get("params") if isinstance(group, Mapping) else True for group in model_parameters)
