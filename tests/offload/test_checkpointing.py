# SPDX-License-Identifier: Apache-2.0
"""Reentrant checkpoints above frozen embeddings, wherever those are: no layer loses its gradient."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from meft_ds.offload.model import gradient_checkpointing
from meft_ds.offload.model.gradient_checkpointing import feed_checkpoints
from tests.toy import batch, tiny_llama


class Wrapper(nn.Module):
    """Knows nothing of embeddings."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, **inputs: Tensor) -> Any:
        return self.backbone(**inputs)


class Shy(Wrapper):
    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


class Plain(nn.Module):
    """Nothing of transformers, but the attribute by which checkpointing is known."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(61, 8), nn.Embedding(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 61)
        self.gradient_checkpointing = False

    def gradient_checkpointing_enable(self, settings: dict[str, bool]) -> None:
        self.gradient_checkpointing = settings["use_reentrant"]

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Any:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True) if self.gradient_checkpointing else layer(x)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
        return type("Output", (), {"loss": loss})


def gradients(wrap: Callable[[nn.Module], nn.Module], inner: nn.Module, *, checkpointed: bool) -> dict[str, Tensor]:
    if checkpointed:
        inner.gradient_checkpointing_enable({"use_reentrant": True})
        if hasattr(inner, "_require_grads_hook"):  # newer transformers would do the same by itself
            inner.disable_input_require_grads()
    model = wrap(inner).train()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    handle = feed_checkpoints(model)
    model(**batch(0)).loss.backward()
    handle.remove()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, Shy, lambda m: Wrapper(Wrapper(m))])
@pytest.mark.parametrize("make", [tiny_llama, Plain])
def test_layers_above_frozen_embeddings_get_the_gradients_that_they_get_without_checkpoints(
    make: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    plain = gradients(wrap, make(), checkpointed=False)
    found = gradients(wrap, make(), checkpointed=True)
    assert any("layers.0" in name for name in plain) and found.keys() == plain.keys()
    assert all(torch.equal(grad, plain[name]) for name, grad in found.items())


def test_torch_has_its_own_function_back_when_the_last_model_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_checkpointing, "_models", weakref.WeakKeyDictionary())  # without those of other tests
    if "apply" in CheckpointFunction.__dict__:
        monkeypatch.delattr(CheckpointFunction, "apply")
    one, other = Plain(), Plain()
    handles = [feed_checkpoints(one), feed_checkpoints(other), feed_checkpoints(other)]
    copy.deepcopy(handles)[0].remove()
    x = torch.ones(2, 8)
    for handle in handles:
        assert checkpoint(one.layers[0], x, use_reentrant=True).requires_grad
        handle.remove()
        handle.remove()
    assert "apply" not in CheckpointFunction.__dict__ and not x.requires_grad


def test_checkpoints_without_grad_or_with_a_graph_get_what_they_were_given() -> None:
    model, seen = Plain(), []
    handle = feed_checkpoints(model)

    def same(x: Tensor) -> Tensor:
        seen.append(x)
        return x * 2

    x = torch.ones(2, requires_grad=True)
    checkpoint(same, x, use_reentrant=True).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))  # type: ignore[arg-type]
    with torch.no_grad():
        assert not checkpoint(same, torch.ones(2), use_reentrant=True).requires_grad
    assert not checkpoint(same, torch.ones(2, dtype=torch.long), use_reentrant=True).requires_grad
    handle.remove()
