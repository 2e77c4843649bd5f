# SPDX-License-Identifier: Apache-2.0
"""The arithmetic behind the picture of memory is what an engine plans, and the committed picture is what it draws."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory_picture import (
    LLAMA_8B,
    PICTURE,
    Llama,
    Need,
    picture,
    rows,
    sparse_adapter,
    sparse_matrix,
    subspace,
    table,
)
from meft_ds.offload.host.memory import in_units
from tests.toy import ds_config, make_engine

TINY = Llama(name="tiny", hidden=64, intermediate=192, layers=2, kv=32, vocab=128)
ADAPTER = {"rows": 256, "experts": 16, "experts_per_token": 4, "keys_per_token": 16, "cache_rows": 128}
ON_CPU: dict[str, tuple[dict[str, Any], Need]] = {
    "subspace": ({"subspace": {}}, subspace(TINY, gpu=False)),
    "subspace, layers": ({"subspace": {}, "train": ["layers"]}, subspace(TINY, ends=False, gpu=False)),
    "sparse_matrix": (
        {"sparse_matrix": {"density": 0.25, "block_size": 16}},
        sparse_matrix(TINY, density=0.25, on_device=False, gpu=False),
    ),
    "sparse_matrix, on the device": (
        {"sparse_matrix": {"density": 0.25, "block_size": 16, "state_device": "accelerator"}},
        sparse_matrix(TINY, density=0.25, on_device=True, gpu=False),
    ),
    "sparse_adapter": (
        {"sparse_adapter": ADAPTER},
        # the line at the start leaves the weights of routers out
        sparse_adapter(TINY, rows=256, experts=16, cache_rows=128, router_weights=False, gpu=False),
    ),
}


def tiny_model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TINY.vocab,
            hidden_size=TINY.hidden,
            intermediate_size=TINY.intermediate,
            num_hidden_layers=TINY.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


def test_the_sizes_are_those_of_the_model() -> None:
    assert TINY.parameters == sum(p.numel() for p in tiny_model().parameters())
    assert LLAMA_8B.parameters == 8_030_261_248


@pytest.mark.parametrize("name", ON_CPU)
def test_an_engine_plans_what_the_arithmetic_says(name: str, caplog: pytest.LogCaptureFixture) -> None:
    block, need = ON_CPU[name]
    with caplog.at_level(logging.INFO, logger="meft_ds"):
        engine = make_engine(ds_config(precision="bf16", block=block), tiny_model())
    planned = engine.meft_stats()["host_bytes"]
    engine.destroy()
    (line,) = [r.getMessage() for r in caplog.records if "per step at most" in r.getMessage()]
    assert (
        f"per step at most {in_units(need.down)} down, {in_units(need.up)} up; "
        f"device {in_units(need.device)} at most, host {in_units(need.host)}"
    ) in line
    assert abs(planned - need.host) <= 0.001 * need.host


def test_the_committed_picture_and_table_are_what_the_script_gives() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(rows())
    page = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "choose-a-method.md"
    assert table(rows()) in page.read_text(encoding="utf-8")
