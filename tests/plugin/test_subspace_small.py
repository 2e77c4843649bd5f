# SPDX-License-Identifier: Apache-2.0
"""The subspace method where what trains is small: heads and PEFT's matrices train as they would without the block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.sparse_adapter.tiny import tiny_model
from tests.toy import ds_config, make_engine

STEPS, LABELS = 12, 8


def classifier_alone() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=LABELS, **sizes, **dropout))
    for name, p in model.named_parameters():
        p.requires_grad_("classifier" in name)
    return model


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = tiny_model("llama")
    settings = {"r": 16, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


def losses(model: nn.Module, step: Callable[[torch.Tensor], None], classes: bool) -> list[float]:
    ids = torch.randint(3, 60, (16, 6), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(16) % LABELS if classes else ids
    found = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=labels).loss
        step(loss)
        found.append(loss.item())
    return found


@pytest.mark.parametrize("made", [classifier_alone, lora])
@pytest.mark.parametrize("dim", [0.5, 4])
def test_a_head_or_lora_alone_trains_as_without_the_block_and_one_warning_says_so(
    made: Callable[[], nn.Module], dim: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = made().train()
    twin = copy.deepcopy(plain)
    trained = [p for p in plain.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)

    def plain_step(loss: torch.Tensor) -> None:
        adam.zero_grad()
        loss.backward()
        adam.step()

    classes = made is classifier_alone
    expected = losses(plain, plain_step, classes)
    config = ds_config(block={"subspace": {"dim": dim}}, gradient_clipping=0.0, micro=16)
    config["optimizer"]["params"] = {"lr": 1e-2, "weight_decay": 0.0}
    with caplog.at_level("WARNING", logger="meft_ds"):
        engine = make_engine(config, twin, model_parameters=[p for p in twin.parameters() if p.requires_grad])

    def our_step(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    assert losses(engine, our_step, classes) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0] - 0.05
    (told,) = [r.getMessage() for r in caplog.records if "compresses nothing" in r.getMessage()]
    assert ("classifier.weight is a head" if classes else "lora_A.default.weight is PEFT's, as are 7 more") in told
    assert engine.meft_stats()["subspace"]["parameters"] == 0
    engine.destroy()
