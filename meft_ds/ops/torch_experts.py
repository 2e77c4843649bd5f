# SPDX-License-Identifier: Apache-2.0
"""The sparse adapter's host kernels in plain torch: the oracle of the C++ ones. fp32 throughout, shapes as in experts.

Written to be read, not to be fast: without a compiler the adapter takes the batched torch form of its own room.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_experts(p: Tensor, per_token: int) -> Tensor:
    order = torch.sort(p.float(), dim=1, descending=True, stable=True).indices
    return order[:, :per_token].sort(dim=1).values


def expert_scores(x: Tensor, keys: Tensor, starts: Tensor, experts: Tensor, tokens: Tensor | None, m: int) -> Tensor:
    rows = starts[experts][..., None] + torch.arange(m, device="cpu")
    short = rows >= starts[experts + 1][..., None]
    q = torch.einsum("td,temd->tem", x.float(), keys.float()[rows.clamp(max=keys.shape[0] - 1)])
    q = q.masked_fill(short, 0)
    return q if tokens is None else q.masked_fill(~tokens[:, None, None], 0)


def select_keys(
    q: Tensor, gates: Tensor | None, tokens: Tensor | None, experts: Tensor, k: int, n_experts: int
) -> tuple[Tensor, Tensor]:
    T, E, m = q.shape
    s = (q if gates is None else gates[..., None] * q).view(T, E * m)
    if tokens is not None:
        s = s.masked_fill(~tokens[:, None], 0)
    order = torch.sort(s, dim=1, descending=True, stable=True).indices[:, :k]
    mask = (torch.zeros(s.shape, dtype=torch.bool, device="cpu").scatter_(1, order, True) & (s > 0)).view(T, E, m)
    active = torch.zeros(n_experts, m, dtype=torch.int64, device="cpu")
    active.index_add_(0, experts.reshape(-1), mask.view(T * E, m).long())
    return mask, active > 0


def list_entries(mask: Tensor, experts: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    T, E, m = mask.shape
    slot = slots[experts]
    chosen = (mask & (slot >= 0)).view(T, E * m)
    candidate = torch.arange(E * m, dtype=torch.int32, device="cpu").expand(T, -1)
    return chosen.sum(1).cumsum(0), slot.view(T, E * m)[chosen], candidate[chosen]


def forward(
    x: Tensor, bank: Tensor, token: Tensor, slot: Tensor, scores: Tensor | None, gates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y fp32 [T, d] and kept [entries]. Scores and gates are given per entry here."""
    d = x.shape[1]
    rows = bank[slot.long()].float()
    q = (x.float()[token] * rows[:, :d]).sum(1) if scores is None else scores
    s = (q if gates is None else q * gates).clamp(min=0)
    return torch.zeros(x.shape, device="cpu").index_add_(0, token, s[:, None] * rows[:, d:]), q * (s > 0)


def backward(
    dy: Tensor, x: Tensor, bank: Tensor, token: Tensor, slot: Tensor, kept: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx fp32 [T, d], d_gate per entry, and row gradients fp32 [n, 2 d]. Gates are given per entry here."""
    d = x.shape[1]
    rows = bank[slot.long()].float()
    dz = (dy.float()[token] * rows[:, d:]).sum(1) * (kept != 0)
    gate = torch.ones_like(kept) if gates is None else gates
    dx = torch.zeros(x.shape, device="cpu").index_add_(0, token, (dz * gate)[:, None] * rows[:, :d])
    each = torch.cat([(dz * gate)[:, None] * x.float()[token], (kept * gate)[:, None] * dy.float()[token]], dim=1)
    return dx, dz * kept, torch.zeros(bank.shape[0], 2 * d, device="cpu").index_add_(0, slot.long(), each)
