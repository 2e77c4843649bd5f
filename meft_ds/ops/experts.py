# SPDX-License-Identifier: Apache-2.0
"""The sparse adapter on the host: selection, output and gradients from the few rows that each token uses.

Shapes: T tokens, d width, E experts per token, m keys of the largest expert, N experts. ``experts`` int64 [T, E] has
ascending ids in each token. ``gates`` is fp32 [T, E], or None for ones. ``tokens`` bool [T] is False for padding.
Products are exact or fp32, sums are fp32. No result depends on the number of threads, and no token on another.
All functions raise ValueError that names the argument which does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meft_ds.ops import torch_experts
from meft_ds.ops.build import DTYPE_CODES, address, kernels, typed
from meft_ds.ops.checks import FLOATS, expect, expect_below


@dataclass(eq=False)
class Entries:
    """Selected (token, key) entries whose row lies in a bank of rows, token by token.

    ends int64 [T]: entries of token t are ends[t - 1] ... ends[t]. slot int32 [entries]: row of the bank.
    candidate int32 [entries]: position in the token's E * m candidates. shape: (T, E, m).
    """

    ends: Tensor
    slot: Tensor
    candidate: Tensor
    shape: tuple[int, int, int]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return (token, index into the flat [T * E] gates) of every entry, int64."""
        T, E, m = self.shape
        token = torch.repeat_interleave(torch.arange(T, device="cpu"), self.ends.diff(prepend=self.ends.new_zeros(1)))
        return token, token * E + self.candidate.long() // m


def top_experts(p: Tensor, per_token: int) -> Tensor:
    """Return ids of the ``per_token`` largest of p [T, N], ascending: int64 [T, per_token].

    Of equal values that with the smaller id is taken.
    """
    T, N = p.shape
    expect("p", p, FLOATS, (T, N))
    if not 1 <= per_token <= N:
        raise ValueError(f"per_token must lie in [1, {N}], it is {per_token}")
    cpp = kernels()
    if cpp is None:
        return torch_experts.top_experts(p, per_token)
    ids = torch.empty(T, per_token, dtype=torch.int64, device="cpu")
    cpp.top_experts(*typed(p), T, N, per_token, ids.data_ptr(), torch.get_num_threads())
    return ids


