# SPDX-License-Identifier: Apache-2.0
"""Whatever trains on the CPU trains on an asynchronous device with memory of its own, to the same weights and state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emulated_accelerator.cells import CELLS, Cell
from tests.forked import Forge
from tests.methods import differing

FEW = ("adapter", "subspace", "tiles", "fourth method")
TRAIN = "tests.emulated_accelerator.cells:train"


@pytest.mark.parametrize("cell", FEW)
def test_every_method(cell: str, forge: Forge, emulated_forge: Forge, tmp_path: Path) -> None:
    compare(cell, ["delays"], forge, emulated_forge, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_every_setting(cell: str, forge: Forge, emulated_forge: Forge, tmp_path: Path) -> None:
    """In calm weather, with random delays on every stream, with the default one late, and when all wait to be asked."""
    compare(cell, ["calm", "delays", "slow", "lazy"], forge, emulated_forge, tmp_path)


def compare(cell: str, weathers: list[str], forge: Forge, emulated_forge: Forge, folder: Path) -> None:
    """The CPU's results up to rounding; when the streams' work runs changes no bit."""
    wanted = trained(forge, folder / "cpu", cell, "calm")
    first, *others = [trained(emulated_forge, folder / weather, cell, weather) for weather in weathers]
    for rank, ran in enumerate(first):
        assert (ran["device"], ran["kernels"]) == ("emulated", "cpp")
        assert_close(CELLS[cell], wanted[rank], ran)
        for other in others:
            same = other[rank]
            assert differing(ran["state"], same["state"]) == []
            assert (ran["losses"], ran["norms"]) == (same["losses"], same["norms"])


def trained(forge: Forge, folder: Path, cell: str, weather: str) -> list[dict[str, Any]]:
    """What each rank returned, with its final state under "state"."""
    results = forge.results(TRAIN, folder, world=CELLS[cell].world, cell=cell, weather=weather)
    for rank, result in enumerate(results):
        result["state"] = torch.load(folder / f"state{rank}.pt")
    return results


def assert_close(cell: Cell, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """fp32 up to the order of sums. In half precision, losses and weights up to what rounding does in a few steps.

    A fit turns a difference of rounding into other projectors, so runs that fit agree less closely.
    """
    half = cell.options.get("precision", "fp32") != "fp32"
    fits = cell.entry.block.get("subspace", {}).get("projectors") == "learned"
    near = {"rtol": cell.entry.rtol, "atol": cell.entry.atol} if fits else {"rtol": 1e-5, "atol": 1e-5}
    assert wanted["state"].keys() == found["state"].keys()
    for name, t in wanted["state"].items():
        got = found["state"][name]
        if not half:
            torch.testing.assert_close(got, t, **near, msg=lambda text, name=name: f"{name}: {text}")
        elif name.startswith("model/"):
            assert torch.dist(got.float(), t.float()) <= (0.05 if fits else 0.01) * t.float().norm() + 1e-3, name
    losses = (0.03 if fits else 0.01) if half else near["rtol"]
    assert found["losses"] == pytest.approx(wanted["losses"], rel=losses)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=0.1 if half else 10 * near["rtol"])
