# SPDX-License-Identifier: Apache-2.0
"""More of what ranks of test_zero3.py do: train a tiny Mixtral, whose experts are in one tensor each, in two stages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meft_ds.plugin.zero3 import PartitionedWeights
from tests.toy import ADAPTER, batch, ds_config, make_engine

EXPERTS, STEPS = 4, 4
FIT = {"fit_steps": 2, "refit_interval": 3, "refit_threshold": 0.0}
BLOCKS: dict[str, dict[str, Any]] = {
    "random": {"subspace": {"nonzeros": 2, "projectors": "random"}},
    "learned": {"subspace": {"nonzeros": 2, "projectors": "learned", **FIT}},
    "tiles": {"sparse_matrix": {"density": 0.3, "budget": "per_module", "block_size": 8, "score": "magnitude"}},
    "whole": {"sparse_adapter": dict(ADAPTER), "train": ["experts", "norm"]},
}


def tiny_mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            initializer_range=0.3,
            attn_implementation="eager",
        )
    )


def experts(folder: Path) -> dict[str, Any]:
    """By block: how far experts' weights moved, and how far stage 3 is from stage 2, and from itself with slices that
    are not where the model is (as `offload_param` has them on an accelerator; here they are copied all the same)."""
    found: dict[str, Any] = {}
    before = {name: t.detach().clone() for name, t in tiny_mixtral().named_parameters()}
    stacked = [key for key, t in before.items() if "experts" in key and t.dim() == 3]
    for name, block in BLOCKS.items() if stacked else ():  # transformers 4 has a module for each expert
        two, three = trained(block, 2), trained(block, 3)
        with patch.object(PartitionedWeights, "_is_elsewhere", lambda self, held: True):
            elsewhere = trained(block, 3)
        if dist.get_rank() == 0:
            found[name] = {
                "experts": len(stacked),
                "moved": min(float((two[k] - before[k])[e].abs().max()) for k in stacked for e in range(EXPERTS)),
                "stage 3": max(float((three[k] - two[k]).abs().max()) for k in two),
                "elsewhere": all(torch.equal(elsewhere[k], three[k]) for k in three),
            }
    return found


def trained(block: dict[str, Any], stage: int) -> dict[str, Tensor]:
    """Whole weights after a few steps, on the first rank."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    config = ds_config(block=block, micro=4 // world, zero_optimization=zero)
    config["optimizer"]["params"]["eps"] = 1e-4  # with less, differences in rounding become whole steps
    engine = make_engine(config, tiny_mixtral())
    for step in range(STEPS):
        whole = batch(step)
        whole["attention_mask"][:] = 1
        whole["labels"] = whole["input_ids"].clone()
        engine.backward(
            engine(**{k: t[rank * (4 // world) : (rank + 1) * (4 // world)] for k, t in whole.items()}).loss
        )
        engine.step()
    engine.meft_flush()
    state = engine._consolidated() if stage == 3 else engine.module.state_dict()
    kept = {name: t.detach().clone() for name, t in (state or {}).items() if "meft_" not in name}
    engine.destroy()
    return kept
