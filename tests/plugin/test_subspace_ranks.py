# SPDX-License-Identifier: Apache-2.0
"""The subspace method on two ranks; one run of them serves all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import Forge
from tests.plugin import subspace_ranks as program


@pytest.fixture(scope="module")
def ranks(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("ranks")
    return forge.results(program.trainings, folder), folder


def test_two_ranks_equal_one_rank_with_twice_the_batch_through_checks_of_projectors(ranks: Any) -> None:
    (a, b), folder = ranks
    engine = program.engine_for("serial")
    norms = program.train(engine)
    assert a["learned"]["norms"] == b["learned"]["norms"] == pytest.approx(norms, rel=1e-3)
    assert a["learned"]["checks"] == 1 + (program.WINDOWS - 1) // program.INTERVAL
    for name, wanted in a["learned"]["bias"].items():
        here = engine.meft_stats()["subspace"]["bias"][name]
        assert here["held_out"] == pytest.approx(wanted["held_out"], abs=5e-3), name
    both = torch.load(folder / "learned0.pt")
    for name, t in program.common(engine).items():
        if t.dtype.is_floating_point and "/" not in name:
            torch.testing.assert_close(both[name], t, atol=2e-3, rtol=1e-2, msg=name)
        elif name.endswith(".index"):
            assert torch.equal(both[name], t), name


def test_ranks_hold_the_same_bits_and_repeat_them_from_run_to_run(ranks: Any) -> None:
    (a, b), _ = ranks
    assert a["learned"]["digest"] == b["learned"]["digest"] == a["again"]["digest"] == b["again"]["digest"]
    assert a["learned"]["norms"] == a["again"]["norms"] and a["learned"]["bias"] == b["learned"]["bias"]


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "nonreentrant"])
def test_exact_equals_serial_on_two_ranks_bit_for_bit(ranks: Any, checkpointing: str) -> None:
    for rank in ranks[0]:
        assert rank[f"exact {checkpointing}"] == rank[f"serial {checkpointing}"]
    assert len({rank[f"exact {checkpointing}"]["digest"] for rank in ranks[0]}) == 1
    assert sum(norm > 0.5 for norm in ranks[0][0]["exact none"]["norms"]) > 5, "clipping must bite"


def test_what_ranks_exchange_is_d_by_d_except_in_windows_with_a_check(ranks: Any) -> None:
    (a, b), _ = ranks
    elements = sum(numel for wire, numel in a["units"].values() if wire == "subspace")
    for rank in (a, b):  # each sends and fetches its half
        assert rank["learned"]["bytes"] == {"down": 2 * elements, "up": 2 * elements}
    payloads = {numel for _, numel in a["units"].values()}
    small = 64  # a few numbers for the verdict
    matrices = {16 * 16, 32 * 16}
    for step, sizes in enumerate(a["reduced"]):
        beside = {size for size in sizes if size > small} - payloads
        assert beside == (matrices - payloads if step % program.INTERVAL == 0 else set()), step


@pytest.mark.parametrize("which", ["exact activation", "serial activation", "exact weight"])
def test_a_rank_that_does_not_reach_a_layer_keeps_nobody_waiting(ranks: Any, which: str) -> None:
    (a, b), _ = ranks
    assert a[f"apart {which}"] == b[f"apart {which}"]
    bias = a[f"apart {which}"]["bias"]
    assert len(bias) == 6 and all(found["step"] >= 2 for found in bias.values())
    assert a["apart exact activation"] == a["apart serial activation"]


@pytest.mark.parametrize("which", ["exact activation", "serial activation", "exact weight"])
def test_ranks_agree_on_late_fits_whichever_of_them_has_the_gradient(ranks: Any, which: str) -> None:
    (a, b), _ = ranks
    assert a[f"late {which}"] == b[f"late {which}"]
    bias = a[f"late {which}"]["bias"]
    fitted = {name.removesuffix(".weight"): found["step"] for name, found in bias.items() if found}
    assert fitted == {"layers.0.0": 0, "layers.1.0": 0, "layers.2.0": 0, "layers.0.1": 2, "layers.1.1": 3}
    assert bias["layers.2.1.weight"] == {}, "nobody used it"
    assert a["late exact activation"] == a["late serial activation"]
