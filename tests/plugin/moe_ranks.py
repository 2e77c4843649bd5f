# SPDX-License-Identifier: Apache-2.0
"""What the two ranks of test_moe.py do: DeepSpeed's MoE under every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from tests.plugin.tiles import block, digest
from tests.toy import ADAPTER, ds_config, make_engine

BLOCKS: dict[str, dict[str, Any]] = {
    "sparse_adapter": {"sparse_adapter": dict(ADAPTER)},
    "subspace": {"subspace": {"dim": 8, "nonzeros": 2}},
    "sparse_matrix": block(density=0.5, score="random"),
}
STEPS = 10


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)
        self.mlp = MoE(16, Expert(), num_experts=2, ep_size=ep_size, k=1)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mlp(self.proj(x))[0]


class Mixture(nn.Module):
    def __init__(self, ep_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(ep_size)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x).square().mean()


def tried(what: dict[str, Any], ep_size: int) -> dict[str, Any]:
    try:
        engine = make_engine(ds_config(block=what), Mixture(ep_size))
    except ValueError as fault:
        return {"refused": str(fault)}
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    losses = []
    for _ in range(STEPS):
        loss = engine(torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(dist.get_rank())))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.meft_flush()
    after = {n: p.detach() for n, p in engine.module.named_parameters()}
    moved = [n for n, p in after.items() if "deepspeed_experts" in n and not torch.equal(p, before[n])]
    return {"losses": losses, "digest": digest(after), "moved": moved}


def mixtures(folder: Path) -> dict[str, Any]:
    """By method and number of ranks that share the experts out."""
    deepspeed.init_distributed("gloo")  # which MoE layers ask for when they are made
    return {name: {str(ep_size): tried(what, ep_size) for ep_size in (1, 2)} for name, what in BLOCKS.items()}
