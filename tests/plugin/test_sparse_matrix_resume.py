# SPDX-License-Identifier: Apache-2.0
"""Sparse matrix tuning: checkpoints, what is refused, and the model when its engine is gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from meft_ds.offload.model.capture import TappedLinear
from meft_ds.plugin.checkpoint.transaction import sealed
from meft_ds.sparse_matrix.choice.choice import Choice
from tests.plugin.tiles import SCORED, config, differing, everything, method_of, steps, tiles_units
from tests.sparse_adapter.tiny import tiny_model
from tests.toy import ADAPTER, batch, make_engine, tiny_llama


def tapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module.__dict__.get("forward"), TappedLinear)]


def scores(engine: Any) -> list[torch.Tensor]:
    scorer = method_of(engine)._scorer
    return [] if scorer is None else [t.clone() for t in (*scorer._total, *scorer._sums)]


# Save and resume


@pytest.mark.parametrize(
    ("precision", "kind", "at"),
    [
        pytest.param("bf16", "abs_mean", 1, marks=pytest.mark.compat),
        pytest.param("fp16", "abs_mean", SCORED + 2, marks=pytest.mark.slow),
        pytest.param("fp32", "paper", 1, marks=pytest.mark.slow),
        pytest.param("fp16", "l2", 1, marks=pytest.mark.slow),
        pytest.param("fp32", "mean_abs", 0, marks=pytest.mark.slow),
        pytest.param("bf16", "abs_mean", SCORED, marks=pytest.mark.slow),
        pytest.param("fp32", "random", 2, marks=pytest.mark.slow),
        pytest.param("bf16", "magnitude", 2, marks=pytest.mark.slow),
    ],
)
def test_resumed_runs_are_bit_identical_to_uninterrupted_ones(
    tmp_path: Path, precision: str, kind: str, at: int
) -> None:
    """In the middle of scoring, right after the choice, and in training, which a fresh engine takes on as it is."""
    settings = {"score": kind, "density": 0.2}
    straight = make_engine(config(precision, gas=2, **settings))
    steps(straight, range(at))
    straight.save_checkpoint(str(tmp_path))
    saved = scores(straight)
    expected = steps(straight, range(at, SCORED + 4))
    # another initial loss scale and other weights, which the checkpoint's replace; magnitude chooses by the weights
    other = tiny_llama(seed=0 if kind == "magnitude" else 9)
    resumed = make_engine(config(precision, gas=2, scale_power=10, **settings), other)
    resumed.backward(resumed(**batch(77)).loss)  # a window that was begun is given up
    assert resumed.load_checkpoint(str(tmp_path))[0] is not None
    resumed.micro_steps = 2 * at
    assert method_of(resumed).observing == (kind not in ("random", "magnitude") and at < SCORED)
    assert all(torch.equal(a, b) for a, b in zip(scores(resumed), saved, strict=True))
    assert steps(resumed, range(at, SCORED + 4)) == expected
    assert method_of(resumed).choice == method_of(straight).choice
    assert differing(everything(straight), everything(resumed)) == []


def test_a_checkpoint_goes_on_beside_an_adapter_and_with_patterns(tmp_path: Path) -> None:
    others = {"sparse_adapter": dict(ADAPTER), "train": ["norm"]}
    for at in (1, SCORED + 1):
        straight, resumed = (make_engine(config("bf16", gas=2, others=others)) for _ in range(2))
        steps(straight, range(at))
        straight.save_checkpoint(str(tmp_path), tag=f"at{at}")
        expected = steps(straight, range(at, SCORED + 3))
        resumed.load_checkpoint(str(tmp_path), tag=f"at{at}")
        assert steps(resumed, range(at, SCORED + 3)) == expected
        assert differing(everything(straight), everything(resumed)) == []


def test_loading_weights_only_gives_the_function_and_fresh_moments(tmp_path: Path) -> None:
    engine = make_engine(config())
    steps(engine, range(SCORED + 3))
    engine.save_checkpoint(str(tmp_path))
    for other in (make_engine(config(), tiny_llama(seed=9)), engine):
        other.load_checkpoint(str(tmp_path), load_optimizer_states=False)
        for each, wanted in zip(tiles_units(other), tiles_units(engine), strict=True):
            assert torch.equal(each.values(), wanted.values())
            assert torch.equal(each.original, wanted.original)
            assert other is engine or not each.state_tensors()["exp_avg"].any()
        with torch.no_grad():
            assert torch.equal(other(**batch(5)).logits, engine(**batch(5)).logits)
    half = make_engine(config())
    steps(half, range(1))
    half.save_checkpoint(str(tmp_path), tag="scoring")
    other = make_engine(config(), tiny_llama(seed=9))
    other.load_checkpoint(str(tmp_path), tag="scoring", load_module_only=True)
    assert torch.equal(other(**batch(5)).logits, half(**batch(5)).logits)
    assert other.meft_stats()["sparse_matrix"]["scored_steps"] == 0


def test_other_tiles_precisions_and_phases_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    engine = make_engine(config("bf16", score="random"))
    steps(engine, range(1))
    engine.save_checkpoint(str(tmp_path))
    scoring = make_engine(config("bf16"))
    scoring.save_checkpoint(str(tmp_path / "scoring"))
    cases = [
        (config("bf16", score="random", seed=1), tmp_path, "sparse_matrix.tiles: checkpoint"),
        (config("fp32"), tmp_path, "precision and the optimizer's parameter groups"),
        (config("bf16", score="random"), tmp_path / "scoring", "load it into a new engine"),
    ]
    for made, folder, expected in cases:
        other = make_engine(made, tiny_llama(seed=3))
        before, observing = everything(other), method_of(other).observing
        with pytest.raises(ValueError) as e:
            other.load_checkpoint(str(folder))
        assert expected in str(e.value)
        assert differing(before, everything(other)) == [] and method_of(other).observing == observing


def test_the_model_file_of_a_checkpoint_holds_complete_weights(tmp_path: Path) -> None:
    engine = make_engine(config())
    steps(engine, range(5))
    engine.save_checkpoint(str(tmp_path), tag="t")
    assert engine.save_16bit_model(str(tmp_path))
    saved = torch.load(tmp_path / "t" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert saved.keys() == (plain := torch.load(tmp_path / "pytorch_model.bin")).keys()
    assert all(torch.equal(saved[name], t) for name, t in plain.items())
    model = tiny_llama(seed=9)
    model.load_state_dict(saved)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch(5)).logits, engine(**batch(5)).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("phase", ["scoring", "training"])
def test_damaged_files_are_refused_before_anything_changes(tmp_path: Path, phase: str) -> None:
    engine = make_engine(config(score="paper"))
    steps(engine, range(1 if phase == "scoring" else SCORED + 1))
    engine.save_checkpoint(str(tmp_path), tag="a")
    folder = tmp_path / "a" / "meft"
    files = sorted(folder.glob("*.safetensors"))
    assert [f.name for f in files] == (
        ["sparse_matrix.method.safetensors"]
        if phase == "scoring"
        else [f"{unit.name}.00000-of-00001.safetensors" for unit in tiles_units(engine)]
    )
    other = make_engine(config(score="paper"), tiny_llama(seed=9))
    before = everything(other)
    whole = files[0].read_bytes()
    manifest = (folder / "meft_state.json").read_text()
    damages = {
        "damaged": lambda: files[0].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])),
        "truncated": lambda: files[0].write_bytes(whole[:-9]),
        "is missing": lambda: files[0].unlink(),
    }
    if phase == "training":
        content = json.loads(manifest)
        tiles = content["methods"]["sparse_matrix"]["choice"]["tiles"]
        tiles[0]["rows"] = [0, 999]
        damages["does not fit this model"] = lambda: (folder / "meft_state.json").write_text(
            json.dumps(sealed(content))
        )
    for expected, damage in damages.items():
        damage()
        with pytest.raises(ValueError, match=expected):
            other.load_checkpoint(str(tmp_path), tag="a")
        assert differing(before, everything(other)) == [] and method_of(other).observing
        files[0].write_bytes(whole)
        (folder / "meft_state.json").write_text(manifest)
    assert other.load_checkpoint(str(tmp_path), tag="a")[0] is not None


# Choices in files


def test_a_run_with_the_choice_of_another_trains_its_tiles_at_once(tmp_path: Path) -> None:
    first = make_engine(config(choice_out=str(tmp_path / "deep" / "tiles.json")))
    steps(first, range(SCORED + 2))
    made = config(choice_file=str(tmp_path / "deep" / "tiles.json"))
    made["train_micro_batch_size_per_gpu"] = 4
    second = make_engine(made)
    assert method_of(second).choice == method_of(first).choice and not method_of(second).observing
    steps(second, range(SCORED, SCORED + 2))
    assert differing(everything(first), everything(second)) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"choice_file": "nowhere.json"}, "cannot read this choice of tiles"),
        ({"choice_file": "other.json"}, "does not fit this model"),
        ({"choice_file": "damaged.json"}, "damaged, or not a choice"),
        ({"density": 1e-3}, "density 0.001 gives 0 tiles of block_size 8 .* lower block_size"),
        ({"density": 1e-3, "score": "random"}, "gives 0 tiles"),
        ({"density": 1e-3, "budget": "per_module"}, "gives 0 tiles"),
        ({"target_modules": "q_prj"}, r"target_modules \['q_prj'\] matches no whole module name"),
        ({"density": 2}, "density: expected a fraction above 0 and at most 1"),
        ({"dnsity": 0.1}, "did you mean 'density'"),
        ({"others": {"subspace": {}}}, "keep one"),
        ({"others": {"train": ["proj"]}}, "no weight left to choose tiles in"),
    ],
)
def test_faults_are_refused_at_the_start_and_say_what_to_do(
    tmp_path: Path, settings: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if settings.get("choice_file") == "other.json":
        steps(make_engine(config(choice_out="other.json"), tiny_model("llama").train()), range(SCORED))
    (tmp_path / "damaged.json").write_text('{"format": 1, "tiles": [')
    with pytest.raises(ValueError, match=f"(?s){expected}"):
        make_engine(config(**settings))


def test_a_model_that_the_program_froze_has_no_tiles() -> None:
    model = tiny_llama()
    for name, p in model.named_parameters():
        p.requires_grad_("proj" not in name)
    with pytest.raises(ValueError, match="no matrix of LlamaForCausalLM to have tiles .* is frozen"):
        make_engine(config(), model)
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    engine = make_engine(config(density=1.0, score="random"), model)
    assert {tile.layer for tile in method_of(engine).choice.tiles} == {1}


def test_scores_that_are_all_zero_are_no_choice() -> None:
    engine = make_engine(config())
    with pytest.raises(ValueError, match='all scores "abs_mean" are 0'):
        for step in range(SCORED):
            engine.backward(engine(**batch(step)).loss * 0.0)
            engine.step()


# The model when its engine is gone


@pytest.mark.parametrize("score", ["random", "abs_mean"])
def test_an_engine_that_goes_late_leaves_its_successor_alone(score: str) -> None:
    """`engine = initialize(...)` twice: the second is there before the first is collected, which destroys it."""
    found = []
    for twice in (False, True):
        model = tiny_llama()
        engine = make_engine(config(score=score), model)
        if twice:
            first = engine
            model.requires_grad_(True)
            engine = make_engine(config(score=score), model)
            first.destroy()
        assert len(tapped(model)) == (14 if score == "abs_mean" else len(method_of(engine).choice.shapes))
        steps(engine, range(SCORED + 2))
        found.append(everything(engine))
        assert len(tapped(model)) == len({t.name for t in method_of(engine).choice.tiles})
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(method_of(engine).choice.shapes)
    assert differing(*found) == []


def test_choices_survive_their_file(tmp_path: Path) -> None:
    engine = make_engine(config(score="random", choice_out=str(tmp_path / "tiles.json")))
    assert Choice.load(tmp_path / "tiles.json") == method_of(engine).choice
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="choice_out: cannot write .*tiles.json"):
        make_engine(config(score="random", choice_out=str(tmp_path / "file" / "tiles.json")))
