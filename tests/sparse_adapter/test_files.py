# SPDX-License-Identifier: Apache-2.0
"""A saved adapter comes back whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from meft_ds.sparse_adapter import layout
from meft_ds.sparse_adapter.attach import find_adapters
from meft_ds.sparse_adapter.base import remember
from meft_ds.sparse_adapter.files import JSON_NAME, SavedAdapter, load_adapter, read_adapter, write_adapter
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


def _edit(directory: Path, *, sealed: bool = True, **changes: object) -> None:
    path = directory / JSON_NAME
    about = {**json.loads(path.read_text()), **changes}
    seal = about.pop("sha256")
    path.write_text(json.dumps({**about, "sha256": layout._seal(about) if sealed else seal}))


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
        ({**about["config"], "unknown": 1}, "unknown"),
        ({**about["config"], "gate": "yes"}, "config.gate: .*got 'yes'"),
        ({**about["config"], "experts_per_token": 9}, "experts_per_token"),
        ({**about["config"], "d": "32"}, "config.d"),
        (None, "config: .*got None"),
        ({k: v for k, v in about["config"].items() if k != "scope"}, "scope"),
    ):
        _edit(saved, config=config)
        with pytest.raises(ValueError, match=message) as told:
            read_adapter(saved)
        assert JSON_NAME in str(told.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": []}, "modules: .*at least 1 item"),
        ({"modules": None}, "modules: .*valid array, got None"),
        ({"modules": ["a", 7]}, r"modules\.1: .*valid string, got 7"),
        ({"modules": ["a", "a"]}, "modules: expected every name once"),
        ({"modules": ["a"] + list("bc")}, r"layers\.2\.rows"),
        ({"model_class": None}, "model_class"),
        ({"tensors": None}, "tensors"),
        ({"tensors": {"file": "../other.safetensors", "bytes": 1, "sha256": "0" * 64}}, r"tensors\.file"),
        ({"base": {"a": 1}}, "base"),
        ({"base": ["lm_head.weight"]}, r"base\.lm_head\.weight is missing"),
        ({"more": 1}, "more: Extra"),
        ({"method": "lora"}, "method"),
        ({"format": 99}, "format 99, this version reads 3; update meft-ds"),
        ({"format": 2}, "format 2, .*save the adapter again with this version"),
        ({"format": "2"}, "format"),
    ],
)
def test_what_is_of_another_type_is_named_with_the_path(saved: Path, changes: dict[str, Any], message: str) -> None:
    _edit(saved, **changes)
    with pytest.raises(ValueError, match=message) as told:
        load_adapter(tiny_model("llama"), saved)
    assert str(saved) in str(told.value)


@pytest.mark.parametrize("text", ["null", "[]", "3", '"a"', "", "{}", "{", "\udc80"])
def test_what_is_no_adapter_is_refused(saved: Path, text: str) -> None:
    (saved / JSON_NAME).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=JSON_NAME):
        read_adapter(saved)


def test_another_value_of_the_right_type_is_refused(saved: Path) -> None:
    about = json.loads((saved / JSON_NAME).read_text())
    _edit(saved, sealed=False, config={**about["config"], "gate": False})
    with pytest.raises(ValueError, match="its checksum"):
        read_adapter(saved)


def _same(one: SavedAdapter, other: SavedAdapter) -> bool:
    tensors = [*zip(one.rows, other.rows, strict=True), *zip(one.routers, other.routers, strict=True)]
    tensors += [(one.base[name], other.base[name]) for name in one.base]
    settings = [(s.config, s.model_class, s.modules, list(s.base), s.elsewhere) for s in (one, other)]
    return settings[0] == settings[1] and all(torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize("file", ["json", "tensors"])
def test_every_flipped_bit_and_every_cut_is_refused_or_harmless(saved: Path, file: str) -> None:
    path = saved / JSON_NAME if file == "json" else _tensors(saved)
    whole, random, good = path.read_bytes(), Random(0), read_adapter(saved)
    places = range(len(whole)) if file == "json" else sorted(random.sample(range(len(whole)), 150))
    damages = [whole[:at] + bytes([whole[at] ^ (1 << random.randrange(8))]) + whole[at + 1 :] for at in places]
    damages += [whole[:at] for at in random.sample(range(len(whole)), 100)]
    harmless = 0
    for damage in damages:
        path.write_bytes(damage)
        try:
            found = read_adapter(saved)
        except ValueError as told:
            assert str(saved) in str(told)
            continue
        assert _same(found, good)
        harmless += 1
    assert harmless <= (len(whole) // 3 if file == "json" else 0)  # white space of the JSON


def test_trained_tensors_of_the_base_come_back_with_the_adapter(tmp_path: Path) -> None:
    model = tiny_model("llama")
    attach_device_rows(model, values=0.5)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
        model.lm_head.weight.add_(0.1)
    remember(model, ["model.norm.weight", "lm_head.weight"], [])
    write_adapter(tmp_path, model)
    fresh = load_adapter(tiny_model("llama"), tmp_path)
    assert torch.equal(fresh(IDS, attention_mask=MASK).logits, model(IDS, attention_mask=MASK).logits)
    write_adapter(tmp_path / "again", fresh)
    assert _same(read_adapter(tmp_path / "again"), read_adapter(tmp_path))


def test_a_base_that_cannot_take_the_trained_tensors_is_left_untouched(tmp_path: Path) -> None:
    model = tiny_model("llama")
    attach_device_rows(model, values=0.5)
    remember(model, ["model.norm.weight", "lm_head.weight"], [])
    write_adapter(tmp_path, model)
    other = tiny_model("llama", vocab_size=70)
    with pytest.raises(ValueError, match=r"lm_head\.weight is \(70, 32\), the adapter's is \(64, 32\)"):
        load_adapter(other, tmp_path)
    assert not find_adapters(other)


def test_a_base_trained_by_another_method_too_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    attach_device_rows(model, values=0.5)
    remember(model, [], ["subspace"])
    write_adapter(tmp_path, model)
    load_adapter(tiny_model("llama"), tmp_path)
    assert "subspace trained the base" in caplog.text


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny_model("mistral"), "LlamaForCausalLM, this model is a MistralForCausalLM"),
        (lambda: tiny_model("llama", hidden_size=64), r"d = 32, model\.layers\.0\.mlp of this model has 64"),
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
