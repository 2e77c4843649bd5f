# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own MoE layer on two ranks; one run of them serves all tests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.forked import Forge
from tests.plugin.moe_ranks import mixtures

METHODS = ["sparse_adapter", "subspace", "sparse_matrix"]


@pytest.fixture(scope="module")
def ranks(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return forge.results(mixtures, tmp_path_factory.mktemp("ranks"))


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
