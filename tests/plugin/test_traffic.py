# SPDX-License-Identifier: Apache-2.0
"""Ranks move payloads, never dense gradients of what a method compresses, and as many bytes as the formulas say."""

from __future__ import annotations

import json
from pathlib import Path

from tests.ranks import run_ranks

PROGRAM = Path(__file__).with_name("traffic_program.py")


def test_bytes_between_ranks_are_those_of_the_payloads() -> None:
    for output in run_ranks(PROGRAM, 2):
        line = next(line for line in output.splitlines() if line.startswith("RESULT "))
        for method, found in json.loads(line.removeprefix("RESULT ")).items():
            assert found["counts"] == found["expected"], method
            assert found["counts"]["all_reduce"] < found["dense"]
