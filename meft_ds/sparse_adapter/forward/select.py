# SPDX-License-Identifier: Apache-2.0
"""Selection: which experts and which keys every token uses. The same pure functions run on the host and the device.

For token t: tau_t = the E experts with the largest p_t; s_tj = p_{t,e(j)} (x_t . k_j) for the keys j of those experts;
I_t = the K largest s_tj that are above 0. Equal values are decided for the smaller id, for experts and for keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from meft_ds import ops
from meft_ds.sparse_adapter.forward.grouping import GroupPlan, SortedPairs, group_chunk

__all__ = ["Selection", "active_slots", "key_scores", "select_keys", "top_experts"]


@dataclass(eq=False)
class Selection:
    """What one forward chose; enough to run that forward again without choosing again.

    experts: int64 [T, E], ascending in each token (so a candidate's position orders like its row id).
    mask: bool [T, E, m] over the candidates, m = rows of the largest expert.
    active: bool [N, m] on the host: slots of each expert's slice that some token uses; U = active.sum().
    counts: int64 [C, N] on the host: tokens that the router sent to each expert, per chunk of tokens (see plan).
    tokens: bool [T], False for padding; None = all are real.
    plan: how the grouped form orders the pairs (token, expert); None for the union form, and while a selection waits
        for a checkpoint's recomputation: it is several times larger than the rest and quick to make again.
    """

    experts: Tensor
    mask: Tensor
    active: Tensor
    counts: Tensor
    tokens: Tensor | None
    plan: GroupPlan | None = None


def top_experts(p: Tensor, per_token: int) -> Tensor:
    """Return ids of the ``per_token`` largest logits of p fp32 [T, N]: int64 [T, E], ascending ids."""
    if p.device.type == "cpu" and ops.backend() == "cpp":
        return ops.top_experts(p.contiguous(), per_token)
    n_experts = p.shape[1]
    # A float's bits as a signed integer order like the float once negative ones are mirrored; the id in the low half
    # makes all values distinct, so that topk has nothing to choose between. + 0.0 turns -0.0 into 0.0.
    bits = (p.float() + 0.0).contiguous().view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rank = torch.arange(n_experts - 1, -1, -1, device=p.device)
    ids = torch.topk((bits.long() << 32) | rank, per_token, dim=1, sorted=False).indices
    return ids.sort(dim=1).values


def key_scores(x: Tensor, keys: Tensor, starts: Tensor, pairs: SortedPairs) -> Tensor:
    """Return q_tj = x_t . k_j of all candidates: [T, E, m], x's dtype; 0 beyond a short slice and for padding.

    x [T, d], keys [r, d] (may be strided), starts int64 [N + 1], all on one device, which sorted ``pairs`` too.
    """
    d, r = x.shape[1], keys.shape[0]
    n_experts = starts.shape[0] - 1
    m = -(-r // n_experts)
    # Row ids of each expert; a short slice repeats its last row here and is blanked below.
    slot = torch.arange(m, device=x.device)
    short = slot >= (starts[1:] - starts[:-1])[:, None]
    table = (starts[:-1, None] + slot).clamp(max=r - 1)
    parts = []
    for chunk in range(pairs.chunks):
        groups, _order = group_chunk(pairs, chunk, torch.arange(n_experts, device="cpu"), d * x.element_size())
        assert groups.order is not None
        scores = x.new_zeros(groups.rows + 1, m)
        for block in groups.blocks:
            experts = groups.order[block.groups]
            k = keys.index_select(0, table.index_select(0, experts).view(-1)).view(block.n, m, d)
            xg = x.index_select(0, groups.token[block.rows]).view(block.n, block.size, d)
            q = torch.bmm(xg, k.transpose(1, 2), out=scores[block.rows].view(block.n, block.size, m))
            if r % n_experts:
                q.masked_fill_(short.index_select(0, experts)[:, None], 0)
        parts.append(scores.index_select(0, groups.slot))
    q = parts[0] if len(parts) == 1 else torch.cat([x.new_zeros(0, m), *parts])
    return q.view(-1, pairs.per_token, m)


def select_keys(q: Tensor, gates: Tensor | None, k: int, tokens: Tensor | None = None) -> Tensor:
    """Return bool [T, E, m]: the ``k`` largest scores s = gates * q above 0 of every token.

    q [T, E, m]; gates [T, E], None for ``gate: false`` (s = q); tokens bool [T] or None.
    """
    T, E, m = q.shape
    s = q.float() if gates is None else gates.float()[..., None] * q.float()
    if tokens is not None:
        s = s * tokens[:, None, None]
    s = s.view(T, E * m)
    positive = s > 0
    if k >= E * m or T == 0:
        return positive.view(T, E, m)
    # Values of topk are the same whichever of equal scores it took; only the ids would not be.
    threshold = torch.topk(s, k, dim=1, sorted=False).values.amin(1, keepdim=True)
    chosen = s >= threshold
    if s.device.type != "cpu" or bool((chosen & positive).sum(1).max() > k):
        above = s > threshold
        equal = chosen & ~above
        room = k - above.sum(1, keepdim=True, dtype=torch.int32)
        chosen = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
    return (chosen & positive).view(T, E, m)


def active_slots(experts: Tensor, mask: Tensor, n_experts: int) -> Tensor:
    """Return bool [N, m]: slots of each expert's slice that at least one token selected. No host synchronisation."""
    m = mask.shape[2]
    slots = experts.view(-1, 1) * m + torch.arange(m, device=mask.device)
    hit = torch.zeros(n_experts * m + 1, dtype=torch.bool, device=mask.device)
    hit.scatter_(0, torch.where(mask.view(-1, m), slots, n_experts * m).view(-1), True)
    return hit[:-1].view(n_experts, m)
