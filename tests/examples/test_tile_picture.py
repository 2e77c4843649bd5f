# SPDX-License-Identifier: Apache-2.0
"""The table and the picture of a choice."""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from meft_ds.sparse_matrix.choice.choice import Choice
from meft_ds.sparse_matrix.choice.select import choose
from meft_ds.sparse_matrix.config import SparseMatrixConfig
from tests.sparse_matrix.grids import site

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import tile_picture as picture  # noqa: E402


def a_choice(density: float = 0.4) -> Choice:
    sites = [
        *(site(f"{role}{layer}", (8, 12), parts={role: 8}, layer=layer) for layer in (10, 2) for role in ("down", "q")),
        site("fused", (10, 8), parts={"q": 6, "router": 4}, layer=2),
        site("experts", (2, 8, 8), parts={"up": 8}, layer=None),
    ]
    g = torch.Generator().manual_seed(0)
    scores = {s.name: torch.rand(s.grid, generator=g, dtype=torch.float64) for s in sites}
    total = sum(s.weight.numel() for s in sites)
    return choose(sites, scores, SparseMatrixConfig(density=density, block_size=4, normalize=False), total)


CELLS = {
    (None, "up"): 128,
    (2, "q"): 8 * 12 + 6 * 8,
    (2, "down"): 96,
    (2, "router"): 32,
    (10, "q"): 96,
    (10, "down"): 96,
}


def test_the_table_counts_the_tiles_of_each_layer_and_role_and_their_share() -> None:
    choice = a_choice()
    rows = picture.table(choice)
    assert [(row["layer"], row["role"]) for row in rows] == list(CELLS)
    counted: dict[tuple[int | None, str], list[int]] = defaultdict(list)
    for t in choice.tiles:
        counted[t.layer, t.role].append((t.rows[1] - t.rows[0]) * (t.cols[1] - t.cols[0]))
    for row in rows:
        mine = counted[row["layer"], row["role"]]
        assert (row["tiles"], row["elements"]) == (len(mine), sum(mine))
        assert row["share"] == sum(mine) / CELLS[row["layer"], row["role"]]
    assert all(row["share"] == 1 for row in picture.table(a_choice(1.0)))


def test_cells_without_a_tile_are_rows_too_and_shares_are_left_open_where_nothing_says_them() -> None:
    one = dataclasses.replace(a_choice(), tiles=a_choice().tiles[:1])
    assert [row["tiles"] for row in picture.table(one)].count(0) == len(CELLS) - 1
    (row,) = picture.table(dataclasses.replace(one, cells=()))
    assert row["tiles"] == 1 and row["share"] is None


@pytest.mark.parametrize("cells", [True, False])
def test_the_picture_is_a_png(tmp_path: Path, cells: bool) -> None:
    pytest.importorskip("matplotlib")
    choice = a_choice() if cells else dataclasses.replace(a_choice(), cells=())
    picture.draw(choice, tmp_path / "tiles.png")
    assert (tmp_path / "tiles.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "meft-ds\[plot\]"'):
        picture.draw(a_choice(), tmp_path / "tiles.png")


def test_the_command_prints_the_table_and_writes_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    choice, tiles, png = a_choice(), tmp_path / "tiles.json", tmp_path / "tiles.png"
    choice.save(tiles)
    monkeypatch.setattr(sys, "argv", ["picture", str(tiles), str(png)])
    picture.main()
    printed = capsys.readouterr().out.splitlines()
    rows = picture.table(choice)
    assert len(printed) == len(rows) + 2 and png.exists()
    for line, row in zip(printed[1:], rows, strict=False):
        layer = "-" if row["layer"] is None else str(row["layer"])
        assert line.split() == [layer, row["role"], str(row["tiles"]), str(row["elements"]), f"{row['share']:.2%}"]
    assert printed[-1].startswith(f"{len(choice.tiles)} tiles, {choice.elements} elements, ")


def test_the_command_refuses_a_damaged_file_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiles.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["picture", str(tmp_path / "tiles.json"), "x.png"])
    with pytest.raises(SystemExit) as e:
        picture.main()
    assert e.value.code == 2 and "tiles.json: damaged" in capsys.readouterr().err
