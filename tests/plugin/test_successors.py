# SPDX-License-Identifier: Apache-2.0
"""A second engine on the same model goes on with what the first one left there, however that one ended."""

from __future__ import annotations

import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meft_ds
from meft_ds.offload.model import gradient_checkpointing
from meft_ds.sparse_adapter.attach import find_adapters
from tests.forked import Forge
from tests.toy import ADAPTER, batch, ds_config, make_engine, tiny_llama, train

TILES = {"density": 0.1, "block_size": 8, "score": "magnitude"}
BLOCKS: dict[str, dict[str, Any]] = {
    "adapter": {"sparse_adapter": dict(ADAPTER), "train": ["norm"]},
    "adapter on the device": {"sparse_adapter": {**ADAPTER, "selection": "device", "optimizer": "lazy"}},
    "adapter without a gate": {"sparse_adapter": {**ADAPTER, "gate": False}},
    "subspace": {"subspace": {"dim": 8, "nonzeros": 2}},
    "tiles": {"sparse_matrix": dict(TILES)},
    "scored tiles": {"sparse_matrix": {"density": 0.1, "block_size": 8, "warmup_steps": 2}},
    "adapter and subspace": {"sparse_adapter": dict(ADAPTER), "subspace": {"dim": 8, "nonzeros": 2}},
}


def seen(model: Any) -> torch.Tensor:
    """Logits in eval mode, of an engine or a model."""
    model.eval()
    with torch.no_grad():
        found = model(**batch(0)).logits.clone()
    model.train()
    return found


def rows_of(model: nn.Module) -> list[torch.Tensor]:
    return [adapter.rows.master for adapter in find_adapters(model).values()]


@pytest.mark.parametrize(
    ("what", "precision"), [*((what, "fp32") for what in BLOCKS), ("adapter", "bf16"), ("tiles", "bf16")]
)
def test_a_second_engine_goes_on_with_what_was_learned(what: str, precision: str) -> None:
    check(what, precision=precision)


@pytest.mark.slow
def test_a_second_engine_goes_on_with_what_was_learned_in_stage_3(forge: Forge, tmp_path: Path) -> None:
    forge.results(in_stage_3, tmp_path, world=1)


def in_stage_3(folder: Path) -> None:
    for what in BLOCKS:
        check(what, stage=3)


def check(what: str, *, precision: str = "fp32", stage: int = 2) -> None:
    zero: dict[str, Any] = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    config = ds_config(precision=precision, block=BLOCKS[what], zero_optimization=zero)
    model = tiny_llama()
    first = make_engine(config, model)
    start = seen(first)
    losses = train(first, 4, distinct=1)
    learned = seen(first)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    first.destroy()
    assert all(p.requires_grad for name, p in model.named_parameters() if "router" not in name)

    if stage < 3:
        assert torch.equal(seen(model), learned), "a model outlives its engine"
    second = make_engine(config, model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable or "scored" in what
    assert not torch.equal(start, learned)
    assert torch.equal(seen(second), learned), what
    again = train(second, 5, distinct=1)
    assert again[-1] < losses[0] and not torch.equal(seen(second), learned)
    first.destroy()  # once more, as the interpreter may at any time
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable or "scored" in what
    second.destroy()


def test_the_store_of_the_first_engine_is_taken_over_and_not_doubled() -> None:
    config = ds_config(precision="bf16", block=BLOCKS["adapter"])
    model = tiny_llama()
    first = make_engine(config, model)
    train(first, 2)
    places = [rows.data_ptr() for rows in rows_of(model)]
    unit = weakref.ref(first.optimizer.pipeline.units[-1])
    first.destroy()
    del first
    gc.collect()
    assert unit() is None, "its moments are in it"
    second = make_engine(config, model)
    assert [rows.data_ptr() for rows in rows_of(model)] == places
    replicas = [adapter.rows.replica for adapter in find_adapters(model).values()]
    assert all(torch.equal(r, m.bfloat16()) for r, m in zip(replicas, rows_of(model), strict=True))
    train(second, 1)


def test_an_engine_that_was_abandoned_in_the_middle_of_a_window_is_destroyed() -> None:
    model = tiny_llama()
    config = ds_config(block=BLOCKS["adapter"], gas=2)
    first = make_engine(config, model)
    train(first, 1)
    first.backward(first(**batch(7)).loss)  # and then: RuntimeError("CUDA out of memory.")
    was = [rows.clone() for rows in rows_of(model)]
    second = make_engine(ds_config(block=BLOCKS["adapter"], micro=2), model)  # `first` is still referred to
    assert all(torch.equal(rows, old) for rows, old in zip(rows_of(model), was, strict=True))
    twin = tiny_llama()
    fresh = make_engine(ds_config(block=BLOCKS["adapter"], micro=2), twin)
    twin.load_state_dict(model.state_dict())
    for mine, its in zip(rows_of(model), rows_of(twin), strict=True):
        its.copy_(mine)
    fresh = make_engine(ds_config(block=BLOCKS["adapter"], micro=2), twin)
    assert train(second, 3, rows=2) == train(fresh, 3, rows=2)
    first.destroy()
    train(second, 1, rows=2)


def test_other_settings_are_refused_and_detach_is_the_way_out() -> None:
    model = tiny_llama()
    base = seen(model)
    first = make_engine(ds_config(block=BLOCKS["adapter"]), model)
    train(first, 2)
    first.destroy()
    other = {"sparse_adapter": {**ADAPTER, "rows": 48}}
    with pytest.raises(ValueError, match=r"rows: 40 in the model, 48 in the block.*meft_ds\.detach\(model\)"):
        make_engine(ds_config(block=other), model)
    place = {"sparse_adapter": {**ADAPTER, "target_modules": r".*layers\.0\.mlp"}}
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp.*meft_ds\.detach"):
        make_engine(ds_config(block=place), model)
    norms = {name: p.clone() for name, p in model.named_parameters() if "norm" in name}
    meft_ds.detach(model)
    assert not find_adapters(model) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(dict(model.named_parameters())[name], norm) for name, norm in norms.items())
    with torch.no_grad():
        clean = tiny_llama()
        for name, p in clean.named_parameters():
            p.copy_(norms.get(name, p))
    assert torch.equal(seen(model), seen(clean)) and not torch.equal(seen(model), base)
    second = make_engine(ds_config(block=other), model)
    train(second, 1)
    meft_ds.detach(second)  # destroys it
    assert not find_adapters(model)
    meft_ds.detach(model)


