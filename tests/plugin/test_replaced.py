# SPDX-License-Identifier: Apache-2.0
"""A parameter that trains is replaced after the engine was made: the next step names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.plugin.tiles import block
from tests.toy import ADAPTER, ds_config, make_engine, tiny_llama, train

BLOCKS: dict[str, dict[str, Any]] = {
    "adapter": {"sparse_adapter": dict(ADAPTER), "train": ["embed_tokens"]},
    "subspace": {"subspace": {"dim": 8, "nonzeros": 2}},
    "tiles": block(score="random", others={"train": ["embed_tokens"]}),
}


def _replace(model: Any) -> None:
    model.model.embed_tokens = nn.Embedding(61, 16)


def _resize(model: Any) -> None:
    model.resize_token_embeddings(70)


@pytest.mark.parametrize("change", [_resize, _replace])
@pytest.mark.parametrize("what", BLOCKS)
def test_an_embedding_that_was_replaced_after_the_engine_is_named_by_the_next_step(what: str, change: Any) -> None:
    model = tiny_llama()
    engine = make_engine(ds_config(block=BLOCKS[what]), model)
    train(engine, 1)
    change(model)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight trains with shape \(61, 16\).*engine\.destroy"):
        train(engine, 1)
    engine.destroy()


def test_what_is_put_around_a_parameter_that_trains_is_no_fault() -> None:
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = tiny_llama()
    engine = make_engine(ds_config(block=BLOCKS["adapter"]), model)
    train(engine, 1)
    model.model.embed_tokens = Around(model.model.embed_tokens)
    before = model.model.embed_tokens.inner.weight.detach().clone()
    train(engine, 2)
    assert not torch.equal(before, model.model.embed_tokens.inner.weight)


def test_a_look_at_all_places_walks_through_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(ds_config(block=BLOCKS["subspace"]))
    train(engine, 1)
    monkeypatch.setattr(nn.Module, "named_parameters", lambda *args, **kwargs: pytest.fail("it walks"))
    engine._meft._places.check()
    assert len(engine._meft._places._sizes) > 3