def expert_scores(x: Tensor, keys: Tensor, starts: Tensor, experts: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Return q_tj = x_t . k_j for the keys of each token's experts: fp32 [T, E, m].

    q is 0 beyond a short slice and for padding.

    Args:
        x: [T, d].
        keys: [r, d] of x's dtype; rows may lie apart.
        starts: int64 [N + 1]: expert e owns rows starts[e] ... starts[e + 1].
    """
    T, d = x.shape
    n_experts = starts.shape[0] - 1
    expect("x", x, FLOATS, (T, d))
    expect("keys", keys, (x.dtype,), (None, d), rows_apart=True)
    expect("starts", starts, (torch.int64,), (None,))
    _expect_experts(experts, T, n_experts)
    expect("tokens", tokens, (torch.bool,), (T,))
    E, m = experts.shape[1], -(-keys.shape[0] // n_experts)
    cpp = kernels()
    if cpp is None:
        return torch_experts.expert_scores(x, keys, starts, experts, tokens, m)
    q = torch.empty(T, E, m, device="cpu")
    at = x.data_ptr(), keys.data_ptr(), keys.stride(0), DTYPE_CODES[x.dtype], cpp.Sizes(T, E, m, d)
    chosen = starts.data_ptr(), n_experts, experts.data_ptr(), address(tokens)
    cpp.expert_scores(*at, *chosen, q.data_ptr(), torch.get_num_threads())
    return q


def select_keys(
    q: Tensor, gates: Tensor | None, tokens: Tensor | None, experts: Tensor, k: int, n_experts: int
) -> tuple[Tensor, Tensor]:
    """Select the ``k`` largest s = gate * q above 0 of every token; of equal scores that at the smaller position.

    Args:
        q: fp32 [T, E, m].

    Returns:
        mask: bool [T, E, m], the selected keys.
        active: bool [N, m], keys that some token selected.
    """
    T, E, m = q.shape
    expect("q", q, (torch.float32,), (T, E, m))
    expect("gates", gates, (torch.float32,), (T, E))
    expect("tokens", tokens, (torch.bool,), (T,))
    _expect_experts(experts, T, n_experts)
    cpp = kernels()
    if cpp is None:
        return torch_experts.select_keys(q, gates, tokens, experts, k, n_experts)
    mask, active = (
        torch.empty(T, E, m, dtype=torch.bool, device="cpu"),
        torch.zeros(n_experts, m, dtype=torch.bool, device="cpu"),
    )
    at = q.data_ptr(), address(gates), address(tokens), experts.data_ptr(), cpp.Sizes(T, E, m, 0)
    cpp.select_keys(*at, k, mask.data_ptr(), active.data_ptr(), torch.get_num_threads())
    return mask, active


def list_entries(mask: Tensor, experts: Tensor, slots: Tensor) -> Entries:
    """List what ``mask`` bool [T, E, m] selects and the bank holds.

    Args:
        slots: int32 [N, m], the bank's row of each key; -1 where the bank does not hold it.
    """
    T, E, m = mask.shape
    expect("mask", mask, (torch.bool,), (T, E, m))
    expect("slots", slots, (torch.int32,), (None, m))
    _expect_experts(experts, T, slots.shape[0])
    if E * m >= 2**31:
        raise ValueError(f"a token has {E * m} candidates, at most 2**31 - 1 are possible; use more experts")
    cpp = kernels()
    if cpp is None:
        return Entries(*torch_experts.list_entries(mask, experts, slots), (T, E, m))
    ends = torch.empty(T, dtype=torch.int64, device="cpu")
    given = mask.data_ptr(), experts.data_ptr(), slots.data_ptr(), cpp.Sizes(T, E, m, 0)
    total = cpp.count_entries(*given, ends.data_ptr())
    slot, candidate = (
        torch.empty(total, dtype=torch.int32, device="cpu"),
        torch.empty(total, dtype=torch.int32, device="cpu"),
    )
    cpp.list_entries(*given, slot.data_ptr(), candidate.data_ptr())
    return Entries(ends, slot, candidate, (T, E, m))


def expert_forward(
    x: Tensor, bank: Tensor, entries: Entries, scores: Tensor | None, gates: Tensor | None, y: Tensor, *, add: bool
) -> Tensor:
    """Write y_t = sum of relu(gate q) v over a token's entries. Return q of the entries, fp32, 0 where gate q <= 0.

    Args:
        x: [T, d].
        bank: [n, 2 d] (key || value) of x's dtype.
        scores: q, fp32 [T, E, m], if it is known.
        y: fp32 or x's dtype [T, d].
        add: add to y instead.
    """
    T, E, m = entries.shape
    _expect_products(x, bank, entries, gates)
    expect("y", y, (torch.float32, x.dtype), x.shape)
    expect("scores", scores, (torch.float32,), entries.shape)
    cpp = kernels()
    if cpp is None:
        token, pair = entries.pairs()
        known = None if scores is None else scores.view(T, E * m)[token, entries.candidate.long()]
        gate = None if gates is None else gates.view(-1)[pair]
        part, kept = torch_experts.forward(x, bank, token, entries.slot, known, gate)
        _put(y, part, add)
        return kept
    kept = torch.empty(entries.slot.shape[0], device="cpu")
    at = (x.data_ptr(), bank.data_ptr(), DTYPE_CODES[x.dtype], *_listed(cpp, entries, x))
    cpp.expert_forward(*at, address(scores), address(gates), kept.data_ptr(), *typed(y), add, torch.get_num_threads())
    return kept


def expert_backward(
    dy: Tensor,
    x: Tensor,
    bank: Tensor,
    entries: Entries,
    kept: Tensor,
    gates: Tensor | None,
    *,
    dx: Tensor | None,
    d_gates: Tensor | None,
    grad: Tensor | None,
    add: bool,
    add_grad: bool = False,
) -> None:
    """Compute the gradients of ``expert_forward``. A result that is None is not computed.

    Args:
        dy: [T, d] of x's dtype.
        kept: what ``expert_forward`` returned.
        dx: fp32 or x's dtype [T, d]; written, or added to with ``add``.
        d_gates: fp32 [T, E]; always added to.
        grad: fp32 [n, 2 d], gradients of the bank's rows, zeros where a row has no entry; written, or added to with
            ``add_grad``.
    """
    T, E, _ = entries.shape
    _expect_products(x, bank, entries, gates)
    expect("dy", dy, (x.dtype,), x.shape)
    expect("kept", kept, (torch.float32,), entries.slot.shape)
    expect("dx", dx, (torch.float32, x.dtype), x.shape)
    expect("d_gates", d_gates, (torch.float32,), (T, E))
    expect("grad", grad, (torch.float32,), bank.shape)
    cpp = kernels()
    if cpp is None:
        token, pair = entries.pairs()
        gate = None if gates is None else gates.view(-1)[pair]
        part, each, rows = torch_experts.backward(dy, x, bank, token, entries.slot, kept, gate)
        if dx is not None:
            _put(dx, part, add)
        if d_gates is not None:
            d_gates.view(-1).index_add_(0, pair, each)
        if grad is not None:
            _put(grad, rows, add_grad)
        return
    code, listed, threads = DTYPE_CODES[x.dtype], _listed(cpp, entries, x), torch.get_num_threads()
    dq, s = torch.empty_like(kept), torch.empty_like(kept)
    of_entries = kept.data_ptr(), address(gates), dq.data_ptr(), s.data_ptr(), address(d_gates)
    cpp.expert_backward_tokens(dy.data_ptr(), bank.data_ptr(), code, *listed, *of_entries, *typed(dx), add, threads)
    if grad is not None:
        at = (x.data_ptr(), dy.data_ptr(), code, *listed, dq.data_ptr(), s.data_ptr(), grad.data_ptr())
        cpp.expert_backward_rows(*at, grad.shape[0], add_grad, threads)


def _listed(cpp: Any, entries: Entries, x: Tensor) -> tuple[Any, Any]:
    at = entries.ends.data_ptr(), entries.slot.data_ptr(), entries.candidate.data_ptr()
    return cpp.Sizes(*entries.shape, x.shape[1]), cpp.Entries(*at)


def _put(total: Tensor, part: Tensor, add: bool) -> None:
    total.copy_(total.float() + part if add else part)


def _expect_experts(experts: Tensor, T: int, n_experts: int) -> None:
    expect("experts", experts, (torch.int64,), (T, None))
    expect_below("experts", experts, n_experts)


def _expect_products(x: Tensor, bank: Tensor, entries: Entries, gates: Tensor | None) -> None:
    T, E, _ = entries.shape
    expect("x", x, FLOATS, (T, None))
    expect("bank", bank, (x.dtype,), (None, 2 * x.shape[1]))
    expect("gates", gates, (torch.float32,), (T, E))
    expect_below("the rows of entries", entries.slot, bank.shape[0])
