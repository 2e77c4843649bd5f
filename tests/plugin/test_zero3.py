# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3 against the stages in which every rank holds the whole base; one run of ranks serves many tests.

Stage 3 only runs in ranks: once it was used, DeepSpeed has replaced torch's F.linear for as long as the process lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import meft_ds
from tests.forked import Forge
from tests.plugin import zero3_checkpoint_ranks as files_ranks
from tests.plugin import zero3_ranks as ranks
from tests.plugin.zero3_experts import experts
from tests.plugin.zero3_ranks import METHODS, ONE_OF_EACH, SETTINGS
from tests.toy import batch, tiny_llama

# eps is 1e-4 or more: with 1e-8 AdamW turns rounding differences of near-zero gradients into whole steps
CLOSE = 1e-5
LONG = {"steps": 30, "eps": 2e-3}  # 30 steps add up more of them
IN_SHORT = {
    "few live": ["tiles"],
    "evaluation": ["adapter and norms"],
    "biases": ["subspace learned"],
    "fused loss": ["tiles"],
}


Run = Callable[..., Any]


@pytest.fixture
def run(forge: Forge, tmp_path: Path) -> Run:
    """Calls a function on so many ranks, in the same folder each time; returns what the first of them found."""

    def run(function: Callable[..., Any], world: int = 2, **arguments: Any) -> Any:
        return forge.results(function, tmp_path, world=world, timeout=900, **arguments)[0]

    return run