def test_a_start_that_failed_leaves_nothing_that_the_next_one_must_agree_with() -> None:
    model = tiny_llama()
    config = ds_config(block={**BLOCKS["adapter"], "host_memory_gb": 1e-6})
    with pytest.raises(ValueError, match="host_memory_gb allows"):
        make_engine(config, model)
    train(make_engine(ds_config(block={"sparse_adapter": {**ADAPTER, "rows": 48}}), model), 1)


def test_rows_that_are_taken_over_need_no_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny_llama(), ds_config(precision="bf16", block=BLOCKS["adapter"])
    first = make_engine(config, model)
    (method,) = first._meft_methods
    first.destroy()
    assert method.least_host_bytes(model) == 0 < method.least_host_bytes(tiny_llama())
    asked: list[int] = []
    monkeypatch.setattr("meft_ds.plugin.build.arena_bytes", lambda specs: asked.append(len(specs)) or 0)
    train(make_engine(config, model), 1)
    assert asked == [0]


def test_an_engine_goes_on_with_an_adapter_that_was_loaded(tmp_path: Path) -> None:
    first = make_engine(ds_config(block=BLOCKS["adapter"]))
    train(first, 3)
    want = seen(first.module)
    meft_ds.save_adapter(first, tmp_path)
    model = meft_ds.load_adapter(tiny_llama(), tmp_path)
    second = make_engine(ds_config(block=BLOCKS["adapter"]), model)
    assert torch.equal(seen(model), want)
    train(second, 1)
    assert not torch.equal(seen(model), want)


@pytest.mark.parametrize("what", BLOCKS)
def test_a_destroyed_engine_leaves_no_hook_of_its_own(what: str) -> None:
    model = tiny_llama()
    before = hooks_of(model)
    for _ in range(2):
        engine = make_engine(ds_config(block=BLOCKS[what]), model)
        train(engine, 2)
        assert model in gradient_checkpointing._models
        engine.destroy()
        assert model not in gradient_checkpointing._models
    meft_ds.detach(model)
    assert hooks_of(model) == before
    copied = pickle.loads(pickle.dumps(model))
    assert copied.meft_stats() == {} and copied.state_dict().keys() == model.state_dict().keys()


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_a_copy_of_a_model_is_trained_by_no_engine() -> None:
    import copy

    model = tiny_llama()
    engine = make_engine(ds_config(block=BLOCKS["subspace"]), model)
    train(engine, 2)
    other = make_engine(ds_config(block=BLOCKS["subspace"]), copy.deepcopy(model))
    train(other, 1)
    train(engine, 1)


@pytest.mark.slow
@pytest.mark.parametrize("destroyed", [True, False])
def test_ranks_that_share_rows_go_on_in_the_same_memory(forge: Forge, tmp_path: Path, destroyed: bool) -> None:
    first, second = forge.results("tests.plugin.successor_ranks:again", tmp_path, destroyed=destroyed)
    for rank in (first, second):
        assert rank["kept"] and rank["places"] and rank["changed"]
        assert rank["losses"][3] < rank["losses"][0]
    assert first["sums"] == second["sums"]
