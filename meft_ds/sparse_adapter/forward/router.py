# SPDX-License-Identifier: Apache-2.0
"""The router: which slice of rows each expert owns, the logits P = X G^T, and how keys and router start."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Router", "expert_starts", "init_keys", "init_router", "unit_router_scale"]


class Router(nn.Module):
    """Router logits without bias and without softmax (softmax hurt in the paper). ``weight`` is G [N, d]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """P [T, N] of x [T, d]; in the dtype of x, but fp32 for fp16 (gates near 31 times a score overflow fp16)."""
        if x.dtype == torch.float16:
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x.float(), self.weight.float())
        return F.linear(x, self.weight.to(x.dtype))


def expert_starts(r: int, n_experts: int) -> Tensor:
    """Return the first row of every expert, and r last: int64 [N + 1]. The first r % N slices hold one more."""
    e = torch.arange(n_experts + 1, device="cpu")
    return e * (r // n_experts) + e.clamp(max=r % n_experts)


def init_keys(r: int, d: int, std: float, seed: int, layer: int) -> Tensor:
    """Draw keys A ~ N(0, std^2), fp32 [r, d] on the CPU; the same for the same (seed, layer)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)
    return torch.empty(r, d, device="cpu").normal_(0.0, std, generator=generator)


def init_router(keys: Tensor, n_experts: int, scale: float) -> Tensor:
    """Router G fp32 [N, d]: the mean key of each expert times ``scale``."""
    starts = expert_starts(keys.shape[0], n_experts).to(keys.device)
    sums = F.embedding_bag(torch.arange(keys.shape[0], device=keys.device), keys.float(), starts[:-1], mode="sum")
    return sums * (scale / (starts[1:] - starts[:-1]).float())[:, None]


def unit_router_scale(*, d: int, r: int, n_experts: int, per_token: int, std: float) -> float:
    """Factor on the mean key for which the *selected* gates start at order 1.

    After RMSNorm or LayerNorm the entries of x have root mean square 1, so |x| = sqrt(d). The mean of m = r/N keys
    from N(0, std^2) has entries of variance std^2 / m, so a logit with factor c is close to N(0, c^2 d std^2 / m). The
    E largest of N such logits have the mean a c sqrt(d) std / sqrt(m), where a = (N/E) phi(Phi^-1(1 - E/N)) is the
    mean of the upper E/N tail of a standard normal. Setting that to 1 gives c = sqrt(m) / (a std sqrt(d)). For E >
    N/2, where the tail mean vanishes, a is held at that of E = N/2, the mean magnitude sqrt(2/pi).
    With the paper's numbers (d = 4096, m = 23, std = 0.02, N = 368, E = 8) a = 2.4 and c = 1.6; its factor 50 gives 32.
    """
    m = r / n_experts
    fraction = per_token / n_experts
    tail_mean = math.sqrt(2 / math.pi)
    if fraction < 0.5:
        normal = NormalDist()
        tail_mean = normal.pdf(normal.inv_cdf(1 - fraction)) / fraction
    return math.sqrt(m) / (tail_mean * std * math.sqrt(d))


__all__ = ["with_balance_gradient"]


def with_balance_gradient(p: Tensor, experts: Tensor, tokens: Tensor | None, weight: float) -> Tensor:
    """P unchanged; in backward ``weight`` times the gradient of the Switch loss is added (arXiv 2101.03961, eq. 4).

    L = N sum_e f_e mean_t softmax(P)_te, where f_e is the share of selections that went to expert e, a constant.
    p [T, N], experts int64 [T, E], tokens bool [T] or None (all).
    """
    return _Balance.apply(p, experts, tokens, weight)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, experts: Tensor, tokens: Tensor | None, weight: float) -> Tensor:
        ctx.save_for_backward(p, experts, tokens)
        ctx.weight = weight
        return p.view_as(p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        p, experts, tokens = ctx.saved_tensors
        T, n_experts = p.shape
        real = torch.ones(T, device=p.device) if tokens is None else tokens.float()
        n_real = real.sum().clamp(min=1)
        # Sums of whole numbers below 2**24: exact in fp32, so the order of the additions does not matter.
        share = torch.zeros(n_experts, device=p.device)
        share.index_add_(0, experts.reshape(-1), real[:, None].expand_as(experts).reshape(-1))
        share = share / (n_real * experts.shape[1])
        soft = torch.softmax(p.float(), dim=1)
        slope = soft * (share - (soft * share).sum(1, keepdim=True)) * real[:, None]
        slope = slope * (ctx.weight * n_experts / n_real)
        return (grads[0].float() + slope).to(p.dtype), None, None, None
