# SPDX-License-Identifier: Apache-2.0
"""Tiles of one matrix: their gradients and their places."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from meft_ds.offload.model.capture import as_matrices, tap
from meft_ds.offload.model.weights import WHOLE, Piece, rectangles
from meft_ds.sparse_matrix.tiles import RowsCols, Tiles
from tests.sparse_matrix.grids import cuts

CPU = torch.device("cpu")


def tiles_of(tiles: list[RowsCols], features: int, *, input_first: bool = False, **more: Any) -> Tiles:
    given = {"param": 0, "expert": None, "offset": 0, "device": CPU, **more}
    return Tiles(tiles=tiles, input_first=input_first, features=features, **given)


def write(chosen: Tiles, weight: Tensor, flat: Tensor) -> None:
    for piece in WHOLE.pieces(weight):
        chosen.write(piece, flat)


class Harvest:
    """Adds up the tiles' gradient as a unit does."""

    def __init__(self, chosen: Tiles) -> None:
        self.chosen, self.acc = chosen, torch.zeros(chosen.numel)

    def tapped(self, index: int, x: Tensor, dy: Tensor) -> None:
        self.chosen.add_product(self.acc, *as_matrices(x, dy))


def grid(m: int, n: int, side: int) -> list[RowsCols]:
    return list(itertools.product(cuts(m, side=side), cuts(n, side=side)))


@st.composite
def choices(draw: st.DrawFn) -> tuple[int, int, list[RowsCols]]:
    """A matrix and some tiles of a grid that does not divide it, or strips of rows, each with cuts of its own."""
    m, n, side = draw(st.integers(1, 23)), draw(st.integers(1, 23)), draw(st.integers(1, 9))
    if draw(st.booleans()):
        tiles = grid(m, n, side)
    else:
        tiles = [
            (rows, cols)
            for rows in cuts(m, side=side)
            for cols in cuts(n, side=draw(st.integers(1, 9)))  # a new one for each strip
        ]
    mask = draw(st.lists(st.booleans(), min_size=len(tiles), max_size=len(tiles)))
    picked = [tile for tile, taken in zip(tiles, mask, strict=True) if taken] or tiles[-1:]
    return m, n, draw(st.permutations(picked))


def check_gradients(
    module: nn.Module, tiles: list[RowsCols], xs: list[Tensor], *, autocast: bool = False, **tolerance: float
) -> Harvest:
    """Tap the module and compare with the slices of what autograd gives without the tap, summed over `xs`."""
    input_first = isinstance(module, Conv1D)

    def run() -> None:
        for x in xs:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = module(x)
            y.float().sin().sum().backward()

    run()
    assert module.weight.grad is not None
    dense, module.weight.grad = module.weight.grad.float(), None
    chosen = tiles_of(tiles, module.weight.shape[0 if input_first else 1], input_first=input_first)
    harvest = Harvest(chosen)
    tap(module, harvest, 0, chosen.keep)
    run()
    assert module.weight.grad is None
    found = dict(chosen.tiles(harvest.acc))
    assert sorted(found) == sorted(tiles) and chosen.numel == sum(t.numel() for t in found.values())
    for (rows, cols), values in found.items():
        torch.testing.assert_close(values, dense[slice(*rows), slice(*cols)], **tolerance)
    return harvest


def layer(kind: str, m: int, n: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return (Conv1D(n, m) if kind == "conv1d" else nn.Linear(n, m, bias=kind == "bias")).to(dtype)


def inputs(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, n, generator=torch.Generator().manual_seed(seed))


FP32 = {"rtol": 1e-5, "atol": 1e-5}


@given(choice=choices(), kind=st.sampled_from(["bias", "plain", "conv1d"]), shape=st.sampled_from([(5,), (2, 3), ()]))
def test_tile_gradients_are_slices_of_the_dense_gradient(choice: Any, kind: str, shape: tuple[int, ...]) -> None:
    m, n, tiles = choice
    features = m if kind == "conv1d" else n
    check_gradients(layer(kind, m, n), tiles, [inputs(features, *shape).requires_grad_(len(shape) == 2)], **FP32)


@pytest.mark.parametrize("kind", ["bias", "conv1d"])
@pytest.mark.parametrize("which", ["one", "ragged corner", "all"])
def test_tile_gradients_add_up_over_micro_batches(kind: str, which: str) -> None:
    m, n = 10, 14
    tiles = {"one": [((4, 8), (8, 12))], "ragged corner": [((8, 10), (12, 14))], "all": grid(m, n, 4)}[which]
    features = m if kind == "conv1d" else n
    xs = [inputs(features, 2, 3, seed=seed) for seed in range(3)]
    check_gradients(layer(kind, m, n), tiles, xs, **FP32)


@pytest.mark.parametrize("kind", ["bias", "conv1d"])
@pytest.mark.parametrize("how", ["bf16", "autocast", "autocast bf16 weights"])
def test_tile_gradients_are_right_in_bf16_and_under_autocast(kind: str, how: str) -> None:
    m, n = 10, 14
    weights = torch.float32 if how == "autocast" else torch.bfloat16
    module = layer(kind, m, n, weights)
    x = inputs(m if kind == "conv1d" else n, 4, 5).to(torch.bfloat16 if how == "bf16" else torch.float32)
    check_gradients(module, grid(m, n, 4)[::2], [x], autocast="autocast" in how, rtol=2e-2, atol=2e-2)


def test_gradients_of_a_stacked_expert_tensor_are_read_from_the_expert_they_belong_to() -> None:
    grad = torch.randn(3, 10, 14, generator=torch.Generator().manual_seed(0))
    tiles = grid(10, 14, 4)
    for expert in range(3):
        chosen = tiles_of(tiles[expert::3], 14, expert=expert)
        acc = torch.ones(chosen.numel)
        chosen.add_gradient(acc, chosen.matrix(grad))
        for (rows, cols), values in chosen.tiles(acc):
            assert torch.equal(values, 1 + grad[expert, slice(*rows), slice(*cols)])


@given(choice=choices())
def test_what_is_written_is_read_again_and_nothing_else_changes(choice: Any) -> None:
    m, n, tiles = choice
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(1))
    chosen = tiles_of(tiles, n)
    flat = torch.arange(1.0, chosen.numel + 1)
    expected = weight.clone()
    for (rows, cols), values in chosen.tiles(flat):
        expected[slice(*rows), slice(*cols)] = values
    before = chosen.read(weight)
    changed = weight.clone()
    write(chosen, changed, flat)
    assert torch.equal(changed, expected) and torch.equal(chosen.read(changed), flat)
    assert len(flat.unique()) == int((changed != weight).sum()) == sum((b - a) * (d - c) for (a, b), (c, d) in tiles)
    write(chosen, changed, before)
    assert torch.equal(changed, weight)


