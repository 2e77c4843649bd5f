# SPDX-License-Identifier: Apache-2.0
"""Gradients from before `deepspeed.initialize` (of a look at the loss, say) are nobody's: neither trained on, nor
scored, nor kept. DeepSpeed's own optimizers add them to the first step, in fp16 divided by the loss scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.forked import Forge
from tests.plugin.tiles import block, differing, everything, steps
from tests.toy import ADAPTER, batch, ds_config, make_engine, tiny_llama

BLOCKS: dict[str, dict[str, Any]] = {
    "adapter and norms": {"sparse_adapter": dict(ADAPTER), "train": ["norm"]},
    "subspace": {"subspace": {"dim": 8, "nonzeros": 2}},
    "scored tiles": block(),
    "scored tiles, sums": block(score="paper"),
    "random tiles": block(score="random"),
}


@pytest.mark.parametrize("what", BLOCKS)
def test_a_gradient_from_before_the_engine_counts_for_nothing(what: str) -> None:
    check(what, stage=2)


def test_a_gradient_from_before_the_engine_counts_for_nothing_in_stage_3(forge: Forge, tmp_path: Path) -> None:
    forge.results(in_stage_3, tmp_path, world=1)


def in_stage_3(folder: Path) -> None:
    for what in ("adapter and norms", "scored tiles"):
        check(what, stage=3)


def check(what: str, stage: int) -> None:
    found = []
    for leftover in (False, True):
        model = tiny_llama()
        if leftover:
            (1000.0 * model(**batch(0)).loss).backward()
        engine = make_engine(ds_config(block=BLOCKS[what], zero_optimization={"stage": stage}), model)
        assert all(p.grad is None for p in model.parameters())
        losses = steps(engine, range(1, 5))
        found.append((losses, everything(engine)))
        engine.destroy()
    (losses, state), (again, other) = found
    assert losses == again and differing(state, other) == []
