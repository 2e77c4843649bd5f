# SPDX-License-Identifier: Apache-2.0
"""Optional load-balance loss on the router, as a gradient only: the user's loss function never sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
