# SPDX-License-Identifier: Apache-2.0
"""`zero_grad` on two ranks, whose backwards are at different places when they call it."""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks


@pytest.mark.slow
def test_ranks_forget_the_same_wherever_their_backwards_are() -> None:
    outputs = run_ranks(Path(__file__).with_name("zero_grad_program.py"), 2, timeout=400)
    mine, other = (json.loads(out.strip().splitlines()[-1]) for out in outputs)
    for name, found in mine.items():
        run, fault = name.rsplit(", ", 1)
        assert found["weights"] == other[name]["weights"], f"ranks differ: {name}"
        if fault != "skipped by one alone":
            for rank in (mine, other):
                assert rank[name] == rank[f"{run}, "], name
        else:
            assert found != mine[f"{run}, "]
