# SPDX-License-Identifier: Apache-2.0
"""The tiles that train, whether they fit a model, and the file that they are kept in."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from meft_ds import files
from meft_ds.options import MOST_LISTED, listed
from meft_ds.sparse_matrix.discover import Site

Range = tuple[int, int]
_FORMAT = 1


@dataclass(frozen=True)
class Tile:
    """A rectangle of a weight as it is stored.

    Attributes:
        name: of the parameter.
        expert: matrix of a 3-D weight; None for a 2-D one.
        rows, cols: [low, high) along the last two dimensions.
        role, layer: as of the site.
        score: what it was ranked by (relative to its role's mean where scores are normalized), if it was ranked.
    """

    name: str
    expert: int | None
    rows: tuple[int, int]
    cols: tuple[int, int]
    role: str
    layer: int | None
    score: float | None = None

    @property
    def elements(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])


@dataclass(frozen=True)
class Choice:
    """Tiles of a model, in the order of its parameters, then by expert, rows and columns.

    Attributes:
        shapes: of every parameter that has a tile.
        total: elements of all 2-D weights of the model.
        made_by: settings and numbers that led to it; JSON.
        cells: (layer, role, elements) of everything that could have been chosen.
    """

    tiles: tuple[Tile, ...]
    shapes: dict[str, tuple[int, ...]]
    total: int
    made_by: dict[str, Any]
    cells: tuple[tuple[int | None, str, int], ...] = ()

    @property
    def elements(self) -> int:
        """Elements that train."""
        return sum(tile.elements for tile in self.tiles)

    @property
    def density(self) -> float:
        """Their share of all 2-D weights."""
        return self.elements / self.total

    def digest(self) -> str:
        """Return the SHA-256 of what trains: names, shapes, experts and ranges. Scores do not count."""
        shapes = sorted((name, list(shape)) for name, shape in self.shapes.items())
        tiles = [(t.name, t.expert, list(t.rows), list(t.cols)) for t in self.tiles]
        return hashlib.sha256(json.dumps([shapes, tiles]).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return it as values that JSON has; `from_json` reads them."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any) -> Choice:
        """Return the choice in `data`. Raises ValueError with what is wrong with it."""
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f'expected an object with "format": {_FORMAT}, got {found!r}')
        try:
            choice = _ADAPTER.validate_json(json.dumps({key: v for key, v in data.items() if key != "format"}))
        except ValidationError as e:
            first = e.errors(include_url=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        nameless = next((t.name for t in choice.tiles if t.name not in choice.shapes), None)
        if nameless is not None or not choice.tiles or choice.total < 1:
            raise ValueError(f"shapes: {nameless} is missing" if nameless else "it has no tiles, or no total")
        return choice

    def save(self, path: str | Path) -> None:
        """Write it as JSON. A program that reads `path` meanwhile finds the old file, or the new one whole."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(self.to_json()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Choice:
        """Read what `save` wrote. Raises ValueError, with the path, when the file is missing or damaged."""
        try:
            return cls.from_json(files.parse_json(files.read_bytes(path)))
        except OSError as fault:
            raise ValueError(f"{path}: cannot read this choice of tiles: {fault.strerror}") from None
        except (ValueError, RecursionError) as fault:  # json's and UnicodeDecodeError are ValueErrors too
            raise ValueError(f"{path}: damaged, or not a choice of tiles: {fault}; choose the tiles again") from None


_ADAPTER = TypeAdapter(Choice)


def check_choice(choice: Choice, sites: Sequence[Site], elsewhere: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuse a choice that does not fit the model.

    `elsewhere`: why weights that are no sites, by name, cannot have tiles in this run.

    Raises:
        ValueError: one that lists unknown names, other shapes, tiles out of bounds, that overlap, or that span two
        parts of a fused weight.
    """
    by_name = {site.name: site for site in sites}
    faults: list[str] = []
    of_weight: dict[str, list[Tile]] = defaultdict(list)
    for tile in choice.tiles:
        of_weight[tile.name].append(tile)
    of_matrix: dict[tuple[str, int | None], list[Tile]] = defaultdict(list)
    for name, shape in choice.shapes.items():
        site = by_name.get(name)
        if site is None:
            faults.append(f"{name}: {elsewhere.get(name, 'this model has no such weight that may have tiles')}")
        elif tuple(site.shape) != shape:
            faults.append(f"{name}: shape {shape}, but it is {tuple(site.shape)} here")
        else:
            for tile in of_weight[name]:
                fault = _misfit(tile, site)
                faults += [f"{_where(tile)}: {fault}"] if fault else []
                if not fault:
                    of_matrix[name, tile.expert].append(tile)
    for tiles in of_matrix.values():
        again = overlapping([(tile.rows, tile.cols) for tile in tiles])
        faults += [f"{_where(tiles[index])}: overlaps another tile" for index in again]
    if faults:
        raise ValueError(
            f"the choice of tiles does not fit this model: {listed(faults, MOST_LISTED)}. "
            "Choose the tiles again with this model and block, or use those that they were chosen with"
        )


def misplaced(shape: Sequence[int], expert: int | None, rows: Range, cols: Range) -> str:
    """Return why a weight of this shape cannot have this tile; "" if it can."""
    experts = shape[0] if len(shape) == 3 else 1
    if (expert is None) != (len(shape) == 2) or not 0 <= (expert or 0) < experts:
        return f"expert {expert} of {experts if len(shape) == 3 else 'a weight without experts'}"
    for (low, high), size, along in zip((rows, cols), shape[-2:], ("rows", "columns"), strict=True):
        if not 0 <= low < high <= size:
            return f"{along} {low}:{high} are out of bounds 0:{size}"
    return ""


def overlapping(tiles: Sequence[tuple[Range, Range]]) -> list[int]:
    """Return the numbers of the tiles (rows, columns) of one matrix that overlap an earlier one."""
    row_edges = {edge: i for i, edge in enumerate(sorted({edge for rows, _ in tiles for edge in rows}))}
    col_edges = {edge: i for i, edge in enumerate(sorted({edge for _, cols in tiles for edge in cols}))}
    taken = np.zeros((len(row_edges), len(col_edges)), dtype=bool)
    found = []
    for index, (rows, cols) in enumerate(tiles):
        (a, b), (c, d) = (row_edges[e] for e in rows), (col_edges[e] for e in cols)
        if taken[a:b, c:d].any():
            found.append(index)
        taken[a:b, c:d] = True
    return found


def _misfit(tile: Tile, site: Site) -> str:
    """Return why a tile cannot be one of the site's; "" if it can."""
    if fault := misplaced(site.shape, tile.expert, tile.rows, tile.cols):
        return fault
    low, high = tile.cols if site.input_first else tile.rows
    cuts = site.cols if site.input_first else site.rows
    roles = [role for (a, b), role in zip(cuts, site.roles, strict=True) if a < high and low < b]
    return f"spans parts {', '.join(dict.fromkeys(roles))} of a fused weight" if len(set(roles)) > 1 else ""


def _where(tile: Tile) -> str:
    expert = "" if tile.expert is None else f"[{tile.expert}]"
    return f"{tile.name}{expert}[{tile.rows[0]}:{tile.rows[1]}, {tile.cols[0]}:{tile.cols[1]}]"
