# SPDX-License-Identifier: Apache-2.0
"""Activation checkpoints that a program puts around layers by itself, above embeddings that are frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of, tiny_llama

BLOCKS = {
    "subspace": {"subspace": {"nonzeros": 2, "fit_steps": 5}},
    "sparse_adapter": {"sparse_adapter": dict(ADAPTER)},
    "sparse_matrix": {"sparse_matrix": {"block_size": 8, "warmup_steps": 1, "density": 0.3}},
}


def deepspeeds(function: Callable[..., Any], x: torch.Tensor) -> Any:
    return deepspeed.checkpointing.checkpoint(function, x)


def torchs(function: Callable[..., Any], x: torch.Tensor) -> Any:
    return checkpoint(function, x, use_reentrant=True)


def model_for(how: Callable[..., Any] | None) -> nn.Module:
    """As `from_pretrained` leaves it, in eval mode."""
    model = tiny_llama().eval()
    model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    if how is not None:
        for layer in model.model.layers:  # type: ignore[union-attr]
            forward = layer.forward
            layer.forward = lambda h, *a, f=forward, **k: how(lambda x: f(x, *a, **k), h)
    return model


@pytest.mark.parametrize("how", [deepspeeds, torchs])
@pytest.mark.parametrize("method", BLOCKS)
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_layers_under_checkpoints_of_the_programs_own_train_as_without(
    how: Callable[..., Any], method: str, stage: int
) -> None:
    states = []
    for each in (None, how):
        config = ds_config(block=BLOCKS[method], zero_optimization={"stage": stage})
        engine = make_engine(config, model_for(each))
        first = state_of(engine)
        for seed in range(4):
            engine.backward(engine(**batch(seed)).loss)
            engine.step()
        states.append(state_of(engine))
        engine.destroy()
    moved = {name for name, t in states[1].items() if name not in first or not torch.equal(t, first[name])}
    assert moved == {name for name, t in states[0].items() if name not in first or not torch.equal(t, first[name])}
    assert any("layer0" in name for name in moved)
    for name, t in states[0].items():  # kernels with and without grad may differ in the last digits
        torch.testing.assert_close(states[1][name], t, rtol=2e-2, atol=2e-3)
