# SPDX-License-Identifier: Apache-2.0
"""Sparse matrix tuning through `deepspeed.initialize`: scoring, the choice, and training of the tiles."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meft_ds.offload.schedule.eager import MEASURED_WINDOWS
from meft_ds.sparse_matrix.choice.choice import Choice
from meft_ds.sparse_matrix.choice.select import choose
from meft_ds.sparse_matrix.config import SparseMatrixConfig
from meft_ds.sparse_matrix.discover import elements_of_2d_weights, find_sites
from tests.plugin.tiles import EVERYTHING, SCORED, config, differing, everything, method_of, steps, tiles_units
from tests.sparse_adapter.tiny import tiny_model
from tests.sparse_matrix.hand import brute_force
from tests.toy import ADAPTER, batch, make_engine, tiny_llama

KINDS = ["abs_mean", "l2", "mean_abs", "paper"]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def chosen_elements(choice: Choice, model: nn.Module) -> dict[str, torch.Tensor]:
    """True where an element trains."""
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for tile in choice.tiles:
        mask = masks[tile.name] if tile.expert is None else masks[tile.name][tile.expert]
        mask[slice(*tile.rows), slice(*tile.cols)] = True
    return masks


# Scoring


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("others", [{}, {"sparse_adapter": dict(ADAPTER)}, {"train": ["norm", r"layers\.1\..*q_proj"]}])
def test_scoring_windows_change_no_weight_moment_or_buffer(kind: str, others: dict[str, Any]) -> None:
    made = config("bf16", gas=2, score=kind, others=others)
    made["scheduler"] = {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 9},
    }
    engine = make_engine(made)
    before, rate = everything(engine), engine.get_lr()
    for window in range(SCORED):
        assert method_of(engine).observing
        assert engine.meft_stats()["sparse_matrix"]["scored_steps"] == window
        steps(engine, [window])
        after = everything(engine)
        assert [name for name, t in before.items() if name != "steps" and not torch.equal(t, after[name])] == []
        assert all(p.grad is None for p in engine.module.parameters())
        assert engine.optimizer.applied_steps == 0 and engine.get_lr() == rate
        moved = engine.meft_stats()["bytes"]
        assert not any(moved[wire]["down"] for wire in ("rows", "dense", "blocks") if wire in moved)
    stats = engine.meft_stats()["sparse_matrix"]
    assert not method_of(engine).observing and stats["scored_steps"] is None and stats["tiles"] == 11
    json.dumps(engine.meft_stats())
    before = everything(engine)
    steps(engine, range(SCORED, 5))
    changed = set(differing(before, everything(engine)))
    assert engine.optimizer.applied_steps == 3 and engine.get_lr() > rate
    assert any("rows/master" in name for name in changed) == ("sparse_adapter" in others)
    assert ("model/model.norm.weight" in changed) == ("train" in others)
    tiled = {tile.name for tile in method_of(engine).choice.tiles}
    assert others or {n for n, p in engine.module.named_parameters() if p.requires_grad} == tiled
    assert len(tiled) < 14
    assert "model.layers.1.self_attn.q_proj.weight" not in tiled or "train" not in others
    for name in tiled:
        assert f"model/{name}" in changed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mixtral"])
def test_the_choice_is_that_of_the_whole_gradients(name: str, kind: str, tmp_path: Path) -> None:
    """Biases and grouped queries; Conv1D and fused q, k, v; experts."""
    settings = {"score": kind, "block_size": 8, "density": 0.2, "warmup_steps": 2}
    engine = make_engine(config(gas=2, **settings, choice_out=str(tmp_path / "tiles.json")), tiny_model(name))

    def backward(model: nn.Module, seed: int) -> None:
        model(**batch(seed)).loss.backward()

    model = tiny_model(name)
    sites, _ = find_sites(model, made := SparseMatrixConfig(**settings))
    scores = brute_force(model, sites, kind, backward, [[0, 1], [100, 101]])
    expected = choose(sites, scores, made, elements_of_2d_weights(model))
    steps(engine, range(2))
    found = Choice.load(tmp_path / "tiles.json")
    assert found.digest() == expected.digest() == method_of(engine).choice.digest()
    for tile, wanted in zip(found.tiles, expected.tiles, strict=True):
        assert tile.score == pytest.approx(wanted.score, rel=1e-4)
    assert found.made_by["windows"] == 2 and found.made_by["world"] == 1 and found.made_by["score"] == kind
    assert found.elements <= 0.2 * elements_of_2d_weights(model) < found.elements + 64


@pytest.mark.parametrize("kind", KINDS)
def test_in_fp16_an_overflow_lowers_the_scale_is_not_scored_and_leaves_no_trace(kind: str) -> None:
    found = []
    for power, planted in ((8, False), (12, True), (4, False)):
        engine = make_engine(config("fp16", gas=2, score=kind, scale_power=power))
        steps(engine, [0])
        if planted:
            before, scale = everything(engine), engine.optimizer.cur_scale
            for micro in range(2):
                engine.backward(engine(**batch(77 + micro)).loss * (math.inf if micro else 1.0))
                engine.step()
            assert method_of(engine).observing and engine.optimizer.cur_scale == scale / 2
            assert differing(before, everything(engine)) == []
        assert engine.meft_stats()["sparse_matrix"]["scored_steps"] == 1
        steps(engine, [1])
        found.append(method_of(engine).choice)
    assert len({choice.digest() for choice in found}) == 1
    for choice in found[1:]:
        for tile, wanted in zip(choice.tiles, found[0].tiles, strict=True):
            assert tile.score == pytest.approx(wanted.score, rel=1e-2)


# Training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_unselected_elements_keep_their_bits_and_the_selected_change(precision: str) -> None:
    base = tiny_llama()
    for p in base.parameters():
        p.data = p.data.to(torch.float32 if precision == "fp32" else torch.bfloat16)
    logits = base.eval()(**batch(5)).logits
    engine = make_engine(config(precision, score="random"))
    engine.eval()
    assert torch.equal(engine(**batch(5)).logits, logits)
    with torch.no_grad():
        assert torch.equal(engine(**batch(5)).logits, logits)
    engine.train()
    steps(engine, range(5))
    choice, model = method_of(engine).choice, engine.module
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {tile.name for tile in choice.tiles}
    engine.destroy()
    for name, mask in chosen_elements(choice, model).items():
        differs = model.get_parameter(name) != base.get_parameter(name)
        assert not (differs & ~mask).any(), name
        # in bfloat16 a tenth stays within the rounding of a value of about 0.3
        assert (differs & mask).sum() >= (1.0 if precision == "fp32" else 0.8) * mask.sum(), name


def test_all_tiles_is_dense_adamw_training_of_those_matrices() -> None:
    made = config(gas=2, eps=1e-4, **EVERYTHING)
    engine, twin = make_engine(made), tiny_llama().requires_grad_(False)
    names = [n for n, _ in twin.named_parameters() if "proj" in n]
    params = [twin.get_parameter(n).requires_grad_(True) for n in names]
    optimizer = torch.optim.AdamW(params, **made["optimizer"]["params"])
    clipped = 0
    for step in range(8):
        for micro in range(2):
            loss = twin(**batch(100 * step + micro)).loss
            (loss / 2).backward()
            found = engine(**batch(100 * step + micro)).loss
            engine.backward(found)
            engine.step()
            assert found.item() == pytest.approx(loss.item(), abs=1e-5)
        clipped += int(torch.nn.utils.clip_grad_norm_(params, 0.5) > 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert clipped > 4
    engine.destroy()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(engine.module.get_parameter(name), p, rtol=1e-4, atol=1e-5, msg=name)


def test_state_where_the_model_is_gives_the_same_bits() -> None:
    def run(mode: str = "exact", **settings: Any) -> dict[str, torch.Tensor]:
        # in float32, as it is where nothing uses the bus
        made = config("bf16", gas=2, others={"schedule": {"mode": mode}, "grad_dtype": "fp32"}, **settings)
        engine = make_engine(made)
        losses = steps(engine, range(6))
        assert all(math.isfinite(loss) for loss in losses)
        return everything(engine)

    plain = run()
    assert differing(plain, run(state_device="accelerator")) == []
    assert differing(plain, run(mode="serial", state_device="accelerator")) == []


@pytest.mark.parametrize("where", ["cpu", "accelerator"])
def test_without_clipping_eager_equals_exact_bit_for_bit(where: str) -> None:
    """With clipping an early update knows only the window before's norm."""

    def run(mode: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        made = config("bf16", gas=2, others={"schedule": {"mode": mode}}, state_device=where)
        made["gradient_clipping"] = 0.0
        engine = make_engine(made)
        before = SCORED + MEASURED_WINDOWS + 1  # until then nothing is known of the order of updates
        losses = steps(engine, range(before))
        early = []
        for seed in range(before, before + 4):
            for micro in range(2):
                loss = engine(**batch(100 * seed + micro)).loss
                engine.backward(loss)
                early.append(engine.optimizer.pipeline.has_begun)
                engine.step()
                losses.append(loss.item())
        assert early == [False, mode == "eager"] * 4
        return losses, everything(engine)

    (losses, exact), (again, eager) = run("exact"), run("eager")
    assert losses == again and differing(exact, eager) == []


@pytest.mark.parametrize("settings", [{"grad_dtype": "fp32"}, {"moments_dtype": "bf16"}])
def test_dtypes_on_the_bus_and_of_the_moments_are_the_blocks(settings: dict[str, str]) -> None:
    engine = make_engine(config("bf16", others=settings))
    losses = steps(engine, [k % 2 for k in range(12)])
    assert sum(losses[-2:]) < sum(losses[:2])
    n = engine.meft_stats()["sparse_matrix"]["parameters"]
    assert engine.meft_stats()["bytes"]["blocks"] == {"down": n * (4 if "grad_dtype" in settings else 2), "up": 2 * n}
    dtypes = {t.dtype for unit in tiles_units(engine) for key, t in unit.state_tensors().items() if "exp" in key}
    assert dtypes == {torch.bfloat16 if "moments_dtype" in settings else torch.float32}


def test_tiles_follow_the_parameter_group_of_their_weight() -> None:
    model = tiny_llama()
    groups: list[dict[str, Any]] = [{"params": [], "lr": 0.0}, {"params": []}]
    for name, p in model.named_parameters():
        groups["layers.1." in name]["params"].append(p)
    made = config(budget="per_module", density=0.4)
    engine = make_engine(made, model, model_parameters=groups)
    before = weights(model)
    steps(engine, range(SCORED + 2))
    engine.meft_flush()
    assert {unit.group for unit in tiles_units(engine)} == {0, 1}
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {n for n in method_of(engine).choice.shapes if "layers.1." in n} and len(changed) == 7


# Models


def test_every_expert_of_a_mixture_has_tiles_of_its_own() -> None:
    model = tiny_model("mixtral").train()
    base = weights(model)
    engine = make_engine(config(budget="per_module", density=0.3, block_size=8), model)
    steps(engine, range(5))
    engine.meft_flush()
    choice = method_of(engine).choice
    stacked = {(tile.name, tile.expert) for tile in choice.tiles if tile.expert is not None}
    kept = [{blocks.expert for blocks in unit.matrices} for unit in tiles_units(engine)]
    assert len(stacked) == 2 * 2 * 4 and kept == [{None}, {0, 1, 2, 3}] * 2
    places = {(n, e): {(t.rows, t.cols) for t in choice.tiles if (t.name, t.expert) == (n, e)} for n, e in stacked}
    assert len({frozenset(found) for found in places.values()}) > 4
    for name, mask in chosen_elements(choice, model).items():
        differs = model.get_parameter(name) != base[name]
        assert not (differs & ~mask).any() and torch.equal(differs | ~mask, torch.ones_like(mask)), name


def test_tied_embeddings_stay_as_they_are() -> None:
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    base = weights(model)
    engine = make_engine(config(**EVERYTHING), model)
    steps(engine, range(3))
    engine.meft_flush()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {n for n, p in model.named_parameters() if not torch.equal(p, base[n])} == {n for n in base if "proj" in n}
