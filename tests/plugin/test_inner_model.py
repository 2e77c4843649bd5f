# SPDX-License-Identifier: Apache-2.0
"""Programs that call the inner model and read the head's weight by themselves, as fused losses do (stage 3 is in
test_zero3.py): they train as those that call the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.toy import ADAPTER, batch, ds_config, make_engine, tiny_llama

METHODS: dict[str, dict[str, Any]] = {
    "adapter": {"sparse_adapter": dict(ADAPTER)},
    "subspace": {"subspace": {"nonzeros": 2, "fit_steps": 2}},
    "tiles": {"sparse_matrix": {"density": 0.1, "block_size": 8, "warmup_steps": 2}},
    "tiles and the head": {"sparse_matrix": {"density": 0.1, "block_size": 8, "warmup_steps": 2}, "train": ["lm_head"]},
}


class FusedLoss(torch.autograd.Function):
    """Cross entropy in chunks whose gradients are computed in the forward, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        hidden, labels = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        with torch.enable_grad():
            parts = zip(x.split(8), labels.split(8), strict=True)
            sums = [torch.nn.functional.cross_entropy(a @ w.t(), b, reduction="sum") for a, b in parts]
            loss = torch.stack(sums).sum() / (labels != -100).sum()
            ctx.save_for_backward(*torch.autograd.grad(loss, (x, w)))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:  # type: ignore[override]
        dx, dw = ctx.saved_tensors
        rows = len(BATCH["input_ids"])
        dx = torch.cat([dx.view(rows, -1, dx.shape[-1]), dx.new_zeros(rows, 1, dx.shape[-1])], 1)
        return factor * dx, factor * dw, None


BATCH = batch(0)


def losses(method: str, mode: str, *, inner: bool, tied: bool) -> tuple[list[float], dict[str, Any]]:
    model = tiny_llama()
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    block = {**METHODS[method], "schedule": {"mode": mode}}
    engine = make_engine(ds_config(block=block, gas=2), model)
    # with a tiny eps AdamW turns rounding differences of near-zero gradients into whole steps
    for group in engine.optimizer.param_groups:
        group["eps"] = 1e-4
    found = []
    for micro in range(10):
        b = batch(micro % 3)
        if inner:
            module = engine.module
            hidden = module.model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).last_hidden_state
            loss = FusedLoss.apply(hidden, module.lm_head.weight, b["labels"])
        else:
            loss = engine(**b).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    stats = engine.meft_stats()
    engine.destroy()
    return found, stats


@pytest.mark.parametrize(
    ("method", "mode", "tied"),
    [
        ("adapter", "exact", False),
        ("subspace", "exact", False),
        ("subspace", "eager", False),
        ("subspace", "exact", True),
        ("tiles", "exact", False),
        ("tiles", "exact", True),
        ("tiles and the head", "exact", False),
        ("tiles and the head", "eager", False),
    ],
)
def test_a_fused_loss_on_the_inner_model_trains_as_the_engine_does(method: str, mode: str, tied: bool) -> None:
    expected, _ = losses(method, mode, inner=False, tied=tied)
    found, stats = losses(method, mode, inner=True, tied=tied)
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[9] < found[0]
    if method == "subspace":
        assert stats["subspace"]["checks"] == 1 and stats["subspace"]["held_out_bias_mean"] is not None
