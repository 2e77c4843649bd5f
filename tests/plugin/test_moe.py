# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own MoE layer on two ranks; one launch of moe_program.py serves all tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

METHODS = ["sparse_adapter", "subspace", "sparse_matrix"]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    outputs = run_ranks(Path(__file__).with_name("moe_program.py"), 2)
    return [json.loads(out.strip().splitlines()[-1]) for out in outputs]


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_differ_between_ranks_are_refused_on_every_rank(ranks: list[Any], method: str) -> None:
    for rank in ranks:
        told = rank[method]["2"]["refused"]
        assert "mlp.deepspeed_moe.experts.deepspeed_experts.0.up_proj.weight: expected an expert that every" in told
        assert "group has 2 ranks" in told and "set ep_size to 1, or remove the meft_offload block" in told


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_every_rank_holds_train_to_the_same_bits_on_both(ranks: list[Any], method: str) -> None:
    a, b = (rank[method]["1"] for rank in ranks)
    assert a["digest"] == b["digest"]
    for rank in (a, b):
        assert rank["losses"][-1] < rank["losses"][0]
        assert len(rank["moved"]) == (0 if method == "sparse_adapter" else 4)
