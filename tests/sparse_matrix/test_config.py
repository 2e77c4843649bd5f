# SPDX-License-Identifier: Apache-2.0
"""The "sparse_matrix" settings."""

from __future__ import annotations

from typing import Any

import pytest

from meft_ds.config import parse_config
from meft_ds.sparse_matrix.config import SparseMatrixConfig


def parsed(**settings: Any) -> SparseMatrixConfig:
    config = parse_config({"sparse_matrix": settings}).sparse_matrix
    assert config is not None
    return config


def fault(**settings: Any) -> str:
    with pytest.raises(ValueError) as e:
        parsed(**settings)
    return str(e.value)


def test_the_key_names_the_method_and_keeps_the_sparse_adapter_out() -> None:
    block = parse_config({"sparse_matrix": {}})
    assert block.sparse_matrix == SparseMatrixConfig() and block.sparse_adapter is None and block.subspace is None
    both = parse_config({"sparse_matrix": {}, "sparse_adapter": {}})
    assert both.sparse_matrix is not None and both.sparse_adapter is not None


def test_two_methods_that_train_the_linear_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="subspace and sparse_matrix both train the base's linear layers; keep one"):
        parse_config({"sparse_matrix": {}, "subspace": {}})


def test_every_setting_can_be_given() -> None:
    given = {
        **{"density": 0.5, "budget": "per_module", "preset": "paper", "score": "l2", "normalize": True},
        **{"block_size": 64, "warmup_steps": 3, "target_modules": [".*q_proj"], "segments": {".*qkv": [4, 2, 2]}},
        **{"state_device": "cpu", "choice_out": "tiles.json", "seed": 5},
    }
    config = parsed(**given)
    assert {**given, "target_modules": (".*q_proj",)}.items() <= config.model_dump().items()
    assert parse_config({"sparse_matrix": config.model_dump()}).sparse_matrix == config
    assert parsed(budget={"q": 1, "down": 0.25}).budget == {"q": 1.0, "down": 0.25}
    assert {*given, "choice_file"} == set(SparseMatrixConfig.model_fields)


@pytest.mark.parametrize(
    ("shape", "settings", "side"),
    [
        ((4096, 4096), {}, 256),
        ((11_008, 4096), {"density": 0.0071}, 256),  # the paper's lowest, on its model
        ((1024, 4096), {}, 256),
        ((1024, 1024), {}, 64),
        ((192, 192), {"density": 0.1}, 32),
        ((192, 192), {"density": 1.0}, 256),
        ((16, 16), {}, 4),
        ((192, 192), {"budget": {"q": 0.1, "v": 0.5}}, 32),
        ((192, 192), {"block_size": 256}, 256),
        ((4096, 4096), {"block_size": 24}, 24),
    ],
)
def test_the_size_of_tiles_follows_a_matrixs_share_unless_it_is_given(
    shape: tuple[int, int], settings: dict[str, Any], side: int
) -> None:
    assert SparseMatrixConfig(**settings).side_of(shape[0] * shape[1], ["q", "k"]) == side


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"densty": 0.1}, "sparse_matrix.densty: unknown key; did you mean 'density'?"),
        ({"density": 0}, "sparse_matrix.density: expected a fraction above 0 and at most 1, got 0"),
        ({"density": 1.01}, "density: expected a fraction above 0 and at most 1, got 1.01"),
        ({"density": float("nan")}, "density: expected a fraction"),
        ({"density": True}, "density: expected a fraction"),
        ({"density": "1%"}, "density: expected a fraction"),
        (
            {"budget": "local"},
            'budget: expected null, "global", "per_module" or an object of fractions by role',
        ),
        ({"budget": {}}, "sparse_matrix.budget: expected"),
        ({"budget": 0.1}, "sparse_matrix.budget: expected"),
        ({"budget": {"q": 2}}, "budget: q: expected a fraction above 0 and at most 1, got 2"),
        ({"preset": "smt"}, "sparse_matrix.preset"),
        ({"score": "fisher"}, "sparse_matrix.score"),
        ({"normalize": 1}, "sparse_matrix.normalize"),
        ({"block_size": 0}, 'sparse_matrix.block_size: expected a whole number of at least 1 or "auto", got 0'),
        ({"warmup_steps": -1}, "sparse_matrix.warmup_steps"),
        ({"warmup_steps": 0}, 'warmup_steps: score "abs_mean" needs at least 1 window'),
        ({"target_modules": "("}, "sparse_matrix.target_modules"),
        ({"segments": [1]}, "sparse_matrix.segments: expected an object such as"),
        ({"segments": {"(": [1]}}, "segments: '(' is not a regular expression"),
        ({"segments": {"a": []}}, "segments: a: expected a list of the parts' sizes"),
        ({"segments": {"a": [1, 0]}}, "segments: expected a whole number of at least 1, got 0"),
        ({"form": "delta"}, "sparse_matrix.form: unknown key"),
        ({"state_device": "gpu"}, "sparse_matrix.state_device"),
        ({"choice_file": 1}, "sparse_matrix.choice_file"),
        ({"choice_out": 1}, "sparse_matrix.choice_out"),
        ({"seed": -1}, "sparse_matrix.seed"),
        ({"density": 0.01, "budget": {"q": 0.1}}, "density: the fractions of budget say how much"),
        (
            {"preset": "paper", "budget": {"q": 0.1, "up": 0.1}},
            '"paper" has tiles of q, k and v only, not of up',
        ),
    ],
)
def test_impossible_values_are_refused_with_what_was_expected(settings: dict[str, Any], expected: str) -> None:
    assert expected in fault(**settings)


