# SPDX-License-Identifier: Apache-2.0
"""What every method must do on two ranks, over the table in tests/methods.py; one run of the ranks serves all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.ranks import trained
from tests.forked import Forge
from tests.methods import Entry, assert_close, every_method, everything


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, forge: Forge) -> tuple[Any, Path]:
    """What the two ranks tell of each entry that is asked for, and the folder of their states."""
    folder = tmp_path_factory.mktemp("ranks")
    asked = [item.callspec.params["entry"].name for item in request.session.items if item.path == request.path]
    return forge.results("tests.contract.ranks:train", folder, names=sorted(set(asked))), folder


@every_method
def test_two_ranks_equal_one_with_twice_the_batch_and_repeat_their_bits(entry: Entry, ranks: Any) -> None:
    """What all ranks hold is the same bits on both, and each holds the state of its half."""
    (a, b), folder = ranks
    engine, norms = trained(entry)
    assert a[entry.name]["norms"] == b[entry.name]["norms"] == pytest.approx(norms, rel=10 * entry.rtol)
    assert a[entry.name]["repeats"] and b[entry.name]["repeats"]
    first, second = (torch.load(folder / f"{entry.name}.{rank}.pt") for rank in (0, 1))
    owned = {f"{unit.name}/{key}" for unit in engine.optimizer.pipeline.units for key in unit.state_tensors()}
    assert [k for k, t in first.items() if k not in owned and not torch.equal(t, second[k])] == []
    assert all(abs(len(first[name]) - len(second[name])) <= 1 for name in owned)
    both = {name: torch.cat([t, second[name]]) if name in owned else t for name, t in first.items()}
    assert_close(everything(engine), both, entry)
