# SPDX-License-Identifier: Apache-2.0
"""How much memory scoring and training take beyond a frozen model's forward and backward, counted by storages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from meft_ds.offload.model.capture import tap
from meft_ds.sparse_matrix.choice import score as score_module
from meft_ds.sparse_matrix.tiles import Tiles
from tests.sparse_matrix.hand import choice_of, pipeline_of, scorer_of
from tests.subspace.hand import CPU

WIDTH, INNER, LAYERS, TOKENS, SIDE = 64, 96, 6, 5, 16
MATRIX = 4 * WIDTH * INNER  # bytes in float32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Model(nn.Module):
    def __init__(self, how: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.how = nn.ModuleList(Block() for _ in range(LAYERS)).to(dtype), how

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.how == "none" else checkpoint(layer, x, use_reentrant=self.how == "reentrant")
        return x.float().square().mean()


class Census(TorchDispatchMode):
    """The most bytes of storages that operations under it made and left alive; what was there before is `known`."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage()._cdata for a in _tensors((args, kwargs or {}))}
        for t in _tensors(out):
            storage = t.untyped_storage()
            if storage._cdata not in inputs or storage._cdata in self.alive:  # else a view of what was there before
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: found for key, found in self.alive.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return out


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, dict):
        found = found.values()
    elif not isinstance(found, tuple | list):
        return []
    return [t for part in found for t in _tensors(part)]


def peak_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Of a forward and a backward that goes down to the input, the second one."""
    for seed in range(2):
        model.zero_grad()
        x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(True)
        with Census() as census:
            model(x).backward()
    return census.peak


def frozen(how: str, dtype: torch.dtype = torch.float32) -> int:
    return peak_of(Model(how, dtype).requires_grad_(False), dtype)


def held_by(*objects: Any) -> int:
    """Bytes of all tensors that these hold, without the model's."""
    found = [t for t in _tensors([vars(o) for o in objects]) if not isinstance(t, nn.Parameter)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in found}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("how", ["none", "reentrant", "nonreentrant"])
def test_the_measure_sees_what_full_fine_tuning_takes(how: str) -> None:
    """All weights' gradients, beside the activations."""
    full = peak_of(Model(how, torch.float32))
    assert full >= frozen(how) + (2 * LAYERS - 1) * MATRIX


