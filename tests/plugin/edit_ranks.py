# SPDX-License-Identifier: Apache-2.0
"""What ranks do in test_weights_between_steps.py: a function that a forge runs on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param

from tests.plugin.test_weights_between_steps import W, engine_for, stop_training, write_copy
from tests.toy import batch


def reads_and_writes(folder: Path, method: str, stage: int) -> dict[str, Any]:
    """One rank alone reads; then all write the same value, by hand and through DeepSpeed's own function."""
    engine = engine_for(method, stage=stage)
    p = engine.module.get_parameter(W)

    def step(seed: int) -> None:
        engine.backward(engine(**batch(2 * seed + dist.get_rank())).loss)
        engine.step()

    def held() -> torch.Tensor:
        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()

    for seed in range(2):
        step(seed)
        if dist.get_rank() == 0 and stage < 3:
            p.data.sum()
    told: dict[str, Any] = {"full is the weight": torch.equal(safe_get_full_fp32_param(p), held())}
    if method == "adapter":
        moment = safe_get_full_optimizer_state(p, "exp_avg")
        told["moment"] = moment.double().sum().item()
    stop_training(engine)
    value = torch.arange(512.0).view(32, 16) / 512
    with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
        write_copy(p, value)
    step(3)
    told["written"] = torch.equal(held(), value)
    safe_set_full_fp32_param(p, 2 * value)
    step(4)
    told["set"] = torch.equal(held(), 2 * value)
    engine.destroy()
    return told
