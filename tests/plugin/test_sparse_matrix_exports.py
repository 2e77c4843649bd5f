# SPDX-License-Identifier: Apache-2.0
"""Ways out of a model that sparse matrix tuning trains: complete weights in the delta form, and a warning where nothing
was trained."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from meft_ds.plugin.checkpoint import overrides
from tests.plugin import exports_program as program
from tests.plugin.tiles import SCORED, config, differing, everything, method_of, steps, tiles_units
from tests.ranks import run_ranks
from tests.toy import batch, make_engine, tiny_llama


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By stage: what the first rank printed."""

    @functools.cache
    def launch(stage: int) -> str:
        folder = str(tmp_path_factory.mktemp("exports"))
        return run_ranks(Path(program.__file__), 2 if stage == 3 else 1, folder, str(stage))[0]

    return launch


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch(5)).logits


def delta_engine(precision: str = "fp32", **more: Any) -> Any:
    engine = make_engine(config(precision, form="delta", score="random", density=0.3, **more))
    steps(engine, range(3))
    return engine


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# Complete weights


@pytest.mark.parametrize("stage", [2, 3])
def test_every_ordinary_way_out_of_the_delta_form_gives_base_and_tiles(stage: int, launched: Any) -> None:
    found = json.loads(next(line for line in launched(stage).splitlines() if line.startswith('{"plain"')))
    for model in ("plain", "wrapped"):
        ways = found[model]["wrong"]
        assert {"trainer", "accelerate", "get_state_dict", "16 bit", "checkpoint", "pretrained"} < ways.keys()
        assert {name: wrong for name, wrong in ways.items() if wrong} == {}
        assert found[model]["changed"] >= 14
        assert ("load_checkpoint only" in found[model]["refused"]) == (stage == 3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_state_dict_that_is_loaded_back_adds_nothing_twice(precision: str) -> None:
    engine, twin = delta_engine(precision), delta_engine(precision)
    before = everything(engine)
    wanted = logits(engine.module)
    state = engine.module.state_dict()
    engine.module.load_state_dict(state)
    engine.module.load_state_dict({name: t.float() for name, t in state.items()})
    assert torch.equal(logits(engine.module), wanted) and differing(before, everything(engine)) == []
    assert steps(engine, range(3, 6)) == steps(twin, range(3, 6))
    assert differing(everything(engine), everything(twin)) == []


def test_a_state_dict_of_another_time_is_the_function_until_the_next_update() -> None:
    engine, twin = delta_engine(), delta_engine()
    then, early, base = logits(engine.module), engine.module.state_dict(), parameters(engine.module)
    # and again later, while the last update may be under way
    for each in (engine, twin):
        steps(each, range(3, 6))
    engine.module.load_state_dict(early)
    torch.testing.assert_close(logits(engine.module), then, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(twin.module), then, atol=1e-2)
    assert differing(base, parameters(engine.module)) == [], "the weight stays what it was"
    assert all(torch.allclose(t, early[name], atol=1e-6) for name, t in engine.module.state_dict().items())
    engine.module.load_state_dict(tiny_llama().state_dict())
    torch.testing.assert_close(logits(engine.module), logits(tiny_llama()), atol=1e-5, rtol=1e-5)
    steps(engine, [6])
    engine.meft_flush()
    for unit in tiles_units(engine):  # as in the value form, masters have the last word
        torch.testing.assert_close(unit.values(), unit.state_tensors()["master"])


def test_parameters_are_the_base_and_save_pretrained_merges_them(tmp_path: Path) -> None:
    engine = delta_engine()
    model, base = engine.module, tiny_llama().state_dict()
    merged = {name: t.clone() for name, t in model.state_dict().items()}
    assert len([name for name, t in merged.items() if not torch.equal(t, base[name])]) == 14
    vars_of = model.state_dict(keep_vars=True)
    assert all(vars_of[name] is p for name, p in model.named_parameters())
    given = {
        "parameters": dict(model.named_parameters()),
        "vars": dict(vars_of),
        "copies": {name: t.clone() for name, t in merged.items()},
        "half": {name: t.to(torch.bfloat16) for name, t in merged.items()},
        "half of parameters": {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()},
    }
    for name, state in given.items():
        model.save_pretrained(tmp_path / name, state_dict=state)
        saved = load_file(tmp_path / name / "model.safetensors")
        for key, t in merged.items():
            # parameters that were rounded before what was learned is added are rounded twice
            within = 2e-2 if name == "half of parameters" else 0.0
            torch.testing.assert_close(saved[key], t.to(saved[key].dtype), atol=within, rtol=0.0, msg=f"{name} {key}")


def test_a_copy_has_a_state_dict_of_its_own_and_becomes_what_it_loads() -> None:
    engine = delta_engine()
    merged, twin = engine.module.state_dict(), copy.deepcopy(engine.module)
    steps(engine, range(3, 6))
    assert all(torch.equal(t, merged[name]) for name, t in twin.state_dict().items())
    assert any(not torch.equal(t, merged[name]) for name, t in engine.module.state_dict().items())
    twin.load_state_dict(now := engine.module.state_dict())
    assert all(torch.equal(t, now[name]) for name, t in twin.state_dict().items())
    assert all(torch.equal(p, now[name]) for name, p in twin.named_parameters())
    torch.testing.assert_close(logits(twin), logits(engine.module), atol=1e-5, rtol=1e-5)


def test_two_engines_on_one_model_add_once() -> None:
    model = tiny_llama()
    first = make_engine(config(form="delta", score="random", density=0.3), model)
    model.requires_grad_(True)
    engine = make_engine(config(form="delta", score="random", density=0.3), model)
    first.destroy()
    steps(engine, range(3))
    before, state = logits(model), model.state_dict()
    model.load_state_dict(state)
    assert torch.equal(logits(model), before)
    engine.destroy()
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


# Nothing was trained


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(overrides.logger, "warning", told.append)
    return told


def about_training(warnings: list[str]) -> list[str]:
    return [line for line in warnings if "nothing was trained" in line]


WAYS = {
    "checkpoint": lambda engine, to: engine.save_checkpoint(str(to)),
    "16 bit": lambda engine, to: engine.save_16bit_model(str(to)),
    "save_pretrained": lambda engine, to: engine.module.save_pretrained(to),
    "state_dict": lambda engine, to: engine.module.state_dict(),
}


@pytest.mark.parametrize("way", WAYS)
def test_who_saves_while_tiles_are_scored_is_told_once_that_it_is_the_base(
    way: str, warnings: list[str], tmp_path: Path
) -> None:
    engine = make_engine(config(warmup_steps=5))
    WAYS[way](engine, tmp_path)
    assert about_training(warnings) == [], "before the first step nobody expects anything else"
    steps(engine, range(3))
    for _ in range(2):
        WAYS[way](engine, tmp_path)
    (line,) = about_training(warnings)
    assert "scoring (3 of 5 windows)" in line and "is the base" in line and "warmup_steps" in line
    engine.destroy()
    assert len(about_training(warnings)) == 1, "the same was said a moment ago"


@pytest.mark.parametrize(
    ("trained", "choice_out", "line"),
    [
        (0, False, ""),
        (1, True, f"scoring (1 of {SCORED} windows)"),
        (SCORED, False, f"has scored {SCORED} windows, and no step"),
        (SCORED, True, ""),
        (SCORED + 1, False, ""),
    ],
)
def test_a_run_that_ends_before_it_trains_says_so(
    trained: int, choice_out: bool, line: str, warnings: list[str], tmp_path: Path
) -> None:
    engine = make_engine(config(**({"choice_out": str(tmp_path / "tiles.json")} if choice_out else {})))
    steps(engine, range(trained))
    engine.destroy()
    engine.destroy()
    assert len(about_training(warnings)) == bool(line) and line in "".join(about_training(warnings))
    assert (tmp_path / "tiles.json").exists() == (choice_out and trained == SCORED)


def test_a_resumed_run_that_has_trained_is_told_nothing(warnings: list[str], tmp_path: Path) -> None:
    engine, resumed = delta_engine(), make_engine(config(form="delta", density=0.3, warmup_steps=5))
    engine.save_checkpoint(str(tmp_path / "a"))
    scoring = make_engine(config(warmup_steps=2))
    steps(scoring, [0])
    scoring.save_checkpoint(str(tmp_path / "b"))
    assert len(about_training(warnings)) == 1
    going_on = make_engine(config(warmup_steps=2))
    going_on.load_checkpoint(str(tmp_path / "b"))
    steps(going_on, range(1, 4))
    assert not method_of(going_on).observing
    for each in (engine, going_on):
        each.module.state_dict()
        each.destroy()
    resumed.destroy()
    assert len(about_training(warnings)) == 1


def test_a_program_that_just_exits_is_told_too(launched: Any) -> None:
    assert launched(2).count("is still scoring (3 of 5 windows): nothing was trained") == 1
