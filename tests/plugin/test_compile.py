# SPDX-License-Identifier: Apache-2.0
"""torch.compile of a model under the plugin: the same losses, weights and moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.toy import ADAPTER, ds_config, make_engine, tiny_llama, train

BLOCKS: dict[str, dict[str, Any]] = {
    "sparse_adapter": {"sparse_adapter": dict(ADAPTER)},
    "subspace": {"subspace": {"nonzeros": 2, "fit_steps": 2, "refit_interval": 3}},
    "tiles": {"sparse_matrix": {"density": 0.1, "block_size": 8, "warmup_steps": 2}},
}


@pytest.mark.parametrize(
    "block",
    [
        pytest.param("sparse_adapter", marks=pytest.mark.long),
        pytest.param("subspace", marks=pytest.mark.slow),
        pytest.param("tiles", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_engine_trains_as_an_eager_one(block: str) -> None:
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        engine = make_engine(ds_config(block=BLOCKS[block]), tiny_llama())
        if compiled:
            engine.compile(backend="aot_eager")
        found.append(train(engine, 6, distinct=3))
        engine.destroy()
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones() -> None:
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = tiny_llama()
        engine = make_engine(ds_config(block=BLOCKS["subspace"]), model)
        for layer in model.model.layers if compiled else ():
            layer.compile(backend="aot_eager")
        found.append(train(engine, 4, distinct=2))
        engine.destroy()
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)
