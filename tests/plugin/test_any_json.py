# SPDX-License-Identifier: Apache-2.0
"""Whatever JSON stands at whatever key gives a working configuration or one ValueError that names the key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from meft_ds.config import MeftConfig, _settings, parse_config
from meft_ds.plugin.ds_config import conflicts, skipped, zero_settings
from tests.toy import ds_config, make_engine


def nested(depth: int, of: type = list) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if of is list else {"a": value}
    return value


ODD = (
    *(None, True, False, 0, -0.0, 1, -1, 0.5, 2**31, 2**63, 10**400, -(10**400), 10**5000, 1e308, 5e-324),
    *(float("inf"), float("-inf"), float("nan"), "", "auto", "1e-4", "0.5", "64", "true", "null", "none", "cpu"),
    *("a\0b", "\ud800", "x" * 10_000, "(", "a{99999999999}", "(?:a{60000}){60000}", "(" * 5000, "torch.float16"),
    *(nested(100), nested(10_000), nested(100, dict), nested(10_000, dict)),
    *([], {}, [[]], [None], [""], ["a", 1], {"": None}, {"a" * 5000: 1}, {"enabled": 1}, {"type": None}),
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANY_JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
QUICK = settings(suppress_health_check=list(HealthCheck))


def keys_of(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*path, name)
        if (inner := _settings(field.annotation)) is not None:
            yield from keys_of(inner, (*path, name))


OURS = list(keys_of(MeftConfig))
ZERO = ("stage", "zenflow", "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_hpz_partition_size")
THEIRS = [
    *(("zero_optimization",), ("optimizer",), ("optimizer", "params"), ("optimizer", "type"), ("checkpoint",)),
    *(("zero_optimization", key) for key in (*ZERO, "mics_shard_size", "offload_param", "offload_optimizer")),
    *(("optimizer", "params", key) for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "bias_correction")),
    *(("checkpoint", key) for key in ("writer", "use_node_local_storage", "load_universal")),
    *((key,) for key in ("hybrid_engine", "amp", "compression_training", "sparse_gradients", "sequence_parallel_size")),
    *(("tensor_parallel",), ("tensor_parallel", "autotp_size"), ("datastates_ckpt",), ("nebula",)),
    *(("nebula", "enabled"), ("data_types",), ("data_types", "grad_accum_dtype"), ("gradient_clipping",)),
    *(("torch_autocast",), ("torch_autocast", "dtype"), ("communication_data_type",), ("prescale_gradients",)),
]


@pytest.fixture(autouse=True, scope="module")
def in_a_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A text may be the path of a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        yield


def at(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return value


def told(block: Any, faults: list[str] | None = None) -> str:
    """The error, readable, or ""."""
    try:
        assert isinstance(parse_config(block, faults), MeftConfig)
    except ValueError as e:
        assert len(str(e)) < 20_000
        return str(e)
    return ""


@QUICK
@given(st.sampled_from(OURS), ANY_JSON)
def test_any_json_at_any_key_of_the_block_is_taken_or_named(path: tuple[str, ...], value: Any) -> None:
    message = told(at(path, value))
    assert not message or path[0] in message, message


@QUICK
@given(ANY_JSON)
def test_any_json_as_the_block_is_taken_or_named(value: Any) -> None:
    message = told(value)
    assert not message or "meft_offload" in message


@QUICK
@given(st.sampled_from(THEIRS), ANY_JSON)
def test_any_json_elsewhere_in_the_ds_config_is_taken_or_named(path: tuple[str, ...], value: Any) -> None:
    _elsewhere(path, value)


def test_odd_values_at_every_key_are_taken_or_named() -> None:
    for value in ODD:
        told(value)
        for path in OURS:
            message = told(at(path, value))
            assert not message or path[0] in message, path
        for path in THEIRS:
            _elsewhere(path, value)


def _elsewhere(path: tuple[str, ...], value: Any) -> None:
    config = at(path, value)
    skipped(config)
    zero_settings(config)
    faults = conflicts(config)
    message = told({}, faults)
    assert bool(faults) == bool(message) and (not message or path[0] in message), path


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optimizer", "AdamW", "optimizer: expected an object of settings, got 'AdamW'"),
        ("optimizer", {"type": "AdamW", "params": []}, "optimizer.params: expected an object of settings, got []"),
        ("optimizer", {"type": "AdamW", "params": {"lr": "1e-4"}}, "params.lr: expected a number >= 0, got '1e-4'"),
        ("optimizer", {"type": "AdamW", "params": {"lr": 1e308}}, "at most 3.4e+38, got 1e+308"),
        ("optimizer", {"type": "AdamW", "params": {"lr": float("nan")}}, "lr: expected a number >= 0, got nan"),
        ("optimizer", {"type": "AdamW", "params": {"lr": None}}, "lr: expected a number >= 0, got None"),
        ("optimizer", {"type": "AdamW", "params": {"betas": [0.9]}}, "betas: expected two numbers from 0 and below 1"),
        ("checkpoint", True, "checkpoint: expected an object of settings, got True"),
        ("tensor_parallel", 4, "tensor_parallel: expected an object of settings, got 4"),
        ("data_types", [1], "data_types: expected an object of settings, got [1]"),
        ("zero_optimization", "2", "zero_optimization: expected an object of settings, got '2'"),
        ("zero_optimization", {"zenflow": {}}, "zenflow: does not go with meft_offload"),
        ("torch_autocast", {"enabled": True, "dtype": "torch.float16"}, "torch_autocast.dtype: float16 needs"),
        ("sequence_parallel_size", "2", "sequence_parallel_size: expected a whole number, got '2'"),
        ("gradient_clipping", "1.0", "gradient_clipping: expected a number >= 0, got '1.0'"),
    ],
)
def test_what_deepspeed_cannot_work_with_is_named(key: str, value: Any, expected: str) -> None:
    assert expected in "\n".join(conflicts({key: value}))


def test_what_deepspeed_takes_is_no_fault() -> None:
    for config in (
        {"zero_optimization": True},
        {"zero_optimization": False},
        {"zero_optimization": {"stage": 3.0, "zenflow": None}},
        {
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": "auto", "betas": "auto", "eps": 1e-8, "weight_decay": "auto"},
            }
        },
        {"optimizer": None, "checkpoint": None, "data_types": {}},
        {"gradient_clipping": "auto"},
        {"torch_autocast": {"dtype": "float16"}},
    ):
        assert conflicts(config) == [], config


def test_zero_optimization_true_is_stage_1_as_in_deepspeed() -> None:
    engine = make_engine(ds_config(zero_optimization=True))
    assert engine.meft_stats() and not engine._meft_stage3


def test_an_error_with_thousands_of_faults_lists_the_first_and_how_many_more() -> None:
    message = told({"sparse_adapter": {f"wrong{n}": n for n in range(3000)}})
    assert "has 3,000 faults" in message and "wrong19" in message and "wrong20:" not in message
    assert message.endswith("and 2,980 more") and len(message) < 10_000


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (
            {"schedule": {"host_threads": 2**31}},
            "host_threads: expected a whole number of threads, at least 1 and at most",
        ),
        ({"sparse_adapter": {"rows": 10**400}}, "rows: expected a whole number of at least 1 and at most 2147483647"),
        ({"sparse_adapter": {"init_std": 10**400}}, "init_std: expected a finite number above 0"),
        ({"sparse_matrix": {"choice_file": ""}}, "choice_file: expected null or the path of a file, got ''"),
        ({"sparse_matrix": {"choice_out": "a\0b"}}, r"choice_out: expected null or the path of a file, got 'a\x00b'"),
        ({"schedule": {"trace_file": "a\0b"}}, "trace_file: expected null or the path of a file"),
        ({"train": "(?:a{9999}){9999}"}, "repeats something 99,980,001 times"),
        ({"subspace": {"target_modules": "(" * 5000}}, "target_modules"),
    ],
)
def test_values_that_no_run_can_have_are_named(block: Any, expected: str) -> None:
    assert expected in told(block)


def test_a_trace_file_that_is_a_device_or_a_fifo_is_refused(tmp_path: Path) -> None:
    assert "/dev/null is a device" in told({"schedule": {"trace_file": "/dev/null"}})
