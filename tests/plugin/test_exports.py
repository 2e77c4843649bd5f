# SPDX-License-Identifier: Apache-2.0
"""`save_adapter` and `save_16bit_model` of a run that goes on: what they write, and that no rank is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import meft_ds
from meft_ds.sparse_adapter.files import read_adapter
from tests.forked import Forge
from tests.toy import ADAPTER, batch, ds_config, make_engine

RANKS = "tests.plugin.adapter_export_ranks:"


@pytest.mark.parametrize("mode", ["exact", "eager"])
@pytest.mark.parametrize(
    "given",
    [lambda engine: engine, lambda engine: engine.module, lambda engine: engine.module.model],
    ids=["engine", "model", "part of the model"],
)
def test_an_adapter_saved_right_after_a_step_has_the_rows_and_routers_of_that_step(
    tmp_path: Path, mode: str, given: Callable[[Any], Any]
) -> None:
    engine = make_engine(ds_config(block={"sparse_adapter": dict(ADAPTER), "schedule": {"mode": mode}}))
    for seed in range(8):
        engine.backward(engine(**batch(seed)).loss)
        engine.step()
    assert any(entry.pending for entry in engine.optimizer.pipeline._entries), "else this tests nothing"
    meft_ds.save_adapter(given(engine), tmp_path / "at once")
    engine.meft_flush()
    meft_ds.save_adapter(given(engine), tmp_path / "flushed")
    saved, expected = read_adapter(tmp_path / "at once"), read_adapter(tmp_path / "flushed")
    for one, other in zip([*saved.routers, *saved.rows], [*expected.routers, *expected.rows], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stage", [0, 3])
def test_an_export_that_the_first_rank_cannot_write_is_an_error_on_every_rank_and_training_goes_on(
    forge: Forge, tmp_path: Path, stage: int
) -> None:
    first, second = forge.results(RANKS + "full_on_the_first", tmp_path, stage=stage)
    exports = ["16bit", "adapter beside", *(["adapter"] if stage == 3 else [])]
    assert list(first["told"]) == list(second["told"]) == exports
    assert first["same"] and second["same"]
    for what in exports:
        assert first["told"][what].startswith("[Errno 28] No space left on device")
        assert second["told"][what].startswith(f"the first rank could not write {tmp_path / what}")
        assert "No space left on device" in second["told"][what]


@pytest.mark.parametrize("stage", [0, 3])
def test_save_16bit_model_has_one_rank_write_the_adapter(forge: Forge, tmp_path: Path, stage: int) -> None:
    assert forge.results(RANKS + "writers", tmp_path, stage=stage) == [1, 0]