def test_one_error_lists_all_faults_across_settings() -> None:
    message = fault(preset="paper", budget={"up": 0.1}, density=0.1, warmup_steps=0)
    assert all(part in message for part in ("density: ", "warmup_steps: ", "budget: "))


def test_a_choice_file_refuses_what_would_have_no_effect_and_nothing_else() -> None:
    makes = {
        **{"density": 0.01, "budget": None, "preset": "all", "score": "abs_mean", "normalize": True, "seed": 0},
        **{"block_size": 256, "warmup_steps": 100, "target_modules": "x", "choice_out": "y"},
    }
    for name, value in makes.items():
        assert f"choice_file: tiles are read from it, so {name} would have no effect" in fault(
            choice_file="tiles.json", **{name: value}
        )
    assert ", ".join(sorted(makes)) in fault(choice_file="tiles.json", **makes)
    kept = parsed(choice_file="tiles.json", state_device="cpu", segments={"a": [1]})
    assert kept.choice_file == "tiles.json" and kept.windows == 0


def test_scores_without_gradients_take_no_windows() -> None:
    assert parsed().windows == 100 and parsed(warmup_steps=7, score="paper").windows == 7
    for score in ("random", "magnitude"):
        assert parsed(score=score).windows == parsed(score=score, warmup_steps=0).windows == 0


def test_the_preset_and_the_budget_say_which_roles_count_and_whether_scores_are_relative() -> None:
    assert parsed().roles is None and parsed().normalized
    assert parsed(preset="paper").roles == ("q", "k", "v") and not parsed(preset="paper").normalized
    assert parsed(preset="paper", normalize=True).normalized and not parsed(normalize=False).normalized
    assert parsed(budget={"o": 0.1}).roles == ("o",)
    assert parsed().shared_out == "per_module" and parsed(preset="paper").shared_out == "global"
    assert parsed(budget="global").shared_out == "global" and parsed(budget={"o": 0.1}).shared_out == {"o": 0.1}
    assert not parsed(score="random").normalized and parsed(score="magnitude").normalized


def test_the_first_pattern_of_segments_that_matches_a_whole_name_wins() -> None:
    config = parsed(segments={r".*\.qkv": [1, 2], r"a\..*": [3]})
    assert config.segments_of("a.qkv") == (r".*\.qkv", [1, 2]) and config.segments_of("a.b") == (r"a\..*", [3])
    assert config.segments_of("a.qkv.b.c") == (r"a\..*", [3]) and config.segments_of("b.qkvs") is None
