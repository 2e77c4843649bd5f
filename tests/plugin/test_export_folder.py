# SPDX-License-Identifier: Apache-2.0
"""A folder with a base and an adapter tells whoever loads it, and what was trained beside the adapter comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meft_ds
from tests.forked import Forge
from tests.plugin.test_trainable import BLOCKS, classifier, lines, to_classify, with_lora
from tests.toy import batch, ds_config, make_engine, tiny_llama

hf: Any = pytest.importorskip("transformers")


def trained(model: nn.Module, inputs: dict[str, Any], **config: Any) -> Any:
    engine = make_engine(ds_config(block=BLOCKS["adapter"], **config), model)
    for _ in range(3):
        engine.backward(engine(**inputs).loss)
        engine.step()
    engine.meft_flush()
    return engine


def logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits.float()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5)


def save(engine: Any, how: str, folder: Path) -> None:
    if how == "save_pretrained":
        engine.module.save_pretrained(folder)
    else:
        folder.mkdir(exist_ok=True)
        engine.module.config.save_pretrained(folder)
        engine.save_16bit_model(str(folder))


@pytest.mark.parametrize("how", ["save_pretrained", "save_16bit_model"])
def test_an_export_says_that_there_is_an_adapter(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = trained(tiny_llama(), batch(0))
    with caplog.at_level("INFO", logger="meft_ds"):
        save(engine, how, tmp_path)
    (line,) = lines(caplog, "load_adapter")
    assert str(tmp_path) in line
    assert json.loads((tmp_path / "config.json").read_text())["meft_ds"]["adapter"] == "meft_adapter.json"
    assert hf.AutoConfig.from_pretrained(tmp_path).meft_ds["adapter"] == "meft_adapter.json", "transformers keeps it"
    text = (tmp_path / "README.md").read_text()
    assert "meft_ds.load_adapter(model, folder)" in text and "LlamaForCausalLM.from_pretrained(folder)" in text
    save(engine, how, tmp_path)
    assert (tmp_path / "README.md").read_text() == text
    if how == "save_pretrained":
        fresh = meft_ds.load_adapter(hf.LlamaForCausalLM.from_pretrained(tmp_path), tmp_path)
        assert close(logits(fresh, batch(1)), logits(engine.module, batch(1)))


@pytest.mark.parametrize("there", [b"# My model\n\nIt is mine.\n", b"\xff\xfe\x00 no text"])
def test_a_readme_that_is_there_is_kept(there: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(there)
    save(trained(tiny_llama(), batch(0)), "save_pretrained", tmp_path)
    found = (tmp_path / "README.md").read_bytes()
    assert found.startswith(there.rstrip())
    assert (b"meft_ds.load_adapter" in found) == there.isascii()


def test_a_head_comes_back_from_a_checkpoint_an_export_and_an_adapter(tmp_path: Path) -> None:
    inputs = to_classify()
    engine = trained(classifier(), inputs)
    want, score = logits(engine.module, inputs), engine.module.score.weight.detach().clone()
    engine.module.save_pretrained(tmp_path / "export")
    meft_ds.save_adapter(engine, tmp_path / "adapter")
    engine.save_checkpoint(str(tmp_path / "checkpoint"))
    assert not torch.equal(score, classifier().score.weight)
    exported = hf.LlamaForSequenceClassification.from_pretrained(tmp_path / "export")
    assert torch.equal(exported.score.weight, score)
    for fresh, folder in ((exported, "export"), (classifier(), "adapter"), (classifier(), "export")):
        assert close(logits(meft_ds.load_adapter(fresh, tmp_path / folder), inputs), want)
    other = make_engine(ds_config(block=BLOCKS["adapter"]), classifier())
    other.load_checkpoint(str(tmp_path / "checkpoint"))
    assert close(logits(other.module, inputs), want)


def test_an_adapter_beside_a_lora_comes_back_with_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    engine = trained(with_lora(), batch(0))
    want = logits(engine.module, batch(1))
    engine.module.save_pretrained(tmp_path)
    meft_ds.save_adapter(engine, tmp_path / "alone")
    assert "PeftModelForCausalLM.from_pretrained(base, folder)" in (tmp_path / "README.md").read_text()
    torch.manual_seed(0)
    loaded = meft_ds.load_adapter(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path), tmp_path)
    assert close(logits(loaded, batch(1)), want)
    fresh = meft_ds.load_adapter(with_lora(), tmp_path / "alone")
    assert close(logits(fresh, batch(1)), want)


def test_a_part_of_the_model_saves_what_was_trained_in_it(tmp_path: Path) -> None:
    engine = make_engine(ds_config(block={**BLOCKS["adapter"], "train": ["model.norm", "lm_head"]}))
    engine.backward(engine(**batch(0)).loss)
    engine.step()
    meft_ds.save_adapter(engine.module.model, tmp_path)
    loaded = meft_ds.load_adapter(tiny_llama().model, tmp_path)
    assert torch.equal(loaded.norm.weight, engine.module.model.norm.weight)


def test_a_head_comes_back_in_stage_3(forge: Forge, tmp_path: Path) -> None:
    forge.results(in_stage_3, tmp_path, world=1)


def in_stage_3(folder: Path) -> None:
    inputs = to_classify()
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    engine = trained(classifier(), inputs, zero_optimization=zero)
    engine.eval()
    with torch.no_grad():
        want = engine(**inputs).logits
    meft_ds.save_adapter(engine, f"{folder}/adapter")
    whole = engine._zero3_consolidated_16bit_state_dict()
    engine.module.save_pretrained(f"{folder}/export", state_dict=whole)
    assert not torch.equal(whole["score.weight"], classifier().score.weight)
    for fresh, where in (
        (classifier(), "adapter"),
        (hf.LlamaForSequenceClassification.from_pretrained(f"{folder}/export"), "export"),
    ):
        assert torch.allclose(logits(meft_ds.load_adapter(fresh, f"{folder}/{where}"), inputs), want, atol=1e-5)
