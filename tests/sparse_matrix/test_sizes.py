# SPDX-License-Identifier: Apache-2.0
"""Tiles as large as matrices can have them, so that small ones get some."""

from __future__ import annotations

import json
import math

import pytest
from torch import nn

from meft_ds.sparse_matrix.choice.choice import Choice
from meft_ds.sparse_matrix.choice.select import choose, tell_of_matrices_without_tiles, weight_scores
from meft_ds.sparse_matrix.config import SparseMatrixConfig
from meft_ds.sparse_matrix.discover import elements_of_2d_weights, find_sites


def narrow_model() -> nn.Module:
    """28 matrices of width 192."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3])
def test_every_matrix_of_a_small_model_gets_its_share_of_tiles(
    density: float, caplog: pytest.LogCaptureFixture
) -> None:
    model, config = narrow_model(), SparseMatrixConfig(density=density, score="random")
    sites, _ = find_sites(model, config)
    with caplog.at_level("INFO", logger="meft_ds"):
        choice = choose(sites, weight_scores(sites, config), config, elements_of_2d_weights(model))
        tell_of_matrices_without_tiles(choice, sites, config)
    share = {site.name: 0.0 for site in sites}
    for tile in choice.tiles:
        share[tile.name] += tile.elements / math.prod(choice.shapes[tile.name])
    assert len(share) == 28 and caplog.records == []
    assert all(density / 2 < found < 2 * density for found in share.values()), share
    assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice


def test_a_line_says_how_many_matrices_got_no_tile_and_why(caplog: pytest.LogCaptureFixture) -> None:
    model = narrow_model()
    found = {}
    for name, given in (("256", {"block_size": 256}), ("global", {"budget": "global"})):
        config = SparseMatrixConfig(density=0.1, score="random", **given)
        sites, _ = find_sites(model, config)
        with caplog.at_level("INFO", logger="meft_ds"):
            choice = choose(sites, weight_scores(sites, config), config, elements_of_2d_weights(model))
            tell_of_matrices_without_tiles(choice, sites, config)
        found[name] = [r.getMessage() for r in caplog.records]
        caplog.clear()
    (line,) = found["256"]
    assert "of 28 matrices have no tile, because tiles of 256 x 256 are larger than their share" in line
    assert 'block_size "auto" fits it' in line and "and 2" in line
    (line,) = found["global"]
    assert "of 28 matrices have no tile, because they have none of the best ones" in line
