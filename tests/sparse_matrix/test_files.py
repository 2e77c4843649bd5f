# SPDX-License-Identifier: Apache-2.0
"""Tiles go into a model and out of it again bit for bit, or not at all; exported models are plain ones."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import meft_ds
from meft_ds.sparse_matrix.files import SavedTiles, read_tiles
from tests.toy import ADAPTER, batch, ds_config, make_engine, tiny_llama, train

SETTINGS = {
    "density": 0.2,
    "budget": "per_module",
    "block_size": 6,
    "warmup_steps": 2,
}  # 16 and 32 are no multiples: ragged tiles
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def tiny_mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=61, num_key_value_heads=2, num_local_experts=3, initializer_range=0.3, **sizes)
    )


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def engine_for(precision: str = "fp32", model: nn.Module | None = None, steps: int = 5, **block: Any) -> Any:
    """Has scored for 2 steps and then trained for `steps` - 2."""
    engine = make_engine(ds_config(precision=precision, block={"sparse_matrix": dict(SETTINGS), **block}), model)
    train(engine, steps)
    return engine


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(t.view(torch.uint8), b[name].view(torch.uint8)) for name, t in a.items()
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """An engine in bf16, and the file of its tiles."""
    engine = engine_for(precision="bf16")
    path = tmp_path_factory.mktemp("tiles") / "new folder" / "tiles.safetensors"
    meft_ds.save_tiles(engine, path)
    return engine, path


def base() -> nn.Module:
    return tiny_llama().bfloat16()


@pytest.mark.parametrize(
    ("make", "precision"), [(tiny_llama, "fp32"), (tiny_gpt2, "fp32"), (tiny_gpt2, "bf16"), (tiny_mixtral, "bf16")]
)
def test_applied_tiles_make_the_trained_model_and_reverted_ones_the_base(
    make: Callable[[], nn.Module], precision: str, tmp_path: Path
) -> None:
    path = tmp_path / "tiles.safetensors"
    engine = engine_for(precision, make())
    meft_ds.save_tiles(engine, path)
    model = make().to(DTYPES[precision])
    before = weights(model)
    assert meft_ds.apply_tiles(model, path) is model
    engine.destroy()
    after = weights(engine.module)
    assert same(weights(model), after) and not same(before, after)
    assert meft_ds.revert_tiles(model, path) is model
    assert same(weights(model), before)
    meft_ds.revert_tiles(engine.module, path)  # undoes the training itself
    assert same(weights(engine.module), before)


def test_the_file_holds_two_tensors_per_weight_and_says_where_its_tiles_lie(trained: tuple[Any, Path]) -> None:
    engine, path = trained
    (method,) = engine._meft_methods
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["meft_tiles"])
    names = {tile.name for tile in method.choice.tiles}
    tensors = load_file(path)
    assert set(tensors) == {f"{kind}.{name}" for kind in ("values", "original") for name in names}
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert sum(t.numel() for t in tensors.values()) == 2 * method.choice.elements
    assert about["digest"] == method.choice.digest()
    assert sum(len(weight["tiles"]) for weight in about["weights"].values()) == len(method.choice.tiles)
    now, at_first = engine.module.state_dict(), base().state_dict()
    for name, places in read_tiles(path).tiles.items():
        for kind, model in (("values", now), ("original", at_first)):
            tiles = [model[name][a:b, c:d].reshape(-1) for _, (a, b), (c, d) in places]
            assert torch.equal(torch.cat(tiles), tensors[f"{kind}.{name}"])


def _narrow(saved: SavedTiles) -> nn.Module:
    model = base()
    proj = model.model.layers[1].mlp.up_proj
    proj.weight = nn.Parameter(proj.weight[:-1].detach().clone())
    return model


def _changed(saved: SavedTiles) -> nn.Module:
    """The first element of the last weight's first tile differs, by its lowest bit."""
    model = base()
    name, ((_, rows, cols), *_) = list(saved.tiles.items())[-1]
    model.get_parameter(name).data[rows[0], cols[0]].view(torch.int16).bitwise_xor_(1)
    return model