@pytest.fixture(scope="module")
def two(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the first of two ranks found, and the folder of its files."""
    folder = tmp_path_factory.mktemp("two")
    cases: dict[Callable[..., Any], dict[str, Any]] = {
        ranks.curves: {"steps": 6},
        ranks.pending: {},
        ranks.memory: {},
        experts: {},
        ranks.settings: {"only": IN_SHORT},
        files_ranks.files: {"only": ONE_OF_EACH},
    }
    return {case.__name__: forge.results(case, folder, **given)[0] for case, given in cases.items()}, folder


# -- the same training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_stage_3_trains_as_stage_2_on_two_ranks(two: Any, method: str) -> None:
    curves = two[0]["curves"]
    assert curves[f"{method} 3"] == pytest.approx(curves[f"{method} 2"], abs=CLOSE)
    assert curves[f"{method} 3"][4] != curves[f"{method} 3"][0], "weights must have changed"


def test_every_expert_of_a_tensor_trains_in_stage_3_as_in_stage_2_wherever_its_slice_lies(two: Any) -> None:
    if not two[0]["experts"]:
        pytest.skip("this version of transformers has no tensors of several experts")
    _experts_train(two[0]["experts"])


def _experts_train(found: dict[str, Any]) -> None:
    for name, block in found.items():
        assert block["experts"] == 2 and block["moved"] > 1e-3, name
        assert block["stage 3"] < CLOSE, name
        assert block["elsewhere"], f"{name}: updates of slices that lie elsewhere are lost"


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_stages_have_the_same_loss_curves_over_30_steps(world: int, run: Run) -> None:
    curves = run(ranks.curves, world, **LONG, stages=(0, 1, 2, 3))
    for method in METHODS:
        assert curves[f"{method} 0"] == curves[f"{method} 1"] == curves[f"{method} 2"]
        assert curves[f"{method} 3"] == pytest.approx(curves[f"{method} 2"], abs=CLOSE), method
        assert sum(curves[f"{method} 3"][-4:]) < sum(curves[f"{method} 3"][:4]), method


@pytest.mark.long
def test_one_two_and_four_ranks_have_the_same_loss_curves_in_stage_3(run: Run) -> None:
    # each rank scores its own micro-batch, so what tiles they choose depends on how many there are
    one, two, four = (run(ranks.curves, world, **LONG, stages=(3,), score="magnitude") for world in (1, 2, 4))
    for method in METHODS:
        assert two[f"{method} 3"] == pytest.approx(one[f"{method} 3"], abs=CLOSE), method
        assert four[f"{method} 3"] == pytest.approx(one[f"{method} 3"], abs=CLOSE), method


@pytest.mark.long
def test_stage_3_repeats_its_bits_and_overlapping_changes_none(forge: Forge, tmp_path: Path) -> None:
    for found in forge.results(ranks.bits, tmp_path):
        for method in METHODS:
            assert found[f"{method} exact"] == found[f"{method} again"] == found[f"{method} serial"], method
            assert found[f"{method} eager"]["losses"][-1] < found[f"{method} eager"]["losses"][-5], method
        assert any(found[f"{m} eager"] != found[f"{m} exact"] for m in METHODS), "eager must not be exact by chance"


# -- settings ----------------------------------------------------------------------------------------------------------


def _compare(settings: dict[str, Any], name: str, methods: Iterable[str] = ONE_OF_EACH) -> None:
    # roundings of bf16 fall differently: DeepSpeed's linear layer is not torch's, and slices draw bits of their own
    within = 2e-2 if name in ("bf16", "autocast") else CLOSE
    for method in methods:
        expected = settings[f"{name}/{method}/2"]
        assert settings[f"{name}/{method}/3"] == pytest.approx(expected, abs=within), (name, method)
        assert len(set(expected)) > len(expected) / 2


@pytest.mark.parametrize("name", IN_SHORT)
def test_a_setting_trains_as_in_stage_2(two: Any, name: str) -> None:
    _compare(two[0]["settings"], name, IN_SHORT[name])


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_every_setting_trains_as_in_stage_2(run: Run, world: int) -> None:
    found = run(ranks.settings, world)
    for name in SETTINGS:
        _compare(found, name)


@pytest.mark.long
def test_an_overflow_of_one_rank_leaves_weights_and_state_of_all_as_they_were(forge: Forge, tmp_path: Path) -> None:
    for rank in forge.results(ranks.overflow, tmp_path):
        for name, found in rank.items():
            assert found["unchanged"] and found["skipped"], name
            assert found["scale"][1] == found["scale"][0] / 2, name
        for method in ONE_OF_EACH:
            a, b = (rank[f"{method} {stage}"]["losses"] for stage in (2, 3))
            assert b == pytest.approx(a, abs=2e-2)


@pytest.mark.long
def test_a_model_made_under_zero_init_trains_bit_for_bit_as_one_partitioned_later(run: Run) -> None:
    found = run(files_ranks.init)
    for method in ONE_OF_EACH:
        assert found[f"{method} init"] == found[f"{method} later"], method


@pytest.mark.long
def test_an_engine_goes_on_where_the_one_before_it_left_a_partitioned_model(run: Run) -> None:
    found = run(files_ranks.again)
    for method, losses in found.items():
        first, second = losses[:4], losses[6:10]
        assert len(losses) == 12
        if method == "adapter and norms":  # its rows went with its engine
            continue
        assert all(b < a - 0.05 for a, b in zip(first, second, strict=True)), (method, losses)


# -- what is read, and what is held ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adapter and norms", "subspace learned", "tiles at once"])
def test_no_forward_reads_a_weight_before_its_update_even_when_it_was_gathered_ahead(two: Any, method: str) -> None:
    found = two[0]["pending"]
    assert found[f"{method} slow"]["ahead"] > 3, "gathers must have met updates under way"
    assert found[f"{method} slow"]["same"], "weights read differ from those of the serial order"


def test_between_steps_a_rank_holds_its_part_of_the_base_and_nothing_gathered(two: Any) -> None:
    for name, found in two[0]["memory"].items():
        assert found["gathered"] == 0, name
        assert found["held"] <= found["whole"] / 2 + 4 * found["parameters"], name


def test_after_forward_no_gathered_weight_is_kept_for_backward(two: Any) -> None:
    for name, found in two[0]["memory"].items():
        assert found["saved"] == [], name


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ONE_OF_EACH)
@pytest.mark.parametrize("saved", [2, 3])
def test_a_checkpoint_goes_on_in_either_stage(two: Any, method: str, saved: int) -> None:
    _goes_on(two[0]["files"], method, saved)


@pytest.mark.parametrize("method", ONE_OF_EACH)
@pytest.mark.parametrize("stage", [2, 3])
def test_the_model_file_and_the_16_bit_model_hold_complete_weights(two: Any, method: str, stage: int) -> None:
    assert two[0]["files"][f"{method} {stage} saves"]
    _holds_complete_weights(two[1] / f"{method.replace(' ', '_')}{stage}", method)


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 4])
def test_files_of_stages_2_and_3_with_other_numbers_of_ranks(run: Run, tmp_path: Path, world: int) -> None:
    files = run(files_ranks.files, world)
    for method in METHODS:
        for stage in (2, 3):
            _goes_on(files, method, stage)
            _holds_complete_weights(tmp_path / f"{method.replace(' ', '_')}{stage}", method)


def _goes_on(files: dict[str, Any], method: str, saved: int) -> None:
    assert files[f"{method} {saved} to {saved}"] == files[f"{method} {saved}"], "bit for bit in the same stage"
    expected = files[f"{method} {saved}"]["losses"]
    assert files[f"{method} {saved} to {5 - saved}"]["losses"] == pytest.approx(expected, abs=CLOSE)


def _holds_complete_weights(at: Path, method: str) -> None:
    whole = torch.load(at / "t" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    plain, base = torch.load(at / "pytorch_model.bin"), tiny_llama().state_dict()
    assert plain.keys() == base.keys()
    assert all(torch.equal(whole[name], t) for name, t in plain.items())
    assert whole.keys() - plain.keys() == {name for name in whole if "meft_adapter" in name}
    if method != "adapter":
        assert any(not torch.equal(t, plain[name]) for name, t in base.items())
    logits = torch.load(at / "logits.pt")
    for folder in (at, at / "adapter") if "adapter" in method else (None,):
        model = tiny_llama(seed=9)
        model.load_state_dict(plain)
        if folder is not None:
            meft_ds.load_adapter(model, folder)
        with torch.no_grad():
            found = model.eval()(**{k: t for k, t in batch(7).items() if k != "labels"}).logits
        torch.testing.assert_close(found, logits, atol=2e-5, rtol=1e-5)
    if "tiles" in method:
        rebuilt = meft_ds.apply_tiles(tiny_llama(), at / "tiles.safetensors").state_dict()
        assert all(torch.equal(rebuilt[name], t) for name, t in plain.items())


@pytest.mark.long
@pytest.mark.parametrize(
    "legs",
    [
        [(1, 3), (2, 3), (4, 3), (1, 3)],
        [(1, 2), (2, 3), (4, 2), (1, 3)],
        [(4, 3), (2, 2), (1, 3)],
    ],
)
def test_runs_go_on_with_other_numbers_of_ranks_and_stages(run: Run, legs: list[tuple[int, int]]) -> None:
    each = 4
    world, stage = legs[0]
    straight = run(files_ranks.leg, world, stage=stage, first=0, steps=each * len(legs))
    for index, (world, stage) in enumerate(legs):
        found = run(files_ranks.leg, world, stage=stage, first=each * index, steps=each)
        for method in METHODS:
            expected = straight[method][each * index : each * (index + 1)]
            within = CLOSE if method != "subspace learned" else 1e-3  # fits follow roundings
            assert found[method] == pytest.approx(expected, abs=within), (method, world, stage)


@pytest.mark.compat
@pytest.mark.long
def test_stage_3_trains_as_stage_2_on_one_rank(run: Run) -> None:
    _experts_train(run(experts, 1))
    curves = run(ranks.curves, 1)
    for method in METHODS:
        assert curves[f"{method} 3"] == pytest.approx(curves[f"{method} 2"], abs=CLOSE), method
