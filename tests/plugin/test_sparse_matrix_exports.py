# SPDX-License-Identifier: Apache-2.0
"""Ways out of a model that sparse matrix tuning trains: complete weights in every stage, and a warning where nothing
was trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from meft_ds.plugin.checkpoint import overrides
from tests.forked import Forge
from tests.plugin.tile_export_ranks import every_way, just_exits
from tests.plugin.tiles import SCORED, config, differing, everything, method_of, steps
from tests.toy import make_engine

# Complete weights


@pytest.mark.parametrize("stage", [2, 3])
def test_every_ordinary_way_out_gives_base_and_tiles(stage: int, forge: Forge, tmp_path: Path) -> None:
    found = forge.results(every_way, tmp_path, world=2 if stage == 3 else 1, stage=stage)[0]
    for model in ("plain", "wrapped"):
        ways = found[model]["wrong"]
        assert {"trainer", "accelerate", "get_state_dict", "16 bit", "checkpoint", "pretrained"} < ways.keys()
        assert {name: wrong for name, wrong in ways.items() if wrong} == {}
        assert found[model]["changed"] >= 14


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_state_dict_that_is_loaded_back_changes_nothing(precision: str) -> None:
    engine, twin = (make_engine(config(precision, score="random", density=0.3)) for _ in range(2))
    for each in (engine, twin):
        steps(each, range(3))
    before = everything(engine)
    state = engine.module.state_dict()
    engine.module.load_state_dict(state)
    engine.module.load_state_dict({name: t.float() for name, t in state.items()})
    assert differing(before, everything(engine)) == []
    assert steps(engine, range(3, 6)) == steps(twin, range(3, 6))
    assert differing(everything(engine), everything(twin)) == []


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
    engine = make_engine(config(score="random", density=0.3))
    steps(engine, range(3))
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
    assert len(about_training(warnings)) == 1


def test_a_program_that_just_exits_is_told_too(forge: Forge, tmp_path: Path) -> None:
    (rank,) = forge.run(just_exits, tmp_path, world=1)
    assert rank.code == 0 and rank.log.count("is still scoring (3 of 5 windows): nothing was trained") == 1
