# SPDX-License-Identifier: Apache-2.0
"""Tiles of expert tensors under ZeRO-3. That they train as in stage 2 is in `zero3_experts`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from tests.forked import Forge
from tests.plugin.tiles import config, method_of, steps
from tests.sparse_adapter.tiny import tiny_model
from tests.toy import make_engine


def test_they_go_on_in_the_other_stage_and_adopt_what_a_program_writes(forge: Forge, tmp_path: Path) -> None:
    forge.results(check, tmp_path, world=1)


def check(folder: Path) -> None:
    for stage in (2, 3):
        check_resuming(stage, f"{folder}/{stage}")
    for persists_below in (0, 100_000):
        check_adopting(persists_below)


def made(stage: int, persists_below: int = 0) -> Any:
    zero = {"stage": stage, "stage3_param_persistence_threshold": persists_below}
    return make_engine({**config(eps=1e-4, block_size=8), "zero_optimization": zero}, tiny_model("mixtral").train())


def check_resuming(stage: int, folder: str) -> None:
    engine = made(stage)
    steps(engine, range(5))
    assert any("experts" in name for name in method_of(engine).choice.shapes)
    engine.save_checkpoint(folder)
    resumed = made(5 - stage)
    resumed.load_checkpoint(folder)
    assert steps(resumed, range(5, 9)) == pytest.approx(steps(engine, range(5, 9)), abs=1e-5)


def check_adopting(persists_below: int) -> None:
    engine = made(3, persists_below)
    steps(engine, range(5))
    name = next(name for name in method_of(engine).choice.shapes if "experts" in name)
    p = engine.module.get_parameter(name)
    with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
        with torch.no_grad():
            p.add_(1.0)
        edited = p.detach().clone()
    steps(engine, [5])
    with deepspeed.zero.GatheredParameters([p]):
        moved = float((p - edited).abs().max())
    assert 0 < moved < 0.1, "a step is about the learning rate"
