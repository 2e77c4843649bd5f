# SPDX-License-Identifier: Apache-2.0
import pytest

from meft_ds.config import parse_config
from meft_ds.plugin.ds_config import conflicts, skipped
from tests.toy import ds_config, make_engine


def fault(block: object) -> str:
    with pytest.raises(ValueError) as e:
        parse_config(block)
    return str(e.value)


def test_empty_block_means_the_sparse_adapter_with_its_defaults() -> None:
    config = parse_config({})
    assert config.sparse_adapter.keys_per_token == 64 and config.sparse_adapter.experts_per_token == 8
    assert config.sparse_adapter.resolve(4096).rows == 8192


def test_a_method_that_is_named_is_the_only_one_unless_both_are() -> None:
    config = parse_config({"subspace": {}})
    assert config.sparse_adapter is None and config.subspace is not None and config.subspace.dim == 0.5
    both = parse_config({"subspace": {}, "sparse_adapter": {}})
    assert both.sparse_adapter is not None and both.subspace is not None
    assert parse_config({}).subspace is None


def test_the_dimension_of_a_matrix_is_a_fraction_of_its_smaller_side_and_0_where_nothing_is_gained() -> None:
    half, fixed = (parse_config({"subspace": {"dim": dim, "nonzeros": 4}}).subspace for dim in (0.5, 16))
    assert [half.dim_of(m, n) for m, n in ((64, 32), (32, 64), (17, 17), (9, 9), (1, 64))] == [16, 16, 8, 0, 0]
    assert [fixed.dim_of(m, n) for m, n in ((64, 32), (16, 64), (17, 17))] == [16, 0, 16]


def test_unknown_key_suggests_the_nearest_valid_one_with_its_path() -> None:
    assert "meft_offload.sparse_adapter.keys_per_tokn: unknown key; did you mean 'keys_per_token'?" in fault(
        {"sparse_adapter": {"keys_per_tokn": 3}}
    )
    assert "meft_offload.sparse_adaptor: unknown key; did you mean 'sparse_adapter'?" in fault({"sparse_adaptor": {}})
    assert "valid keys: " in fault({"zzz": 1})


def test_one_error_lists_all_faults_of_all_kinds() -> None:
    message = fault(
        {
            "sparse_adapter": {"rows": 10, "keys_per_token": 64, "gat": True, "experts_per_token": 0, "init_std": -1},
            "moments_dtype": "fp8",
            "train": ["("],
            "host_memory_gb": -2,
        }
    )
    for part in ("keys_per_token: 64 is more than rows = 10", "gat: unknown key", "experts_per_token", "init_std"):
        assert part in message, part
    for part in ("moments_dtype", "'fp8'", "train", "not a regular expression", "host_memory_gb"):
        assert part in message, part
    assert "has 7 faults" in message


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (
            {"sparse_adapter": {"rows": 8, "experts": 4, "experts_per_token": 2}},
            "keys_per_token: 64 is more than rows = 8",
        ),
        ({"sparse_adapter": {"rows": 100, "experts": 101}}, "experts: 101 is more than rows = 100"),
        ({"sparse_adapter": {"keys_per_token": 0}}, "keys_per_token: expected a whole number of at least 1, got 0"),
        (
            {"sparse_adapter": {"experts_per_token": 0}},
            "experts_per_token: expected a whole number of at least 1, got 0",
        ),
        ({"sparse_adapter": {"rows": True}}, "rows: expected a whole number"),
        ({"sparse_adapter": {"rows": "4096"}}, "rows: expected a whole number"),
        ({"sparse_adapter": {"scope": "sentence"}}, "scope"),
        ({"sparse_adapter": None}, "sparse_adapter"),
        ({"subspace": {"nonzero": 4}}, "subspace.nonzero: unknown key; did you mean 'nonzeros'?"),
        ({"subspace": {"nonzeros": 0}}, "subspace.nonzeros: expected a whole number of at least 1, got 0"),
        ({"subspace": {"dim": 0}}, "subspace.dim: expected a whole number of at least 1, or a fraction below 1, got 0"),
        ({"subspace": {"dim": 2.0}}, "subspace.dim: expected a fraction below 1 or a whole number"),
        ({"subspace": {"dim": True}}, "subspace.dim: expected a whole number of at least 1"),
        ({"subspace": {"gradient_side": "both"}}, "subspace.gradient_side"),
        ({"subspace": {"projectors": "fixed"}}, "subspace.projectors"),
        ({"subspace": {"refit_interval": -1}}, "subspace.refit_interval"),
        ({"subspace": {"refit_threshold": float("nan")}}, "subspace.refit_threshold"),
        ({"subspace": {"fit_lr": 0}}, "subspace.fit_lr"),
        ({"subspace": {"fit_seconds": -1.0}}, "subspace.fit_seconds"),
        ({"subspace": {"scale": 0}}, "subspace.scale"),
        ({"subspace": {"scale": "sgd"}}, "subspace.scale"),
        ({"subspace": {"rounding": "nearest"}}, "subspace.rounding"),
        ({"subspace": {"state_device": "gpu"}}, "subspace.state_device"),
        ({"subspace": {"target_modules": "("}}, "subspace.target_modules"),
        ({"subspace": {"seed": -1}}, "subspace.seed"),
        (None, "expected an object such as"),
        ([], "expected an object such as"),
    ],
)
def test_impossible_values_are_refused_with_what_was_expected(block: object, expected: str) -> None:
    assert expected in fault(block)


def test_conflicts_elsewhere_in_the_ds_config_are_listed_with_the_fix() -> None:
    found = "\n".join(
        conflicts(
            {
                "zero_optimization": {"stage": 4, "zenflow": {"topk_ratio": 0.1}},
                "optimizer": {"type": "Lion", "params": {"lr": 1e-3}},
                "hybrid_engine": {"enabled": True},
                "tensor_parallel": {"autotp_size": 2},
            }
        )
    )
    for part in (
        "zero_optimization.stage: expected 0, 1, 2 or 3, got 4",
        "zenflow",
        "'Lion' is not supported",
        "hybrid_engine",
        "autotp_size",
    ):
        assert part in found, part
    assert "lr: expected a number >= 0, got -0.1" in "".join(
        conflicts({"optimizer": {"type": "AdamW", "params": {"lr": -0.1}}})
    )
    assert (
        conflicts({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}) == []
    )
    assert conflicts({"hybrid_engine": {"enabled": False}}) == []


def test_what_a_methods_own_settings_conflict_with_stands_in_the_one_error() -> None:
    made = ds_config(block={"subspace": {"rounding": "residual", "dmi": 3}}, zero_optimization={"stage": 3})
    made["gradient_clipping"] = -1.0
    with pytest.raises(ValueError) as e:
        make_engine(made)
    assert "3 faults" in str(e.value)
    for part in ("gradient_clipping", "subspace.dmi: unknown key", 'subspace.rounding: "residual" keeps'):
        assert part in str(e.value), part


def test_settings_without_effect_are_warned_of() -> None:
    assert "offload_optimizer is skipped" in skipped({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})[0]
    assert skipped({"zero_optimization": {"offload_optimizer": {"device": "none"}}}) == []
