# SPDX-License-Identifier: Apache-2.0
"""How much of dense weight gradients is alive at once: at most one matrix's, never the model's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.subspace.hand import pipeline_of, subspace_units

WIDTH, INNER, LAYERS, TOKENS = 40, 56, 4, 33


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Census(TorchDispatchMode):
    """The most bytes of tensors as large as a weight that any operation left alive beside the weights themselves.

    No activation or sketch of these models has as many elements as a weight.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes = {p.numel() for p in model.parameters()}
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.numel() in self.sizes:
                storage = t.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: found for key, found in self.alive.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return out


def peaks(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[list[float], nn.Module]:
    """Of two backwards, the first of them with a check, in units of one matrix's gradient in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(LAYERS))).to(dtype)
    pipeline = pipeline_of(model, refit_interval=3, **settings) if settings else None
    found = []
    for step in range(2):
        x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(step)).to(dtype)
        loss = model(x).float().square().mean()
        with Census(model) as census:
            loss.backward()
        found.append(census.peak / (4 * WIDTH * INNER))
        if pipeline is not None:
            assert not pipeline.step().overflow
            assert all(m.bias["step"] == 0 for unit in subspace_units(pipeline) for m in unit.matrices)
        else:
            model.zero_grad()
    return found, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_most_one_matrix_has_dense_gradients_and_ordinary_windows_have_none(
    dtype: torch.dtype, record_property: Any
) -> None:
    matrices, size = 2 * LAYERS, dtype.itemsize / 4
    native, _ = peaks(dtype)
    activation, model = peaks(dtype, gradient_side="activation")
    weight, _ = peaks(dtype, gradient_side="weight")
    for name, found in (("native", native), ("activation", activation), ("weight", weight)):
        record_property(name, found)
        print(f"{dtype} {name}: peak dense gradients in matrices' float32 sizes, with a check and without: {found}")
    assert all(math.isclose(peak, matrices * size) for peak in native), "the measure sees what autograd makes"
    assert activation[1] == 0.0
    # the two halves of the tokens, and one product on its way into them
    assert 2 <= activation[0] <= 3
    assert weight[1] <= 1
    assert weight[0] <= 2 * size + 2, "what autograd made of one layer, and the matrix that is fitted"
