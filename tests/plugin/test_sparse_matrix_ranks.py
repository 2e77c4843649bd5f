# SPDX-License-Identifier: Apache-2.0
"""Sparse matrix tuning on two ranks; one run of them serves all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import Forge
from tests.plugin import sparse_matrix_ranks as program
from tests.plugin.tiles import SCORED, method_of

END = SCORED + program.STEPS


@pytest.fixture(scope="module")
def ranks(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path, dict[int, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "file").write_text("")
    alone = {}
    for at in (1, SCORED + 1):
        engine = program.engine_for(score="l2")
        program.train(engine, windows=range(at))
        engine.save_checkpoint(str(folder / "one"), tag=f"at{at}")
        alone[at] = {"losses": program.train(engine, windows=range(at, END)), **program.told(engine)}
    return forge.results(program.trainings, folder), folder, alone


@pytest.mark.parametrize("kind", program.KINDS)
def test_two_ranks_choose_and_train_what_one_rank_does_with_the_same_micro_batches(ranks: Any, kind: str) -> None:
    (a, b), folder, _ = ranks
    engine = program.engine_for(score=kind)
    losses = program.train(engine)
    assert a[kind] != a["l2" if kind != "l2" else "paper"]
    assert a[kind]["losses"] == b[kind]["losses"] == pytest.approx(losses, abs=1e-5)
    assert a[kind]["choice"] == b[kind]["choice"] == method_of(engine).choice.digest()
    assert a[kind]["scores"] == b[kind]["scores"]
    assert a[kind]["scores"] == pytest.approx([tile.score for tile in method_of(engine).choice.tiles], rel=1e-5)
    assert a[kind]["digest"] == b[kind]["digest"]
    if kind == "magnitude":
        both = torch.load(folder / "magnitude0.pt")
        for name, t in program.common(engine).items():
            torch.testing.assert_close(both[name], t, atol=1e-5, rtol=1e-4, msg=name)


def test_each_rank_holds_the_state_of_its_half(ranks: Any) -> None:
    (a, b), _, _ = ranks
    for (numel, first), (same, second) in zip(a["abs_mean"]["units"], b["abs_mean"]["units"], strict=True):
        assert numel == same == first + second and abs(first - second) <= 1


def test_ranks_repeat_their_bits_from_run_to_run(ranks: Any) -> None:
    for rank in ranks[0]:
        assert rank["again"] == {key: t for key, t in rank["abs_mean"].items() if key != "units"}


def test_exact_equals_serial_on_two_ranks_with_and_without_checkpointing(ranks: Any) -> None:
    ways = ("serial none", "exact none", "exact reentrant", "exact nonreentrant")
    for rank in ranks[0]:
        found = [rank[way] for way in ways]
        assert all(each == found[0] for each in found)
    assert ranks[0][0]["exact none"]["digest"] == ranks[0][1]["exact none"]["digest"]


def test_zero_stages_are_the_same_thing_on_two_ranks(ranks: Any) -> None:
    for rank in ranks[0]:
        assert rank["stage 0"] == rank["exact none"]


def test_state_where_the_model_is_gives_the_same_bits_on_two_ranks(ranks: Any) -> None:
    for rank in ranks[0]:
        assert rank["state accelerator"] == rank["state cpu"]
    a, b = (rank["state accelerator"] for rank in ranks[0])
    assert a["digest"] == b["digest"] and a["own"] != b["own"], "each holds its half"


def test_an_overflow_on_one_rank_counts_on_none(ranks: Any) -> None:
    """Windows: scored, overflow, scored, trained, overflow, trained. Scored so far, loss scale, nothing changed."""
    (a, b), _, _ = ranks
    assert a["overflow"] == b["overflow"]
    assert a["overflow"]["windows"] == [
        [1, 256.0, True],
        [1, 128.0, True],
        [None, 128.0, False],
        [None, 128.0, False],
        [None, 64.0, True],
        [None, 64.0, False],
    ]


@pytest.mark.parametrize("at", [1, SCORED + 1])
def test_checkpoints_go_from_one_rank_to_two_and_back(ranks: Any, at: int) -> None:
    (a, b), folder, alone = ranks
    for found in (a, b):
        assert found[f"loaded {at}"]["choice"] == alone[at]["choice"]
        assert found[f"loaded {at}"]["losses"] == pytest.approx(alone[at]["losses"], abs=1e-5)
        assert found[f"again {at}"]["choice"] == found[f"saved {at}"]["choice"]
        # two ranks' scores are saved as one sum, which rounds in another order: the tiles are the same all the same
        assert found[f"again {at}"]["digest"] == found[f"saved {at}"]["digest"]
    engine = program.engine_for(score="l2")
    engine.load_checkpoint(str(folder / "two"), tag=f"at{at}")
    engine.micro_steps = 2 * at
    losses = program.train(engine, windows=range(at, END))
    assert losses == pytest.approx(a[f"saved {at}"]["losses"], abs=1e-5)
    assert method_of(engine).choice.digest() == a[f"saved {at}"]["choice"]


def test_faults_that_the_first_rank_sees_reach_every_rank(ranks: Any) -> None:
    (a, b), _, _ = ranks
    assert a["refused"] == b["refused"]
    missing, unwritable, dense = a["refused"]
    assert "nowhere.json: cannot read this choice of tiles" in missing
    assert "tiles.json" in unwritable and "gives 0 tiles" in dense


def test_a_rank_that_does_not_reach_a_layer_keeps_nobody_waiting(ranks: Any) -> None:
    (a, b), _, _ = ranks
    assert a["apart serial"] == b["apart serial"] == a["apart exact"] == b["apart exact"]
    assert a["apart exact"]["choice"]