@pytest.mark.parametrize("kind", ["abs_mean", "l2", "mean_abs", "paper"])
@pytest.mark.parametrize("how", ["reentrant", "nonreentrant"])
def test_scoring_takes_one_matrix_more_than_a_frozen_model(kind: str, how: str, record_property: Any) -> None:
    base, model = frozen(how), Model(how, torch.float32)
    scorer, _ = scorer_of(model, kind, block_size=SIDE)
    peak = peak_of(model)
    record_property("matrices beyond the frozen model", (peak - base) / MATRIX)
    print(f"{kind}, {how}: frozen {base}, scoring {peak}, matrix {MATRIX}")
    assert peak - base <= MATRIX
    assert kind == "mean_abs" or peak - base >= MATRIX / 2, "the bound must be able to fail"
    on_host = {t.untyped_storage()._cdata for t in (*scorer._sums, *scorer._open_sums)}
    kept = [t for t in _tensors(vars(scorer)) if t.untyped_storage()._cdata not in on_host]
    assert sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}.values()) < MATRIX
    assert sum(t.nbytes for t in (*scorer._sums, *scorer._open_sums)) == (8 * 2 * LAYERS * MATRIX // 4) * (
        kind == "paper"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_takes_a_stripe_of_a_matrix_where_matrices_are_large(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    monkeypatch.setattr(score_module, "_STRIPE", MATRIX // 4 // 4)
    base, model = frozen("nonreentrant", dtype), Model("nonreentrant", dtype)
    scorer, _ = scorer_of(model, "abs_mean", block_size=SIDE)
    peak = peak_of(model, dtype)
    record_property("matrices beyond the frozen model", (peak - base) / MATRIX)
    print(f"{dtype}: frozen {base}, scoring {peak}, matrix {MATRIX}")
    assert peak - base <= MATRIX / 4 * (1 if dtype == torch.float32 else 1.5)  # the stripe in both precisions
    assert scorer.close_window()


def test_without_checkpointing_scoring_keeps_the_layers_inputs_and_they_are_reported(record_property: Any) -> None:
    base, model = frozen("none"), Model("none", torch.float32)
    scorer, _ = scorer_of(model, "abs_mean", block_size=SIDE)
    peak = peak_of(model)
    record_property("bytes of frozen model", base)
    record_property("bytes that scoring adds", peak - base)
    print(f"without checkpointing: frozen {base}, scoring adds {peak - base}, matrix {MATRIX}")
    # inputs of up_proj, which nothing else keeps; tanh keeps down_proj's
    assert peak - base <= MATRIX + LAYERS * 4 * TOKENS * WIDTH
    assert scorer.close_window()


@pytest.mark.parametrize("how", ["none", "reentrant", "nonreentrant"])
def test_training_takes_16_bytes_per_trained_element_and_the_features_its_tiles_read(
    tmp_path: Path, how: str, record_property: Any
) -> None:
    base, model = frozen(how), Model(how, torch.float32)
    choice = choice_of(model, SIDE, lambda i: i % 6 == 0)
    choice.save(tmp_path / "tiles.json")
    pipeline = pipeline_of(model, tmp_path / "tiles.json")
    peak = peak_of(model)
    matrices = [(chosen, unit.params[chosen.param][1]) for unit in pipeline.units for chosen in unit.matrices]
    features = sum(b.keep.numel() if b.keep is not None else p.shape[1] for b, p in matrices)
    at_once = features if how == "none" else features / LAYERS
    kept = 4 * TOKENS * at_once
    slices = 4 * TOKENS * 2 * INNER  # of x and dY, while one product is computed
    record_property("bytes beyond the frozen model", peak - base)
    print(f"{how}: frozen {base}, training adds {peak - base}, of that kept features {kept}")
    assert peak - base <= kept + slices
    state = sum(held_by(unit, unit._adam) for unit in pipeline.units)
    record_property("state, gradient and buffers per element", state / choice.elements)
    assert state <= 1.01 * 24 * choice.elements  # with originals and what goes up
    assert choice.elements < LAYERS * 2 * WIDTH * INNER / 5


@pytest.mark.parametrize("phase", ["scoring", "training"])
@pytest.mark.parametrize("how", ["reentrant", "nonreentrant"])
def test_checkpointing_saves_what_it_saves_a_frozen_model(tmp_path: Path, phase: str, how: str) -> None:
    def peak(how: str) -> int:
        model = Model(how, torch.float32)
        if phase == "scoring":
            keep: Any = scorer_of(model, "mean_abs", block_size=SIDE)
        else:
            choice_of(model, SIDE, lambda i: i % 6 == 0).save(tmp_path / "tiles.json")
            keep = pipeline_of(model, tmp_path / "tiles.json")
        found = peak_of(model)
        assert keep is not None
        return found

    assert peak("none") - peak(how) >= 0.9 * (frozen("none") - frozen(how)) > 0


def test_a_tap_keeps_a_copy_of_the_features_it_needs_and_nothing_of_the_whole_input() -> None:
    linear = nn.Linear(WIDTH, INNER)
    for p in linear.parameters():
        p.requires_grad_(p is linear.weight)
    tiles = [((0, SIDE), (16, 24)), ((SIDE, 2 * SIDE), (40, 44))]
    chosen = Tiles(param=0, expert=None, tiles=tiles, input_first=False, features=WIDTH, offset=0, device=CPU)

    class ActivationSink:
        def tapped(self, index: int, x: Tensor, dy: Tensor) -> None:
            assert x.shape == (TOKENS, 12) and x.untyped_storage().nbytes() == 4 * TOKENS * 12

    receiver = ActivationSink()
    tap(linear, receiver, 0, chosen.keep)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x = torch.randn(TOKENS, WIDTH)
    whole = StorageWeakRef(x.untyped_storage())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = linear(x)
    del x
    assert whole.expired()
    assert [t.untyped_storage().nbytes() for t in saved if t is not linear.weight] == [4 * TOKENS * 12]
    y.sum().backward()
