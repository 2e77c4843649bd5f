# SPDX-License-Identifier: Apache-2.0
"""`save_adapter`, and HF's `save_pretrained` of a training model: plain base weights plus the adapter beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from meft_ds.sparse_adapter.attach import ADAPTER_NAME, find_adapters
from meft_ds.sparse_adapter.files import write_adapter


def save_adapter(model_or_engine: nn.Module, directory: str | Path) -> None:
    """Write the adapter (float32 master rows, routers, settings) to `directory`, for `load_adapter`.

    Args:
        model_or_engine: the engine that `deepspeed.initialize` returned, or the model inside it.
        directory: made when missing; existing adapter files in it are replaced atomically.

    Raises:
        ValueError: when the model has no adapter.

    May be called on any one rank: a node's ranks share the master rows.
    """
    model = getattr(model_or_engine, "module", model_or_engine)
    if not find_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has no meft-ds adapter; pass the engine that deepspeed.initialize returned for a "
            'config with a "meft_offload" block'
        )
    write_adapter(Path(directory), model)


def save_adapter_with_model(model: nn.Module) -> None:
    """Make the model's `save_pretrained` write the base without adapter tensors, and the adapter beside it."""
    original = getattr(model, "save_pretrained", None)
    if original is None:
        return

    def save_pretrained(directory: Any, *args: Any, **kwargs: Any) -> Any:
        state: dict[str, Tensor] | None = kwargs.pop("state_dict", None)
        state = model.state_dict() if state is None else state
        kwargs["state_dict"] = {k: t for k, t in state.items() if ADAPTER_NAME not in k.split(".")}
        result = original(directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            save_adapter(model, directory)
        return result

    model.save_pretrained = save_pretrained  # type: ignore[assignment]
