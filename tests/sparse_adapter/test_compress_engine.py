# SPDX-License-Identifier: Apache-2.0
"""Compressed row gradients through an engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from meft_ds.config import parse_config
from meft_ds.sparse_adapter.config import CompressConfig, ResolvedCompress, SparseAdapterConfig
from tests.toy import ADAPTER, ds_config, make_engine, state_of, train

COMPRESS = {"dim": 0.5, "nonzeros": 2}


def config(precision: str = "fp32", *, gas: int = 1, micro: int = 4, mode: str = "exact", **adapter: Any) -> Any:
    block = {"schedule": {"mode": mode}, "sparse_adapter": {**ADAPTER, "compress": COMPRESS, **adapter}}
    made = ds_config(precision=precision, gas=gas, micro=micro, block=block)
    if precision == "fp16":
        made["fp16"] |= {"initial_scale_power": 8, "hysteresis": 1}
    return made


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_another_compression_is_refused_by_name(tmp_path: Path) -> None:
    saved = make_engine(config())
    train(saved, 1)
    saved.save_checkpoint(str(tmp_path))
    for change, message in (
        ({"compress": {"dim": 4, "nonzeros": 2}}, "compress.dim: checkpoint 8, this run 4"),
        ({"compress": {"nonzeros": 3}}, "compress.nonzeros: checkpoint 2, this run 3"),
        ({"compress": None}, "compress.dim: checkpoint 8, this run None"),
        ({"seed": 5}, "compress.seed: checkpoint 0, this run 5"),
    ):
        other = make_engine(config(**change))
        before = state_of(other)
        with pytest.raises(ValueError, match=message):
            other.load_checkpoint(str(tmp_path))
        assert_same(before, state_of(other))


def test_an_engine_counts_fewer_bytes_down_and_says_what_is_active(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="meft_ds"):
        engine = make_engine(config("bf16"))
    assert any("gradients compressed from d=16 to 8" in record.getMessage() for record in caplog.records)
    train(engine, 2)
    stats = engine.meft_stats()
    assert stats["bytes"]["rows"] == {
        "up": sum(2 * 16 * u * 2 for u in stats["sparse_adapter"]["active_rows"]),
        "down": sum(2 * 8 * u * 2 for u in stats["sparse_adapter"]["active_rows"]),
    }
    assert stats["host_bytes"] < make_engine(config("bf16", compress=None)).meft_stats()["host_bytes"]


@pytest.mark.parametrize(
    ("compress", "message"),
    [
        (True, "compress: expected an object of settings.*got True"),
        (0.5, "compress: expected an object"),
        ({"dim": 0}, "compress.dim: expected a whole number of at least 1, or a fraction below 1, got 0"),
        ({"dim": 1.0}, "compress.dim: expected a fraction below 1 or a whole number without"),
        ({"dim": "auto"}, "compress.dim: expected a whole number"),
        ({"dim": True}, "compress.dim: expected a whole number"),
        ({"dim": float("nan")}, "compress.dim: expected a whole number"),
        ({"nonzeros": 0}, "compress.nonzeros: expected a whole number of at least 1, got 0"),
        ({"nonzeros": 2.0}, "compress.nonzeros"),
        ({"scale": 0}, 'compress.scale: expected a finite number above 0 or "adam"'),
        ({"scale": "rms"}, "compress.scale"),
        ({"nonzero": 4}, "compress.nonzero: unknown key; did you mean 'nonzeros'"),
        ({"seed": 4}, "compress.seed: unknown key"),
    ],
)
def test_bad_values_are_refused_with_what_was_expected(compress: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"meft_offload\.sparse_adapter\.{message}"):
        parse_config({"sparse_adapter": {"compress": compress}})


@pytest.mark.parametrize(
    ("compress", "message"),
    [
        ({"dim": 16}, "hidden size 16: dim: 16 is not below 16 and would save nothing; lower dim"),
        ({"dim": 0.99}, "dim: 16 is not below 16"),
        ({"dim": 3}, "nonzeros: 4 is more than dim = 3; lower nonzeros or raise dim"),
        ({"dim": 0.01, "nonzeros": 1}, "nonzeros: 1 is more than dim = 0"),
    ],
)
def test_sizes_that_only_fail_for_a_hidden_size_are_refused_then(compress: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(config(compress=compress))


def test_every_setting_is_described_and_off_is_the_default() -> None:
    assert all(field.description for field in CompressConfig.model_fields.values())
    assert SparseAdapterConfig().compress is None
    assert parse_config({"sparse_adapter": {"compress": {}}}).sparse_adapter.compress == CompressConfig()  # type: ignore[union-attr]
    assert CompressConfig().resolve(4096) == ResolvedCompress(dim=2048, nonzeros=4, scale=math.sqrt(2))
