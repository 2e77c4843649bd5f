# SPDX-License-Identifier: Apache-2.0
"""Lets gradient checkpointing of the reentrant kind see a graph under frozen embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def feed_checkpoints(model: nn.Module) -> Any | None:
    """Hook the model's embeddings so that their output requires grad where checkpoints need it; returns the handle.

    Reentrant checkpointing cuts the graph when no input requires grad, as under a frozen embedding.
    """
    embeddings = _input_embeddings(model)
    return None if embeddings is None else embeddings.register_forward_hook(_FeedCheckpoints(model))


class _FeedCheckpoints:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, embeddings: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (isinstance(output, Tensor) and self.model.training and torch.is_grad_enabled()):
            return
        if not output.requires_grad and any(_cuts_the_graph(m) for m in self.model.modules()):
            output.requires_grad_(True)


def _cuts_the_graph(module: nn.Module) -> bool:
    """Whether the module checkpoints in the reentrant way. The other one needs no help, and with it backward can end at
    the lowest layer that trains."""
    if not getattr(module, "gradient_checkpointing", False):
        return False
    settings = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", None) or {}
    return settings.get("use_reentrant") is not False


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    if getter is None:
        return None
    try:
        found = getter()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None
