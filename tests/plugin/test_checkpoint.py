# SPDX-License-Identifier: Apache-2.0
"""Save, resume, reuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import meft_ds
from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of, tiny_llama, train

pytestmark = pytest.mark.compat


def config(precision: str = "bf16", **adapter: Any) -> dict[str, Any]:
    schedule = {
        "type": "WarmupDecayLR",
        "params": {"warmup_num_steps": 2, "total_num_steps": 20, "warmup_max_lr": 0.02},
    }
    made = ds_config(precision=precision, gas=2, block={"sparse_adapter": {**ADAPTER, **adapter}}, scheduler=schedule)
    if precision == "fp16":
        made["fp16"] |= {"initial_scale_power": 8, "loss_scale_window": 2}
    return made


def test_our_files_are_safetensors_and_json_and_nothing_temporary_is_left(tmp_path: Path) -> None:
    engine = make_engine(config())
    train(engine, 1)
    engine.save_checkpoint(str(tmp_path), tag="here")
    kinds = {path.suffix for path in (tmp_path / "here" / "meft").iterdir()}
    assert kinds == {".safetensors", ".json"}
    assert (tmp_path / "latest").read_text() == "here"
    assert list(tmp_path.rglob("*.tmp")) == []


def test_loading_without_optimizer_states_takes_the_weights_only(tmp_path: Path) -> None:
    engine = make_engine(config())
    train(engine, 6)
    engine.save_checkpoint(str(tmp_path))
    fresh = make_engine(config(), tiny_llama(seed=9))
    fresh.load_checkpoint(str(tmp_path), load_module_only=True)
    one, two = state_of(engine), state_of(fresh)
    for name in one:
        assert torch.equal(one[name], two[name]) != ("exp_avg" in name), name
    assert fresh.optimizer.applied_steps == 0


def test_an_adapter_that_was_drawn_from_another_seed_goes_on_alike(tmp_path: Path) -> None:
    straight = make_engine(config())
    train(straight, 2)
    straight.save_checkpoint(str(tmp_path))
    resumed = make_engine(config(seed=5), tiny_llama(seed=9))
    resumed.load_checkpoint(str(tmp_path))
    assert train(resumed, 2, first_seed=500) == train(straight, 2, first_seed=500)


def damaged(tmp_path: Path) -> tuple[Any, Path, dict[str, torch.Tensor]]:
    """A saved run, its folder, and a fresh engine's state, which a failing load must leave as it is."""
    engine = make_engine(config())
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path), tag="t")
    fresh = make_engine(config(), tiny_llama(seed=9))
    return fresh, tmp_path / "t" / "meft", state_of(fresh)


def refuse(engine: Any, folder: Path, before: dict[str, torch.Tensor]) -> str:
    with pytest.raises(ValueError) as e:
        engine.load_checkpoint(str(folder.parent.parent))
    after = state_of(engine)
    assert all(torch.equal(before[k], after[k]) for k in before), "a refused checkpoint must change nothing"
    return str(e.value)


