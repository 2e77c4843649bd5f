# SPDX-License-Identifier: Apache-2.0
"""`zero_grad` on two ranks, whose backwards are at different places when they call it."""

from pathlib import Path

import pytest

from tests.forked import Forge
from tests.plugin.zero_grad_ranks import forgotten


@pytest.mark.slow
def test_ranks_forget_the_same_wherever_their_backwards_are(forge: Forge, tmp_path: Path) -> None:
    mine, other = forge.results(forgotten, tmp_path)
    for name, found in mine.items():
        run, fault = name.rsplit(", ", 1)
        assert found["weights"] == other[name]["weights"], f"ranks differ: {name}"
        if fault != "skipped by one alone":
            for rank in (mine, other):
                assert rank[name] == rank[f"{run}, "], name
        else:
            assert found != mine[f"{run}, "]
