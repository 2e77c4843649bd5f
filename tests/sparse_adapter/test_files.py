# SPDX-License-Identifier: Apache-2.0
"""A saved adapter comes back whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from meft_ds.sparse_adapter.attach import find_adapters
from meft_ds.sparse_adapter.files import JSON_NAME, load_adapter, read_adapter, write_adapter
from tests.sparse_adapter.tiny import attach_device_rows, tiny_model

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny_model("llama")
    attach_device_rows(model, values=0.5)
    write_adapter(tmp_path, model)
    return tmp_path


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_reloaded_model_has_equal_logits_and_generates(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    attach_device_rows(model, values=0.5)
    want = model(IDS, attention_mask=MASK).logits
    write_adapter(tmp_path, model)
    fresh = tiny_model(name)
    assert not torch.allclose(fresh(IDS, attention_mask=MASK).logits, want)
    assert load_adapter(fresh, tmp_path) is fresh
    assert torch.equal(fresh(IDS, attention_mask=MASK).logits, want)
    given = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fresh.generate(IDS, **given), model.generate(IDS, **given))


def test_loaded_rows_follow_the_model_and_stay_out_of_its_state_dict(saved: Path) -> None:
    model = load_adapter(tiny_model("llama"), saved).bfloat16()
    adapter = next(iter(find_adapters(model).values()))
    assert adapter.rows.dtype == torch.bfloat16 and not adapter.training
    assert not any("rows" in name for name in model.state_dict())
    assert model(IDS, attention_mask=MASK).logits.dtype == torch.bfloat16


def test_saving_again_replaces_the_files(saved: Path) -> None:
    first = set(saved.iterdir())
    model = tiny_model("llama")
    attach_device_rows(model, values=0.1)
    write_adapter(saved, model)
    assert len(set(saved.iterdir())) == 2 == len(first)
    rows = next(iter(find_adapters(model).values())).rows.master
    assert torch.equal(read_adapter(saved).rows[0], rows)


def _tensors(directory: Path) -> Path:
    (file,) = directory.glob("*.safetensors")
    return file


def _edit(directory: Path, **changes: object) -> None:
    about = json.loads((directory / JSON_NAME).read_text())
    about.update(changes)
    (directory / JSON_NAME).write_text(json.dumps(about))


def test_truncated_or_changed_files_are_refused(saved: Path) -> None:
    file = _tensors(saved)
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="cut short or changed"):
        read_adapter(saved)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="cut short or changed"):
        read_adapter(saved)
    file.unlink()
    with pytest.raises(ValueError, match="is missing"):
        read_adapter(saved)
    text = (saved / JSON_NAME).read_text()
    (saved / JSON_NAME).write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="damaged"):
        read_adapter(saved)
    (saved / JSON_NAME).unlink()
    with pytest.raises(ValueError, match="not found"):
        read_adapter(saved)


def test_changed_settings_are_refused(saved: Path) -> None:
    about = json.loads((saved / JSON_NAME).read_text())
    for config, message in (
        ({**about["config"], "rows": 61}, "should be float32"),
        ({**about["config"], "unknown": 1}, "damaged"),
        ({**about["config"], "gate": "yes"}, "damaged"),
        ({**about["config"], "experts_per_token": 9}, "experts_per_token"),
        ({**about["config"], "d": "32"}, "damaged"),
    ):
        _edit(saved, config=config)
        with pytest.raises(ValueError, match=message):
            read_adapter(saved)
    _edit(saved, config=about["config"], format=99)
    with pytest.raises(ValueError, match="format 99"):
        read_adapter(saved)
    _edit(saved, format=1, modules=["a"] * 3)
    with pytest.raises(ValueError, match=r"layers\.2\.rows"):
        read_adapter(saved)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny_model("mistral"), "LlamaForCausalLM, this model is a MistralForCausalLM"),
        (lambda: tiny_model("llama", hidden_size=64), "d = 32, this model has 64"),
        (lambda: tiny_model("llama", num_hidden_layers=1), r"lacks 1 of the adapter's 2 places.*model\.layers\.1\.mlp"),
    ],
)
def test_wrong_architecture_is_refused_and_left_untouched(saved: Path, other, message: str) -> None:
    model = other()
    before = model(IDS).logits
    with pytest.raises(ValueError, match=message):
        load_adapter(model, saved)
    assert not find_adapters(model) and torch.equal(model(IDS).logits, before)


def test_loading_twice_is_an_error(saved: Path) -> None:
    model = load_adapter(tiny_model("llama"), saved)
    with pytest.raises(ValueError, match="already has"):
        load_adapter(model, saved)


def test_a_model_without_an_adapter_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sparse adapter"):
        write_adapter(tmp_path, tiny_model("llama"))
