# SPDX-License-Identifier: Apache-2.0
"""Where the tiles of a choice are, by layer and role.

python examples/tile_picture.py tiles.json tiles.png
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from meft_ds.sparse_matrix.choice.choice import Choice

_USUAL_ORDER = ("q", "k", "v", "o", "gate", "up", "down")


def table(choice: Choice) -> list[dict[str, Any]]:
    """A row for each layer and role that could have tiles: layer, role, tiles, elements, and share, the trained
    fraction of the elements that this role has in this layer (None in a choice that does not say how many those are).
    Layers rise, None first; roles are in the order of a layer."""
    tiles: dict[tuple[int | None, str], int] = defaultdict(int)
    elements: dict[tuple[int | None, str], int] = defaultdict(int)
    for tile in choice.tiles:
        tiles[tile.layer, tile.role] += 1
        elements[tile.layer, tile.role] += tile.elements
    there = {(layer, role): n for layer, role, n in choice.cells}
    return [
        {
            "layer": layer,
            "role": role,
            "tiles": tiles[layer, role],
            "elements": elements[layer, role],
            "share": elements[layer, role] / there[layer, role] if (layer, role) in there else None,
        }
        for layer, role in sorted({*there, *tiles}, key=lambda cell: (*_layer_order(cell[0]), *_role_order(cell[1])))
    ]


def draw(choice: Choice, path: str | Path) -> None:
    """Write a heat map as PNG: layers down, roles across, colour the share of a cell that trains, numbers its tiles.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError('a picture of the tiles needs matplotlib: pip install "meft-ds[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = table(choice)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    roles = sorted({row["role"] for row in rows}, key=_role_order)
    known = all(row["share"] is not None for row in rows)
    values = [[float("nan")] * len(roles) for _ in layers]  # a layer need not have every role
    figure, axes = pyplot.subplots(figsize=(2.5 + 0.7 * len(roles), 1.8 + 0.25 * len(layers)), layout="constrained")
    for row in rows:
        y, x = layers.index(row["layer"]), roles.index(row["role"])
        values[y][x] = 100 * row["share"] if known else row["elements"]
    brightest = max(value for line in values for value in line if value == value)
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=brightest)
    for row in rows:
        y, x = layers.index(row["layer"]), roles.index(row["role"])
        color = "black" if values[y][x] > 0.6 * brightest else "white"
        axes.text(x, y, str(row["tiles"]), ha="center", va="center", size=7, color=color)
    axes.set_xticks(range(len(roles)), roles, rotation=0 if max(map(len, roles)) < 6 else 45)
    axes.set_yticks(range(len(layers)), ["-" if layer is None else str(layer) for layer in layers], size=7)
    axes.set(xlabel="role", ylabel="layer", title=f"{len(choice.tiles):,} tiles, {choice.density:.2%} of all weights")
    figure.colorbar(image, label="% trained" if known else "elements trained")
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)


def main() -> None:
    """Print the table of a choice's file and draw its picture."""
    parser = argparse.ArgumentParser(description="Print and draw where tiles are.")
    parser.add_argument("tiles", help="JSON file that sparse_matrix.choice_out named")
    parser.add_argument("picture", help="PNG file to write", nargs="?")
    given = parser.parse_args()
    try:
        choice = Choice.load(given.tiles)
    except ValueError as fault:
        parser.error(str(fault))
    print(f"{'layer':>5}  {'role':<16}{'tiles':>8}{'elements':>14}{'share':>9}")
    for row in table(choice):
        layer = "-" if row["layer"] is None else row["layer"]
        share = "" if row["share"] is None else f"{row['share']:.2%}"
        print(f"{layer:>5}  {row['role']:<16}{row['tiles']:>8,}{row['elements']:>14,}{share:>9}")
    print(f"{len(choice.tiles):,} tiles, {choice.elements:,} elements, {choice.density:.4%} of all 2-D weights")
    if given.picture is not None:
        try:
            draw(choice, given.picture)
        except (ImportError, OSError) as fault:
            parser.error(str(fault))


def _layer_order(layer: int | None) -> tuple[bool, int]:
    return layer is not None, layer or 0


def _role_order(role: str) -> tuple[int, str]:
    return (_USUAL_ORDER.index(role) if role in _USUAL_ORDER else len(_USUAL_ORDER)), role


if __name__ == "__main__":
    main()