def _tied(saved: SavedTiles) -> nn.Module:
    model = base()
    model.model.layers[0].self_attn.k_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda saved: tiny_llama(), "torch.float32, the tiles are torch.bfloat16: load the model with that dtype"),
        (lambda saved: tiny_llama(seed=1).bfloat16(), "is not the base that they belong to, or other tiles are"),
        (_changed, "these tiles were not trained from what is in"),
        (_narrow, r"layers\.1\.mlp\.up_proj\.weight: shape \(31, 16\), the tiles' weight had \(32, 16\)"),
        (lambda saved: tiny_llama(layers=1).bfloat16(), r"model\.layers\.1\.\S+: the model has no such parameter"),
        (lambda saved: nn.ModuleDict({"module": base()}), "the model has no such parameter"),
        (_tied, "it is tied to"),
        (lambda saved: base().to("meta"), "on the meta device; load the model whole"),
    ],
)
def test_another_model_is_refused_and_left_as_it_was(trained: tuple[Any, Path], other: Any, message: str) -> None:
    path = trained[1]
    model = other(read_tiles(path))
    before = None if next(model.parameters()).is_meta else weights(model)
    for action in (meft_ds.apply_tiles, meft_ds.revert_tiles):
        with pytest.raises(ValueError, match=message if action is meft_ds.apply_tiles else None) as caught:
            action(model, path)
        assert str(path) in str(caught.value)
    assert before is None or same(weights(model), before)


def test_tiles_are_applied_once_and_reverted_once_in_the_order_of_a_stack(
    trained: tuple[Any, Path], tmp_path: Path
) -> None:
    engine, path = trained
    later = tmp_path / "later.safetensors"
    engine_b = engine_for(precision="bf16", steps=4)
    meft_ds.save_tiles(engine_b, later)
    model = base()
    with pytest.raises(ValueError, match="not applied to this model; there is nothing to revert"):
        meft_ds.revert_tiles(model, path)
    meft_ds.apply_tiles(model, path)
    held = weights(model)
    for action, file, message in (
        (meft_ds.apply_tiles, path, "applied already; revert_tiles takes them out"),
        (meft_ds.apply_tiles, later, "other tiles are applied to it"),
        (meft_ds.revert_tiles, later, "the values of these tiles are not what is in"),
    ):
        with pytest.raises(ValueError, match=message):
            action(model, file)
    assert same(weights(model), held)
    meft_ds.revert_tiles(model, path)
    meft_ds.apply_tiles(model, later)
    assert same(weights(model), weights(engine_b.module))


def test_a_model_in_training_is_left_alone(tmp_path: Path) -> None:
    engine, path = engine_for(), tmp_path / "tiles.safetensors"
    meft_ds.save_tiles(engine, path)
    for action in (meft_ds.apply_tiles, meft_ds.revert_tiles):
        with pytest.raises(ValueError, match=r"being trained by an engine.*engine\.destroy\(\)"):
            action(engine.module, path)


