# SPDX-License-Identifier: Apache-2.0
"""Ranks move payloads, never dense gradients of what a method compresses, and as many bytes as the formulas say."""

from __future__ import annotations

from typing import Any

import pytest

from tests.forked import Forge
from tests.plugin.traffic_ranks import traffic


@pytest.fixture(scope="module")
def found(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank."""
    return forge.results(traffic, tmp_path_factory.mktemp("ranks"))


def test_bytes_between_ranks_are_those_of_the_payloads(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for method, of in rank["methods"].items():
            assert of["counts"] == of["expected"], method  # and so nothing by any other collective
            assert of["counts"]["all_reduce"] < of["dense"]


def test_a_dense_gradient_would_be_seen_whatever_collective_it_took(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["planted"]) == 11 and set(rank["planted"].values()) == {1.0}, rank["planted"]
