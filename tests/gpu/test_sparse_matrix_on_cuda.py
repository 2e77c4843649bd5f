# SPDX-License-Identifier: Apache-2.0
"""Sparse matrix tuning on an accelerator, against whole gradients and against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meft_ds.offload.model.weights import WHOLE, Piece, rectangles
from meft_ds.sparse_matrix.tiles import RowsCols, Tiles
from tests.toy import ds_config, make_engine, tiny_llama, train

SCORED = {"density": 0.2, "block_size": 8, "warmup_steps": 2}
# scattered over rows and columns, with ragged ones at the edges of a [300, 200]
TILES: list[RowsCols] = [
    ((0, 64), (64, 128)),
    ((0, 64), (192, 200)),
    ((128, 192), (64, 128)),
    ((128, 192), (192, 200)),
    ((256, 300), (0, 64)),
]


def tiles_on(device: torch.device, *, input_first: bool) -> Tiles:
    features = 300 if input_first else 200
    settings: dict[str, Any] = {"param": 0, "expert": None, "offset": 0, "device": device}
    return Tiles(tiles=TILES, input_first=input_first, features=features, **settings)


@pytest.mark.parametrize("input_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiles_gradients_are_slices_of_the_whole_one(cuda: torch.device, dtype: torch.dtype, input_first: bool) -> None:
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(177, size, generator=g).to(cuda, dtype) for size in (300, 200))
    chosen = tiles_on(cuda, input_first=input_first)
    x, dy = (left, right) if input_first else (right, left)
    acc = torch.zeros(chosen.numel, device=cuda)
    chosen.add_product(acc, x if chosen.keep is None else x[:, chosen.keep], dy)
    whole = left.double().t() @ right.double()
    loose = 1e-4 if dtype == torch.float32 else 40 * torch.finfo(dtype).eps
    for (rows, cols), values in chosen.tiles(acc):
        torch.testing.assert_close(values, whole[slice(*rows), slice(*cols)].float(), atol=loose, rtol=loose)


@pytest.mark.parametrize("input_first", [False, True])
def test_what_is_written_is_read_again_and_nothing_else_changes(cuda: torch.device, input_first: bool) -> None:
    chosen = tiles_on(cuda, input_first=input_first)
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(1)).to(cuda)
    before, values = weight.clone(), torch.arange(1.0, chosen.numel + 1, device=cuda)
    for piece in WHOLE.pieces(weight):
        chosen.write(piece, values)
    assert torch.equal(chosen.read(weight), values)
    assert int((weight != before).sum()) == chosen.numel


@pytest.mark.parametrize("input_first", [False, True])
def test_slices_that_lie_on_the_host_are_written_as_those_on_the_device(cuda: torch.device, input_first: bool) -> None:
    chosen = tiles_on(cuda, input_first=input_first)
    values = torch.arange(1.0, chosen.numel + 1, device=cuda)
    written = []
    for device in (cuda, torch.device("cpu")):
        flat = torch.zeros(300 * 200, device=device)
        for first, end, rows, cols in rectangles(777, 50_505, 200):
            part = flat[first:end].view(rows.stop - rows.start, cols.stop - cols.start)
            tiles_on(cuda, input_first=input_first).write(Piece(part, rows, cols, first), values)
        written.append(flat.cpu())
    assert written[0].any() and torch.equal(*written)


@pytest.mark.parametrize("state", ["cpu", "accelerator"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_bit_identical_from_run_to_run_and_lowers_the_loss(
    cuda: torch.device, precision: str, state: str
) -> None:
    block = {"sparse_matrix": {**SCORED, "state_device": state}}
    first, second = (train(make_engine(ds_config(precision=precision, block=block)), 10, distinct=1) for _ in range(2))
    assert first == second and first[0] == first[1] == first[2]  # two steps score, and the third has yet to train
    assert first[-1] < first[0]


def test_nothing_but_the_chosen_tiles_changes(cuda: torch.device) -> None:
    model = tiny_llama()
    before = {name: p.detach().to(cuda, copy=True) for name, p in model.named_parameters()}
    engine = make_engine(ds_config(block={"sparse_matrix": SCORED}), model)
    train(engine, 6)
    changed = sum(int((p != before[name]).sum()) for name, p in engine.module.named_parameters())
    chosen = sum(unit.numel for unit in engine.optimizer.pipeline.units)
    assert 0.9 * chosen < changed <= chosen


def test_moments_lie_where_the_settings_say(cuda: torch.device) -> None:
    for state, kind in (("cpu", "cpu"), ("accelerator", cuda.type)):
        engine = make_engine(ds_config(block={"sparse_matrix": {**SCORED, "state_device": state}}))
        train(engine, 4)
        units = [unit for unit in engine.optimizer.pipeline.units if unit.wire == "blocks"]
        assert {t.device.type for unit in units for t in unit.state_tensors().values()} == {kind}
        assert ("blocks" in engine.meft_stats()["bytes"]) == (kind == "cpu")
