# SPDX-License-Identifier: Apache-2.0
"""Ranks move payloads, never dense gradients of what a method compresses, and as many bytes as the formulas say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

PROGRAM = Path(__file__).with_name("traffic_program.py")


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """By rank."""
    lines = [line for output in run_ranks(PROGRAM, 2) for line in output.splitlines()]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]


def test_bytes_between_ranks_are_those_of_the_payloads(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for method, of in rank["methods"].items():
            assert of["counts"] == of["expected"], method  # and so nothing by any other collective
            assert of["counts"]["all_reduce"] < of["dense"]


def test_a_dense_gradient_would_be_seen_whatever_collective_it_took(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["planted"]) == 11 and set(rank["planted"].values()) == {1.0}, rank["planted"]