def test_an_unfinished_or_damaged_save_is_refused(tmp_path: Path) -> None:
    engine, folder, before = damaged(tmp_path)
    manifest = folder / "meft_state.json"
    whole = manifest.read_text()
    for content, told in [(whole[: len(whole) // 2], "is damaged"), ("", "is empty"), ("[]", "no JSON object")]:
        manifest.write_text(content)
        assert told in (message := refuse(engine, folder, before)) and str(manifest) in message
    manifest.write_text(whole.replace('"applied_steps": 2', '"applied_steps": 3'))
    assert "its checksum" in refuse(engine, folder, before)
    manifest.unlink()
    assert "unfinished save" in refuse(engine, folder, before)


@pytest.mark.parametrize("content", [b"", b"global_stop2", b"\xe7lobal_step2", b"t\x00"])
def test_a_latest_file_that_names_nothing_is_an_error_that_lists_what_there_is(tmp_path: Path, content: bytes) -> None:
    engine, folder, before = damaged(tmp_path)
    (tmp_path / "latest").write_bytes(content)
    message = refuse(engine, folder, before)
    assert str(tmp_path / "latest") in message and "(t)" in message and "tag=" in message
    with pytest.raises(ValueError, match="no checkpoint of that tag"):
        engine.load_checkpoint(str(tmp_path), tag="no")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rows": 44}, "rows: checkpoint 40, this run 44"),
        ({"keys_per_token": 8}, "keys_per_token: checkpoint 9, this run 8"),
        ({"optimizer": "lazy"}, "optimizer: checkpoint 'dense', this run 'lazy'"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused_naming_the_setting(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    _, folder, _ = damaged(tmp_path)
    other = make_engine(config(**change))
    assert expected in refuse(other, folder, state_of(other))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    _, folder, _ = damaged(tmp_path)
    other = make_engine(config(), tiny_llama(layers=3))
    assert "layers: checkpoint 2, this run 3" in refuse(other, folder, state_of(other))


def test_a_checkpoint_written_without_the_block_is_refused(tmp_path: Path) -> None:
    plain = make_engine(ds_config(block=None, precision="bf16"))
    train(plain, 1)
    plain.save_checkpoint(str(tmp_path), tag="t")
    engine = make_engine(config())
    assert "saved by a run without the block" in refuse(engine, tmp_path / "t" / "meft", state_of(engine))


def test_a_missing_latest_file_is_answered_as_deepspeed_does(tmp_path: Path) -> None:
    assert make_engine(config()).load_checkpoint(str(tmp_path)) == (None, None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_adapter_in_a_plain_model_gives_the_logits_of_training_time_eval_and_generates(
    tmp_path: Path, precision: str
) -> None:
    engine = make_engine(config(precision))
    train(engine, 4)
    engine.eval()
    inputs = {k: t for k, t in batch(3).items() if k != "labels"}
    with torch.no_grad():
        expected = engine(**inputs).logits
    meft_ds.save_adapter(engine, tmp_path)

    plain = tiny_llama().eval()
    for p in plain.parameters():
        p.data = p.data.to(expected.dtype)
    trained = dict(engine.module.named_buffers())
    for name, buffer in plain.named_buffers():  # DeepSpeed 0.18 casts buffers too, 0.19 keeps them fp32
        buffer.data = trained[name].data.clone()
    with torch.no_grad():
        assert not torch.allclose(plain(**inputs).logits, expected)
        model = meft_ds.load_adapter(plain, tmp_path)
        assert torch.equal(model(**inputs).logits, expected)
        out = model.generate(inputs["input_ids"][1:2, :4], max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 9)


def test_save_pretrained_writes_plain_base_weights_and_the_adapter_beside_them(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    engine = make_engine(config("fp32"))
    train(engine, 3)
    engine.module.save_pretrained(tmp_path)
    engine.eval()
    inputs = {k: t for k, t in batch(3).items() if k != "labels"}
    with torch.no_grad():
        expected = engine(**inputs).logits
        plain, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
        assert not info["unexpected_keys"] and not info["missing_keys"]
        model = meft_ds.load_adapter(plain.eval(), tmp_path)
        assert torch.equal(model(**inputs).logits, expected)


def test_a_model_without_adapter_cannot_be_saved_as_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no meft-ds adapter; pass the engine"):
        meft_ds.save_adapter(tiny_llama(), tmp_path)


def test_manifest_tells_what_the_state_belongs_to(tmp_path: Path) -> None:
    block = {"sparse_adapter": dict(ADAPTER), "subspace": {"dim": 8, "nonzeros": 2}}
    engine = make_engine(ds_config(block=block))
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path), tag="t")
    manifest = json.loads((tmp_path / "t" / "meft" / "meft_state.json").read_text())
    about = manifest["about"]
    assert about["model"] == "LlamaForCausalLM" and about["method"] == "sparse_adapter+subspace"
    assert about["sparse_adapter.rows"] == 40 and about["subspace.dim"] == 8
    assert manifest["counters"]["applied_steps"] == 2