def test_only_an_engine_that_trains_tiles_can_save_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trains no tiles; pass the engine"):
        meft_ds.save_tiles(tiny_llama(), tmp_path / "t")
    with pytest.raises(ValueError, match="trains no tiles"):
        meft_ds.save_tiles(make_engine(ds_config()), tmp_path / "t")
    engine = engine_for(steps=1)
    with pytest.raises(ValueError, match=r"still being scored \(1 steps so far\)"):
        meft_ds.save_tiles(engine, tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_the_file_that_was_there(
    trained: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, path = trained
    copy_of = tmp_path / "tiles.safetensors"
    copy_of.write_bytes(path.read_bytes())

    def full(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        meft_ds.save_tiles(engine, copy_of)
    assert [file.name for file in tmp_path.iterdir()] == ["tiles.safetensors"]
    assert copy_of.read_bytes() == path.read_bytes()


def _rewritten(path: Path, to: Path, **changes: Any) -> Path:
    """The file with another header or value, but its SHA-256 as it was."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["meft_tiles"])
    tensors = load_file(path)
    if "value" in changes:
        tensors[next(iter(tensors))][-1] += 1
    about |= {key: v for key, v in changes.items() if key in about}
    save_file(tensors, to, metadata={"meft_tiles": json.dumps(about, separators=(",", ":"))})
    return to


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole, to: to.write_bytes(whole[:-7]), "damaged, or not a safetensors file"),
        (lambda whole, to: to.write_bytes(whole[:100]), "damaged, or not a safetensors file"),
        (lambda whole, to: to.write_bytes(b""), "damaged, or not a safetensors file"),
        (lambda whole, to: to.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])), "SHA-256 is not the one"),
        (lambda whole, to: to.write_bytes(pickle.dumps({"tiles": [1]})), "damaged, or not a safetensors file"),
        (lambda whole, to: save_file({"a": torch.ones(2)}, to), "holds no tiles"),
        (lambda whole, to: to.mkdir(), "is a folder, expected a regular file"),
        (lambda whole, to: None, "cannot read these tiles"),
    ],
)
def test_damaged_and_foreign_files_are_refused(
    trained: tuple[Any, Path], tmp_path: Path, damage: Callable[[bytes, Path], Any], message: str
) -> None:
    path = tmp_path / "other.safetensors"
    damage(trained[1].read_bytes(), path)
    for action in (meft_ds.apply_tiles, meft_ds.revert_tiles):
        with pytest.raises(ValueError, match=message) as caught:
            action(base(), path)
        assert str(path) in str(caught.value)


def test_changed_headers_are_refused(trained: tuple[Any, Path], tmp_path: Path) -> None:
    to = tmp_path / "changed.safetensors"
    for changes, message in (
        ({"format": 2}, "format 2, this version reads 1; update meft-ds"),
        ({"value": True}, "SHA-256 is not the one"),
        ({"digest": "0"}, "SHA-256 is not the one"),
        ({"weights": {}}, "SHA-256 is not the one"),
    ):
        with pytest.raises(ValueError, match=message):
            read_tiles(_rewritten(trained[1], to, **changes))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_save_pretrained_under_training_writes_plain_weights(precision: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine = engine_for(precision)
    live = weights(engine.module)
    engine.module.save_pretrained(tmp_path)
    assert same(weights(engine.module), live)
    assert set(load_file(tmp_path / "model.safetensors")) == set(tiny_llama().state_dict())
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", dtype=DTYPES[precision]
    )
    assert not info["unexpected_keys"] and not info["missing_keys"]
    inputs = {k: t for k, t in batch(0).items() if k != "labels"}
    with torch.no_grad():
        wanted, found = (m.eval()(**inputs).logits for m in (engine.module, model))
    assert same(weights(model), live) and torch.equal(found, wanted)
    meft_ds.save_tiles(engine, tmp_path / "tiles")
    engine.destroy()
    assert same(weights(model), weights(engine.module))
    assert same(weights(meft_ds.revert_tiles(model, tmp_path / "tiles")), weights(tiny_llama().to(DTYPES[precision])))


def test_an_engine_that_resumed_saves_the_same_bytes(tmp_path: Path) -> None:
    engine = engine_for("bf16")
    engine.save_checkpoint(str(tmp_path))
    meft_ds.save_tiles(engine, tmp_path / "then")
    resumed = engine_for("bf16", steps=0)
    resumed.load_checkpoint(str(tmp_path))
    meft_ds.save_tiles(resumed, tmp_path / "now")
    assert (tmp_path / "then").read_bytes() == (tmp_path / "now").read_bytes()


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_mixtral])
def test_exports_have_the_keys_of_the_base(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "base")  # experts, for one, get other names in files
    engine = engine_for(model=make())
    engine.module.save_pretrained(tmp_path / "trained")
    base, trained = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "trained"))
    assert {k: t.shape for k, t in base.items()} == {k: t.shape for k, t in trained.items()}
    model = type(engine.module).from_pretrained(tmp_path / "trained")
    engine.destroy()
    assert same(weights(model), weights(engine.module))


def test_a_copy_of_the_model_saves_itself(tmp_path: Path) -> None:
    engine = engine_for()
    twin = copy.deepcopy(engine.module)
    engine.module.save_pretrained(tmp_path / "then")
    train(engine, 2, first_seed=7)
    twin.save_pretrained(tmp_path / "twin")
    engine.module.save_pretrained(tmp_path / "now")
    then, saved, now = (load_file(tmp_path / name / "model.safetensors") for name in ("then", "twin", "now"))
    assert same(then, saved) and not same(then, now)


def test_an_adapter_beside_tiles_is_saved_beside_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine = engine_for(sparse_adapter=dict(ADAPTER))
    engine.module.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(tiny_llama().state_dict())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    meft_ds.load_adapter(model, tmp_path)
    inputs = {k: t for k, t in batch(0).items() if k != "labels"}
    with torch.no_grad():
        wanted, found = (m.eval()(**inputs).logits for m in (engine.module, model))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    meft_ds.save_tiles(engine, tmp_path / "tiles")
    assert read_tiles(tmp_path / "tiles").tiles
