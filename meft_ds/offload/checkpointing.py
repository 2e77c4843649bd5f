# SPDX-License-Identifier: Apache-2.0
"""Lets gradient checkpointing of the reentrant kind see a graph under frozen embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def feed_checkpoints(model: nn.Module) -> list[Any]:
    """Hook the model's embeddings so that their output requires grad where checkpoints need it; returns the handles.

    Reentrant checkpointing cuts the graph when no input requires grad, as under a frozen embedding. In a wrapper the
    embeddings are those of the models inside; where nobody tells them, every nn.Embedding.
    """
    embeddings = _input_embeddings(model) or [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return [module.register_forward_hook(_FeedCheckpoints(model)) for module in embeddings]


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


def _input_embeddings(module: nn.Module) -> list[nn.Module]:
    """What the outermost modules that know their embeddings say, each once."""
    getter = getattr(module, "get_input_embeddings", None)
    try:
        found = None if getter is None else getter()
    except NotImplementedError:
        found = None
    if isinstance(found, nn.Module):
        return [found]
    inside = [embeddings for child in module.children() for embeddings in _input_embeddings(child)]
    return list(dict.fromkeys(inside))