@given(choice=choices(), edges=st.lists(st.integers(-30, 600), max_size=4))
def test_slices_of_a_flattened_weight_are_written_one_by_one_as_the_whole(choice: Any, edges: list[int]) -> None:
    m, n, tiles = choice
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(1))
    chosen = tiles_of(tiles, n)
    flat = torch.arange(1.0, chosen.numel + 1)
    expected = weight.clone()
    write(chosen, expected, flat)
    cut = sorted({-7, m * n + 7, *(edge for edge in edges if -7 < edge < m * n + 7)})  # what is around is others'
    around = torch.cat([torch.zeros(7), weight.reshape(-1), torch.zeros(7)])
    for lo, hi in itertools.pairwise(cut):
        for first, end, rows, cols in rectangles(max(lo, 0), min(hi, m * n), n):
            part = around[first + 7 : end + 7].view(rows.stop - rows.start, cols.stop - cols.start)
            chosen.write(Piece(part, rows, cols, first), flat)
    assert torch.equal(around[7:-7].view(m, n), expected) and not around[:7].any() and not around[-7:].any()


def test_tiles_that_fill_a_rectangle_are_one_product_over_views() -> None:
    every = tiles_of(grid(10, 14, 4), 14)
    (group,) = every.groups
    assert every.keep is None and (group.rows, group.cols, group.inputs) == (slice(0, 10), slice(0, 14), slice(0, 14))
    strip = tiles_of([tile for tile in grid(64, 64, 4) if tile[1] == (8, 12)][::3], 64)
    assert len(strip.groups) == 1 and strip.keep is not None and len(strip.keep) == 4
    scattered = [((r, r + 4), (c, c + 4)) for r, c in itertools.product((0, 8, 20), (4, 40))]
    assert len(tiles_of(scattered, 64).groups) == 1


def test_products_are_never_more_than_rows_or_columns_of_tiles() -> None:
    """Whatever is chosen: one product per row (or column) of the grid, however many tiles there are."""
    g = torch.Generator().manual_seed(0)
    tiles = grid(96, 64, 4)
    for share in (0.02, 0.3, 0.9):
        picked = [tile for tile in tiles if float(torch.rand((), generator=g)) < share]
        assert len(tiles_of(picked, 64).groups) <= 16


def test_a_layer_keeps_only_the_input_features_that_its_tiles_use() -> None:
    chosen = tiles_of([((0, 4), (4, 8)), ((8, 10), (4, 8)), ((4, 8), (12, 14))], 14)
    assert chosen.keep is not None and chosen.keep.tolist() == [4, 5, 6, 7, 12, 13]
    other = tiles_of([((4, 8), (0, 4))], 10, input_first=True)
    assert other.keep is not None and other.keep.tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_micro_batches_are_float32(dtype: torch.dtype) -> None:
    """1 + 512 times 1/512 is 2, which a sum in bfloat16 never gets to."""
    chosen = tiles_of([((0, 1), (0, 1))], 1)
    acc = torch.zeros(1)
    chosen.add_product(acc, torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype))
    for _ in range(512):
        chosen.add_product(acc, torch.ones(1, 1, dtype=dtype), torch.full((1, 1), 2.0**-9, dtype=dtype))
    assert acc.item() == 2.0


def test_no_tokens_add_nothing_and_an_inf_reaches_the_sum() -> None:
    chosen = tiles_of(grid(10, 14, 4)[::3], 14)
    acc = torch.zeros(chosen.numel)
    assert chosen.keep is None or len(chosen.keep) == 14
    chosen.add_product(acc, torch.zeros(0, 14), torch.zeros(0, 10))
    assert not acc.any()
    dy = torch.zeros(2, 10)
    dy[1, 0] = math.inf
    chosen.add_product(acc, torch.ones(2, 14), dy)
    assert not acc.isfinite().all()
