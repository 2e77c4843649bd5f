# SPDX-License-Identifier: Apache-2.0
"""What trains beside a method that freezes the base: what the user or the task put there keeps training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meft_ds.offload.model.heads import head_parameters
from meft_ds.plugin.trainable import fresh_parameters
from tests.forked import Forge
from tests.toy import ADAPTER, batch, ds_config, make_engine, tiny_llama

hf: Any = pytest.importorskip("transformers")

BLOCKS: dict[str, dict[str, Any]] = {
    "adapter": {"sparse_adapter": dict(ADAPTER)},
    "tiles": {"sparse_matrix": {"density": 0.1, "block_size": 8, "score": "magnitude"}},
}
SMALL = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
LLAMA = {**SMALL, "num_attention_heads": 2, "pad_token_id": 0, "num_labels": 3, "initializer_range": 0.3}


def classifier() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForSequenceClassification(hf.LlamaConfig(**LLAMA))


def with_lora(**settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    given = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **settings}
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(**given))


def learns(model: nn.Module, block: dict[str, Any], inputs: dict[str, Any] | None = None, **config: Any) -> set[str]:
    """Names of what two steps change, adapters aside."""
    named = [(name, p) for name, p in model.named_parameters() if "meft_adapter" not in name]
    engine = make_engine(ds_config(block=block, **config), model)
    before = [p.detach().clone() for _, p in named]
    for seed in range(2):
        given = inputs or batch(seed)
        engine.backward(engine(**given).loss)
        engine.step()
    engine.meft_flush()
    changed = {name for (name, p), was in zip(named, before, strict=True) if not torch.equal(p, was)}
    engine.destroy()
    return changed


def to_classify() -> dict[str, Any]:
    given = batch(0)
    return {**given, "labels": torch.tensor([0, 1, 2, 0])}


def lines(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


@pytest.mark.parametrize("what", BLOCKS)
def test_a_new_head_trains_beside_a_frozen_base(what: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="meft_ds"):
        changed = learns(classifier(), BLOCKS[what], to_classify())
    assert "score.weight" in changed
    assert all("_proj" in name for name in changed - {"score.weight"})  # tiles
    (line,) = lines(caplog, "beside")
    assert "score.weight (a head)" in line


@pytest.mark.parametrize("what", BLOCKS)
def test_an_empty_train_freezes_all_of_the_base(what: str) -> None:
    assert "score.weight" not in learns(classifier(), {**BLOCKS[what], "train": []}, to_classify())


def test_train_comes_on_top_of_heads() -> None:
    changed = learns(classifier(), {**BLOCKS["adapter"], "train": [r"layers\.0\.input_layernorm"]}, to_classify())
    assert changed == {"score.weight", "model.layers.0.input_layernorm.weight"}


def test_a_head_that_the_program_froze_stays_frozen() -> None:
    model = classifier()
    model.score.requires_grad_(False)
    assert learns(model, BLOCKS["adapter"], to_classify()) == set()


def test_a_head_stays_trainable_where_subspace_trains_only_what_is_named() -> None:
    block = {"subspace": {"dim": 8, "nonzeros": 2, "projectors": "random"}, "train": [r"layers\.0\..*_proj"]}
    changed = learns(classifier(), block, to_classify())
    assert "score.weight" in changed and not any("layers.1" in name for name in changed)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("BertForSequenceClassification", r"classifier\..*"),
        ("BertForTokenClassification", r"classifier\..*"),
        ("BertForMultipleChoice", r"classifier\..*"),
        ("BertForQuestionAnswering", r"qa_outputs\..*"),
        ("BertForNextSentencePrediction", r"cls\..*"),
        ("RobertaForSequenceClassification", r"classifier\..*"),
        ("DistilBertForSequenceClassification", r"(pre_)?classifier\..*"),
        ("DebertaV2ForSequenceClassification", r"(pooler|classifier)\..*"),
        ("Qwen2ForTokenClassification", r"score\..*"),
        ("Qwen2ForQuestionAnswering", r"qa_outputs\..*"),
        ("GPT2DoubleHeadsModel", r"multiple_choice_head\..*"),
        ("GPT2ForSequenceClassification", r"score\..*"),
        ("T5ForSequenceClassification", r"classification_head\..*"),
        ("BartForSequenceClassification", r"classification_head\..*"),
        ("XLNetForQuestionAnsweringSimple", r"qa_outputs\..*"),
        ("ViTForImageClassification", r"classifier\..*"),
        ("WhisperForAudioClassification", r"classifier\..*"),
        ("LlamaForCausalLM", None),
        ("GPT2LMHeadModel", None),
        ("BertForMaskedLM", None),
        ("T5ForConditionalGeneration", None),
        ("BartForConditionalGeneration", None),
        ("MixtralForCausalLM", None),
        ("LlamaModel", None),
        ("ViTMAEForPreTraining", None),
    ],
)
def test_heads_of_every_task_are_found_and_language_models_have_none(name: str, head: str | None) -> None:
    made = getattr(hf, name)
    with torch.device("meta"):
        model = made(made.config_class())
    heads = head_parameters(model)
    named = dict(model.named_parameters())
    found = {key for key, p in named.items() if id(p) in heads}
    assert found == {key for key in named if head is not None and re.fullmatch(head, key)}


def test_what_a_program_puts_around_a_pretrained_model_is_a_head() -> None:
    class Rewards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = tiny_llama()
            self.judge = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, labels: Any = None, **inputs: Any) -> Any:
            states = self.trunk(**inputs, output_hidden_states=True).hidden_states[-1]
            return hf.modeling_outputs.CausalLMOutput(loss=self.judge(states).square().mean())

    assert learns(Rewards(), BLOCKS["adapter"]) == {f"judge.{n}.{key}" for n in (0, 2) for key in ("weight", "bias")}


def test_what_the_checkpoint_did_not_bring_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = {**SMALL, "num_attention_heads": 2, "initializer_range": 0.3, "hidden_dropout_prob": 0.0}
    torch.manual_seed(0)
    hf.BertForMaskedLM(hf.BertConfig(**small)).save_pretrained(tmp_path)
    model = hf.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    fresh, named = fresh_parameters(model), dict(model.named_parameters())
    if not fresh:
        pytest.skip("this version of transformers does not mark what it loads")
    assert {name for name, p in named.items() if id(p) in fresh} == {
        *("bert.pooler.dense.weight", "bert.pooler.dense.bias"),
        *("classifier.weight", "classifier.bias"),
    }
    with caplog.at_level("INFO", logger="meft_ds"):
        changed = learns(model, BLOCKS["tiles"], to_classify())
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= changed
    (line,) = lines(caplog, "beside")
    assert "bert.pooler.dense.weight (not in the checkpoint)" in line
    assert not fresh_parameters(hf.BertForMaskedLM.from_pretrained(tmp_path))
    assert not fresh_parameters(hf.BertForMaskedLM(hf.BertConfig(**small)))


def test_a_new_tensor_that_the_program_froze_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = hf.LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=3, pad_token_id=0)
    if not fresh_parameters(model):
        pytest.skip("this version of transformers does not mark what it loads")
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    with caplog.at_level("INFO", logger="meft_ds"):
        assert "score.weight" not in learns(model, BLOCKS["adapter"], to_classify())
    (line,) = lines(caplog, "random values")
    assert "score.weight" in line and '"train"' in line


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"r": 64}])
def test_a_users_lora_keeps_training(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = with_lora(**settings)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    with caplog.at_level("INFO", logger="meft_ds"):
        assert learns(model, BLOCKS["adapter"]) == wanted
    (line,) = lines(caplog, "beside")
    assert "(PEFT)" in line


@pytest.mark.parametrize("kind", ["IA3Config", "PromptTuningConfig", "VeraConfig", "LNTuningConfig"])
def test_other_peft_methods_keep_training(kind: str) -> None:
    peft = pytest.importorskip("peft")
    given: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    given |= {
        "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "PromptTuningConfig": {"num_virtual_tokens": 3},
        "VeraConfig": {"r": 4, "target_modules": ["q_proj"]},
        "LNTuningConfig": {"target_modules": ["input_layernorm"]},
    }[kind]
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama(), getattr(peft, kind)(**given))
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert wanted and learns(model, BLOCKS["adapter"]) == wanted


def test_a_lora_in_an_unfrozen_base_keeps_training() -> None:
    model = with_lora()
    model.requires_grad_(True)
    assert learns(model, BLOCKS["adapter"]) == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_what_a_program_left_trainable_in_a_frozen_model_keeps_training(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    with caplog.at_level("INFO", logger="meft_ds"):
        assert learns(model, BLOCKS["adapter"]) == wanted
    (line,) = lines(caplog, "beside")
    assert "model.norm.weight (left trainable)" in line


def test_a_model_of_which_the_program_froze_a_little_is_frozen_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    with caplog.at_level("INFO", logger="meft_ds"):
        assert learns(model, BLOCKS["adapter"]) == set()
    (line,) = lines(caplog, "freezes what the program left trainable")
    assert "model.layers.0.self_attn.q_proj.weight" in line and '"train"' in line


def test_tiles_are_chosen_in_what_the_program_left_trainable() -> None:
    model = tiny_llama()
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name or "norm" in name)
    changed = learns(model, BLOCKS["tiles"])
    assert {name.split(".")[-2] for name in changed} == {
        *("q_proj", "norm"),
        *("input_layernorm", "post_attention_layernorm"),
    }


def test_heads_and_loras_train_in_stage_3(forge: Forge, tmp_path: Path) -> None:
    forge.results(in_stage_3, tmp_path, world=1)


def in_stage_3(folder: Path) -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    for block in BLOCKS.values():
        model = classifier()
        engine = make_engine(ds_config(block=block, zero_optimization=zero), model)
        was = engine._zero3_consolidated_16bit_state_dict()["score.weight"].clone()
        engine.backward(engine(**to_classify()).loss)
        engine.step()
        assert not torch.equal(engine._zero3_consolidated_16bit_state_dict()["score.weight"], was)
        engine.destroy()
    model = with_lora()
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    engine = make_engine(ds_config(block=BLOCKS["adapter"], zero_optimization=zero), model)
    trained = {name for unit in engine.optimizer.pipeline.units for name, _ in getattr(unit, "params", ())}
    assert wanted and {name for name in trained if "meft_adapter" not in name} == wanted
    engine.destroy()
