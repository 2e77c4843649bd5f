# SPDX-License-Identifier: Apache-2.0
"""Which tiles a choice has, that it keeps to the budget, and that it survives its file."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from meft_ds.sparse_matrix.choice.choice import Choice, Tile, check_choice
from meft_ds.sparse_matrix.choice.select import choose, most_elements, weight_scores
from meft_ds.sparse_matrix.config import SparseMatrixConfig
from meft_ds.sparse_matrix.discover import Site
from tests.sparse_matrix.grids import every_tile, site

SITES = [
    site("q", (10, 7)),
    site("fused", (12, 9), parts={"q": 5, "k": 3, "v": 4}, layer=1),
    site("turned", (9, 12), parts={"k": 7, "v": 5}, input_first=True, layer=1),
    site("experts", (3, 6, 8), parts={"gate": 3, "up": 3}, layer=2),
]
ELEMENTS = sum(s.weight.numel() for s in SITES)
TOTAL = 2 * ELEMENTS


def drawn(sites: list[Site], seed: int = 0, levels: int = 0) -> dict[str, Tensor]:
    """Random scores; with `levels`, whole numbers below it, so that many are equal."""
    g = torch.Generator().manual_seed(seed)
    if levels:
        return {s.name: torch.randint(0, levels, s.grid, generator=g).double() for s in sites}
    return {s.name: torch.rand(s.grid, generator=g, dtype=torch.float64) for s in sites}


def of(**given: Any) -> SparseMatrixConfig:
    return SparseMatrixConfig(**{"normalize": False, "block_size": 4, "budget": "global", **given})


def filled(tiles: list[Tile], budget: int | Fraction) -> tuple[list[Tile], Tile | None]:
    """The best of `tiles` until one does not fit, and that one. The oracle: one tile at a time, by plain sorting."""
    taken: list[Tile] = []
    for tile in sorted(tiles, key=lambda t: -t.score):  # sorted() keeps the order of equal ones
        if sum(t.elements for t in taken) + tile.elements > budget:
            return taken, tile
        taken.append(tile)
    return taken, None


def in_order(tiles: list[Tile], everything: list[Tile]) -> tuple[Tile, ...]:
    return tuple(t for t in everything if t in tiles)


@given(seed=st.integers(0, 999), levels=st.sampled_from([0, 2, 5]), percent=st.integers(8, 100), paper=st.booleans())
def test_the_best_tiles_that_fit_are_chosen_and_equal_ones_in_order(
    seed: int, levels: int, percent: int, paper: bool
) -> None:
    scores = drawn(SITES, seed, levels)
    scores["q"][0, 0, 0] = 9
    config = of(density=percent / 100, preset="paper" if paper else "all")
    everything = every_tile(SITES, scores)
    budget = percent * TOTAL // 100
    allowed = [t for t in everything if not paper or t.role in "qkv"]
    choice = choose(SITES, scores, config, TOTAL)
    assert choice.tiles == in_order(filled(allowed, budget)[0], everything)
    assert choice.elements <= min(budget, most_elements(SITES, config, TOTAL))
    assert choice.density == choice.elements / TOTAL
    assert most_elements(SITES, config, TOTAL) == min(budget, sum(t.elements for t in allowed))


@given(seed=st.integers(0, 999), levels=st.sampled_from([0, 3]), percent=st.integers(4, 60), paper=st.booleans())
def test_every_matrix_and_expert_gets_the_same_density_and_the_rest_goes_by_what_is_missing(
    seed: int, levels: int, percent: int, paper: bool
) -> None:
    scores = drawn(SITES, seed, levels)
    scores["q"][0, 0, 0] = 9
    everything = every_tile(SITES, scores)
    allowed = [t for t in everything if not paper or t.role in "qkv"]
    whole = sum(t.elements for t in allowed)
    budget = min(percent * TOTAL // 100, whole)
    matrices: dict[tuple[str, int | None], list[Tile]] = defaultdict(list)
    for tile in allowed:
        matrices[tile.name, tile.expert].append(tile)
    taken: list[Tile] = []
    waiting: list[tuple[Fraction, float, int, Tile]] = []
    for tiles in matrices.values():
        share = Fraction(budget * sum(t.elements for t in tiles), whole)
        best, after = filled(tiles, share)
        taken += best
        if after is not None:
            fraction = (share - sum(t.elements for t in best)) / after.elements
            assert 0 <= fraction < 1
            waiting.append((-fraction, -after.score, everything.index(after), after))
    for *_, tile in sorted(waiting):
        if sum(t.elements for t in taken) + tile.elements > budget:
            break
        taken.append(tile)
    config = of(density=percent / 100, budget="per_module", preset="paper" if paper else "all")
    if not taken:
        with pytest.raises(ValueError, match="gives 0 tiles"):
            choose(SITES, scores, config, TOTAL)
        return
    choice = choose(SITES, scores, config, TOTAL)
    assert choice.tiles == in_order(taken, everything) and choice.elements <= budget
    for matrix, tiles in matrices.items():
        mine = sum(t.elements for t in choice.tiles if (t.name, t.expert) == matrix)
        share = budget * sum(t.elements for t in tiles) / whole
        assert abs(mine - share) < 16, "no matrix is further than a tile from its share"


@given(seed=st.integers(0, 999), q=st.integers(30, 100), up=st.integers(30, 100))
def test_a_budget_by_role_is_a_fraction_of_that_roles_elements_and_others_get_nothing(
    seed: int, q: int, up: int
) -> None:
    scores = drawn(SITES, seed)
    config = of(budget={"up": up / 100, "q": q / 100})
    everything = every_tile(SITES, scores)
    expected = []
    for role, percent in (("q", q), ("up", up)):
        tiles = [t for t in everything if t.role == role]
        expected += filled(tiles, sum(t.elements for t in tiles) * percent // 100)[0]
    choice = choose(SITES, scores, config, TOTAL)
    assert choice.tiles == in_order(expected, everything)
    assert choice.elements <= most_elements(SITES, config, TOTAL)
    assert choice.made_by["budget"] == {"up": up / 100, "q": q / 100} and "density" not in choice.made_by


@pytest.mark.parametrize("budget", ["global", "per_module"])
def test_density_one_takes_every_tile(budget: str) -> None:
    choice = choose(SITES, drawn(SITES), of(density=1.0, budget=budget), ELEMENTS)
    assert choice.elements == ELEMENTS and choice.density == 1
    covered = {s.name: torch.zeros(s.weight.shape) for s in SITES}
    for t in choice.tiles:
        whole = covered[t.name] if t.expert is None else covered[t.name][t.expert]
        whole[slice(*t.rows), slice(*t.cols)] += 1
    assert all((c == 1).all() for c in covered.values())
    assert choice.shapes == {s.name: tuple(s.weight.shape) for s in SITES}


def test_a_density_is_taken_by_its_digits() -> None:
    # 0.29 * 100 is 28.999999999999996
    sites = [site("a", (10, 10), side=1)]
    assert choose(sites, drawn(sites), of(density=0.29, block_size=1), 100).elements == 29
    assert choose(sites, drawn(sites), of(budget={"a": 0.29}, block_size=1), 100).elements == 29


@pytest.mark.parametrize("normalize", [False, True])
def test_normalized_scores_are_relative_to_the_mean_over_the_elements_of_their_role(normalize: bool) -> None:
    loud, quiet = site("loud", (10, 10)), site("quiet", (10, 10), parts={"x": 4, "y": 6})
    scores = drawn([loud, quiet])
    scores["loud"] *= 1000
    scores["quiet"][0, 1:] = 0  # all of y
    choice = choose([loud, quiet], scores, of(density=1.0, normalize=normalize), 200)
    for role in ("loud", "x", "y"):
        mine = [t for t in choice.tiles if t.role == role]
        raw = [t for t in every_tile([loud, quiet], scores) if t.role == role]
        mean = sum(t.score * t.elements for t in raw) / sum(t.elements for t in raw)
        divisor = mean if normalize and role != "y" else 1.0
        assert [t.score for t in mine] == pytest.approx([t.score / divisor for t in raw], rel=1e-12)
    few = choose([loud, quiet], scores, of(density=0.25, normalize=normalize), 200)
    assert ({t.role for t in few.tiles} == {"loud"}) == (not normalize)
    assert few.made_by["normalized"] == normalize


def test_the_choice_says_what_made_it_and_what_there_was() -> None:
    choice = choose(SITES, drawn(SITES), of(density=0.1, seed=3), TOTAL, {"batches": 7})
    assert choice.made_by["batches"] == 7 and choice.made_by["density"] == 0.1 and choice.made_by["seed"] == 3
    assert choice.total == TOTAL and set(choice.shapes) == {t.name for t in choice.tiles}
    cells: dict[tuple[int | None, str], int] = defaultdict(int)
    for tile in every_tile(SITES, drawn(SITES)):
        cells[tile.layer, tile.role] += tile.elements
    assert {(layer, role): n for layer, role, n in choice.cells} == cells


def test_scores_that_cannot_rank_are_refused_with_what_happened() -> None:
    for bad in (float("nan"), float("inf")):
        scores = drawn(SITES)
        scores["fused"][0, 1, 1] = bad
        with pytest.raises(ValueError, match="1 of 12 scores of fused are NaN or infinite"):
            choose(SITES, scores, of(), TOTAL)
    with pytest.raises(ValueError, match='all scores "abs_mean" are 0'):
        choose(SITES, {s.name: torch.zeros(s.grid, dtype=torch.float64) for s in SITES}, of(), TOTAL)


@pytest.mark.parametrize(
    "given", [{"density": 0.001}, {"density": 0.001, "budget": "per_module"}, {"budget": {"q": 0.001}}]
)
def test_a_budget_below_one_tile_is_refused_with_the_fix(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="gives 0 tiles of block_size 4 .* raise the fraction or lower block_size"):
        choose(SITES, drawn(SITES), of(**given), TOTAL)


def test_random_scores_follow_seed_and_name_and_leave_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (weight_scores(SITES, of(score="random", seed=s)) for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    reordered = weight_scores(SITES[::-1], of(score="random", seed=1))
    for s in SITES:
        assert first[s.name].shape == s.grid and torch.equal(first[s.name], again[s.name])
        assert torch.equal(first[s.name], reordered[s.name]) and not torch.equal(first[s.name], other[s.name])
    twins = weight_scores([site("a", (8, 8)), site("b", (8, 8))], of(score="random"))
    assert not torch.equal(twins["a"], twins["b"])
    assert choose(SITES, first, of(score="random", density=0.2), TOTAL).tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_is_the_mean_absolute_weight_of_a_tile(dtype: torch.dtype) -> None:
    sites = [dataclasses.replace(s, weight=torch.nn.Parameter(s.weight.detach().to(dtype))) for s in SITES]
    for tile in every_tile(sites, found := weight_scores(sites, of(score="magnitude"))):
        weight = next(s for s in sites if s.name == tile.name).weight.detach()
        weight = weight if tile.expert is None else weight[tile.expert]
        expected = weight[slice(*tile.rows), slice(*tile.cols)].double().abs().mean()
        assert tile.score == pytest.approx(float(expected), rel=1e-12)
    assert all(v.dtype == torch.float64 and v.shape == s.grid for s, v in zip(sites, found.values(), strict=True))


def a_choice() -> Choice:
    return choose(SITES, drawn(SITES), of(density=0.2), TOTAL, {"batches": 3})


def test_a_choice_survives_its_file_and_its_digest_is_of_the_tiles_alone(tmp_path: Path) -> None:
    choice, path = a_choice(), tmp_path / "new" / "tiles.json"
    choice.save(path)
    loaded = Choice.load(path)
    assert loaded == choice and loaded.digest() == choice.digest() and loaded.tiles[0].rows == choice.tiles[0].rows
    assert Choice.from_json(choice.to_json()) == choice
    check_choice(loaded, SITES)
    replaced = dataclasses.replace
    unscored = replaced(choice, tiles=tuple(replaced(t, score=None) for t in choice.tiles), made_by={}, cells=())
    assert unscored.digest() == choice.digest()
    first, *others = choice.tiles
    for change in (
        {"expert": 1},
        {"rows": (first.rows[0], first.rows[1] + 1)},
        {"cols": (first.cols[0] + 1, first.cols[1])},
        {"name": "fused"},
    ):
        assert replaced(choice, tiles=(replaced(first, **change), *others)).digest() != choice.digest(), change
    shapes = {**choice.shapes, first.name: (99, 99)}
    assert replaced(choice, shapes=shapes).digest() != choice.digest()


def test_saving_leaves_the_old_file_or_the_new_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, path = a_choice(), tmp_path / "tiles.json"
    choice.save(path)
    choice.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["tiles.json"]
    before = path.read_bytes()

    def full(self: Path, text: str, **options: Any) -> None:
        self.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        choice.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["tiles.json"]


def test_a_damaged_file_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    with pytest.raises(ValueError, match=r"tiles\.json: cannot read this choice of tiles: No such file"):
        Choice.load(path)
    whole = a_choice().to_json()
    first = whole["tiles"][0]
    damaged = [
        json.dumps(whole)[:-20],
        "",
        "[]",
        "\udcff",
        json.dumps({**whole, "format": 2}),
        json.dumps({k: v for k, v in whole.items() if k != "total"}),
        json.dumps({**whole, "total": "many"}),
        json.dumps({**whole, "tiles": []}),
        json.dumps({**whole, "tiles": [{**first, "rows": [0]}]}),
        json.dumps({**whole, "tiles": [{**first, "rows": [0, 1.5]}]}),
        json.dumps({**whole, "tiles": [{**first, "name": "elsewhere"}]}),
        json.dumps({**whole, "shapes": {"q": "10 x 7"}}),
    ]
    for text in damaged:
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=r"tiles\.json: damaged, or not a choice of tiles: .+; choose"):
            Choice.load(path)


def test_a_choice_that_does_not_fit_the_model_is_refused_with_every_reason() -> None:
    def tile(name: str, rows: tuple[int, int], cols: tuple[int, int], expert: int | None = None) -> Tile:
        return Tile(name, expert, rows, cols, "role", 0)

    shapes = {s.name: tuple(s.weight.shape) for s in SITES}
    faults = {
        "gone: this model has no such weight": [tile("gone", (0, 1), (0, 1))],
        "q[0:11, 0:1]: rows 0:11 are out of bounds 0:10": [tile("q", (0, 11), (0, 1))],
        "q[0:1, -1:1]: columns -1:1 are out of bounds 0:7": [tile("q", (0, 1), (-1, 1))],
        "q[2:2, 0:1]: rows 2:2 are out of bounds": [tile("q", (2, 2), (0, 1))],
        "q[0][0:1, 0:1]: expert 0 of a weight without experts": [tile("q", (0, 1), (0, 1), 0)],
        "experts[0:1, 0:1]: expert None of 3": [tile("experts", (0, 1), (0, 1))],
        "experts[3][0:1, 0:1]: expert 3 of 3": [tile("experts", (0, 1), (0, 1), 3)],
        "fused[4:6, 0:9]: spans parts q, k of a fused weight": [tile("fused", (4, 6), (0, 9))],
        "turned[0:9, 6:8]: spans parts k, v of a fused weight": [tile("turned", (0, 9), (6, 8))],
        "q[3:5, 3:5]: overlaps another tile": [tile("q", (0, 4), (0, 4)), tile("q", (3, 5), (3, 5))],
    }
    shapes["gone"] = (9, 9)
    for reason, tiles in faults.items():
        one = Choice(tuple(tiles), {t.name: shapes[t.name] for t in tiles}, TOTAL, {})
        with pytest.raises(ValueError) as e:
            check_choice(one, SITES)
        assert reason in str(e.value) and str(e.value).count("; ") == 0, reason
    with pytest.raises(ValueError) as e:
        check_choice(Choice(tuple(t for ts in faults.values() for t in ts), shapes, TOTAL, {}), SITES)
    assert all(reason in str(e.value) for reason in faults)
    with pytest.raises(ValueError, match=r"q: shape \(7, 10\), but it is \(10, 7\) here"):
        check_choice(Choice((tile("q", (0, 1), (0, 1)),), {"q": (7, 10)}, TOTAL, {}), SITES)
    many = Choice(tuple(tile("q", (0, 99 + i), (0, 1)) for i in range(30)), {"q": (10, 7)}, TOTAL, {})
    with pytest.raises(ValueError, match="; and 10 more"):
        check_choice(many, SITES)


def test_tiles_that_touch_or_come_from_another_block_size_fit() -> None:
    tiles = [
        Tile("q", None, (0, 5), (0, 7), "q", 0),
        Tile("q", None, (5, 10), (0, 3), "q", 0),
        Tile("fused", None, (0, 5), (0, 9), "q", 1),
        Tile("fused", None, (5, 8), (2, 3), "k", 1),
        *(Tile("experts", e, (0, 3), (0, 8), "gate", 2) for e in range(3)),
    ]
    check_choice(Choice(tuple(tiles), {s.name: tuple(s.weight.shape) for s in SITES}, TOTAL, {}), SITES)
