# SPDX-License-Identifier: Apache-2.0
"""The sparse adapter on the host: selection, output and gradients from the few rows that each token uses.

T tokens, d width, E experts per token, m keys of the largest expert, N experts. ``experts`` int64 [T, E] has ascending
ids in each token; ``gates`` is fp32 [T, E] or None for ones; ``tokens`` bool [T] is False for padding.
Products are exact or fp32, sums fp32; nothing depends on the number of threads, nor a token on the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meft_ds.ops import torch_experts
from meft_ds.ops.build import DTYPE_CODES, kernels
from meft_ds.ops.checks import FLOATS, check, check_rows

__all__ = [
    "Entries",
    "expert_backward",
    "expert_forward",
    "expert_scores",
    "list_entries",
    "select_keys",
    "top_experts",
]


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
        """(token, index into the flat [T * E] gates) of every entry, int64."""
        T, E, m = self.shape
        token = torch.repeat_interleave(torch.arange(T), self.ends.diff(prepend=self.ends.new_zeros(1)))
        return token, token * E + self.candidate.long() // m


def top_experts(p: Tensor, per_token: int) -> Tensor:
    """Ids of the ``per_token`` largest of p [T, N], equal ones by smaller id: int64 [T, per_token], ascending."""
    check("p", p, FLOATS, p.shape)
    T, N = p.shape
    if not 1 <= per_token <= N:
        raise ValueError(f"per_token must lie in [1, {N}], it is {per_token}")
    cpp = kernels()
    if cpp is None:
        return torch_experts.top_experts(p, per_token)
    ids = torch.empty(T, per_token, dtype=torch.int64)
    cpp.top_experts(p.data_ptr(), DTYPE_CODES[p.dtype], T, N, per_token, ids.data_ptr(), torch.get_num_threads())
    return ids


def expert_scores(x: Tensor, keys: Tensor, starts: Tensor, experts: Tensor, tokens: Tensor | None = None) -> Tensor:
    """q_tj = x_t . k_j for the keys of each token's experts: fp32 [T, E, m].

    0 beyond a short slice and for padding. x [T, d]; keys [r, d] of x's dtype, whose rows may lie apart; starts int64
    [N + 1]: expert e owns rows starts[e] ... starts[e + 1].
    """
    T, d = x.shape
    n_experts = starts.shape[0] - 1
    check("x", x, FLOATS, x.shape)
    check_rows("keys", keys, x.dtype, (keys.shape[0], d))
    check("starts", starts, (torch.int64,), (n_experts + 1,))
    _check_experts(experts, T, n_experts)
    _check_tokens(tokens, T)
    m = -(-keys.shape[0] // n_experts)
    cpp = kernels()
    if cpp is None:
        return torch_experts.expert_scores(x, keys, starts, experts, tokens, m)
    q = torch.empty(T, experts.shape[1], m)
    cpp.expert_scores(
        x.data_ptr(),
        keys.data_ptr(),
        keys.stride(0),
        DTYPE_CODES[x.dtype],
        cpp.Sizes(T, experts.shape[1], m, d),
        starts.data_ptr(),
        n_experts,
        experts.data_ptr(),
        _address(tokens),
        q.data_ptr(),
        torch.get_num_threads(),
    )
    return q


def select_keys(
    q: Tensor, gates: Tensor | None, tokens: Tensor | None, experts: Tensor, k: int, n_experts: int
) -> tuple[Tensor, Tensor]:
    """(mask bool [T, E, m], active bool [N, m]): the ``k`` largest s = gate * q above 0 of every token.

    Equal scores are decided for the smaller position; ``active`` says which keys some token selected. q fp32 [T, E, m].
    """
    T, E, m = q.shape
    check("q", q, (torch.float32,), q.shape)
    _check_gates(gates, T, E)
    _check_tokens(tokens, T)
    _check_experts(experts, T, n_experts)
    cpp = kernels()
    if cpp is None:
        return torch_experts.select_keys(q, gates, tokens, experts, k, n_experts)
    mask = torch.empty(T, E, m, dtype=torch.bool)
    active = torch.zeros(n_experts, m, dtype=torch.bool)
    cpp.select_keys(
        q.data_ptr(),
        _address(gates),
        _address(tokens),
        experts.data_ptr(),
        cpp.Sizes(T, E, m, 0),
        k,
        mask.data_ptr(),
        active.data_ptr(),
        torch.get_num_threads(),
    )
    return mask, active


def list_entries(mask: Tensor, experts: Tensor, slots: Tensor) -> Entries:
    """Entries of ``mask`` bool [T, E, m] in the bank that ``slots`` int32 [N, m] describes (-1 = not in it)."""
    T, E, m = mask.shape
    check("mask", mask, (torch.bool,), mask.shape)
    check("slots", slots, (torch.int32,), (slots.shape[0], m))
    _check_experts(experts, T, slots.shape[0])
    if E * m >= 2**31:
        raise ValueError(f"a token has {E * m} candidates, at most 2**31 - 1 are possible; use more experts")
    cpp = kernels()
    if cpp is None:
        return Entries(*torch_experts.list_entries(mask, experts, slots), (T, E, m))
    ends = torch.empty(T, dtype=torch.int64)
    given = (mask.data_ptr(), experts.data_ptr(), slots.data_ptr(), cpp.Sizes(T, E, m, 0))
    total = cpp.count_entries(*given, ends.data_ptr())
    slot, candidate = torch.empty(total, dtype=torch.int32), torch.empty(total, dtype=torch.int32)
    cpp.list_entries(*given, slot.data_ptr(), candidate.data_ptr())
    return Entries(ends, slot, candidate, (T, E, m))


def expert_forward(
    x: Tensor, bank: Tensor, entries: Entries, scores: Tensor | None, gates: Tensor | None, y: Tensor, *, add: bool
) -> Tensor:
    """y_t (+)= sum of relu(gate q) v over a token's entries; returns q of the entries, fp32, 0 where gate q <= 0.

    x [T, d]; bank [n, 2 d] (key || value) of x's dtype; scores: q fp32 [T, E, m] if known; y [T, d] fp32 or x's dtype,
    added to for ``add``.
    """
    T, E, m = entries.shape
    _check_products(x, bank, entries, gates)
    check("y", y, (torch.float32, x.dtype), x.shape)
    if scores is not None:
        check("scores", scores, (torch.float32,), entries.shape)
    cpp = kernels()
    if cpp is None:
        token, pair = entries.pairs()
        known = None if scores is None else scores.view(T, E * m)[token, entries.candidate.long()]
        gate = None if gates is None else gates.view(-1)[pair]
        part, kept = torch_experts.forward(x, bank, token, entries.slot, known, gate)
        _put(y, part, add)
        return kept
    kept = torch.empty(entries.slot.shape[0])
    cpp.expert_forward(
        x.data_ptr(),
        bank.data_ptr(),
        DTYPE_CODES[x.dtype],
        cpp.Sizes(T, E, m, x.shape[1]),
        _entries(cpp, entries),
        _address(scores),
        _address(gates),
        kept.data_ptr(),
        y.data_ptr(),
        DTYPE_CODES[y.dtype],
        add,
        torch.get_num_threads(),
    )
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
    """Gradients of ``expert_forward`` at dy [T, d] (x's dtype); ``kept`` is what it returned. None = not wanted.

    dx [T, d] fp32 or x's dtype, written (added to for ``add``). d_gates fp32 [T, E], always added to. grad fp32
    [n, 2 d]: gradients of the bank's rows, zeros where a row has no entry, or added to for ``add_grad``.
    """
    T, E, m = entries.shape
    _check_products(x, bank, entries, gates)
    check("dy", dy, (x.dtype,), x.shape)
    check("kept", kept, (torch.float32,), (entries.slot.shape[0],))
    if dx is not None:
        check("dx", dx, (torch.float32, x.dtype), x.shape)
    _check_gates(d_gates, T, E)
    if grad is not None:
        check("grad", grad, (torch.float32,), bank.shape)
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
    code, sizes, listed = DTYPE_CODES[x.dtype], cpp.Sizes(T, E, m, x.shape[1]), _entries(cpp, entries)
    dq, s = torch.empty_like(kept), torch.empty_like(kept)
    threads = torch.get_num_threads()
    cpp.expert_backward_tokens(
        dy.data_ptr(),
        bank.data_ptr(),
        code,
        sizes,
        listed,
        kept.data_ptr(),
        _address(gates),
        dq.data_ptr(),
        s.data_ptr(),
        _address(d_gates),
        _address(dx),
        DTYPE_CODES[None if dx is None else dx.dtype],
        add,
        threads,
    )
    if grad is not None:
        rows_at = (x.data_ptr(), dy.data_ptr(), code, sizes, listed, dq.data_ptr(), s.data_ptr(), grad.data_ptr())
        cpp.expert_backward_rows(*rows_at, grad.shape[0], add_grad, threads)


def _entries(cpp: Any, entries: Entries) -> Any:
    return cpp.Entries(entries.ends.data_ptr(), entries.slot.data_ptr(), entries.candidate.data_ptr())


def _put(total: Tensor, part: Tensor, add: bool) -> None:
    total.copy_(total.float() + part if add else part)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _check_experts(experts: Tensor, T: int, n_experts: int) -> None:
    check("experts", experts, (torch.int64,), (T, experts.shape[-1]))
    if experts.numel():
        low, high = (int(v) for v in torch.aminmax(experts))
        if low < 0 or high >= n_experts:
            raise ValueError(f"experts must lie in [0, {n_experts}), they run from {low} to {high}")


def _check_gates(gates: Tensor | None, T: int, E: int) -> None:
    if gates is not None:
        check("gates", gates, (torch.float32,), (T, E))


def _check_tokens(tokens: Tensor | None, T: int) -> None:
    if tokens is not None:
        check("tokens", tokens, (torch.bool,), (T,))


def _check_products(x: Tensor, bank: Tensor, entries: Entries, gates: Tensor | None) -> None:
    T, E, _m = entries.shape
    check("x", x, FLOATS, (T, x.shape[1]))
    check("bank", bank, (x.dtype,), (bank.shape[0], 2 * x.shape[1]))
    _check_gates(gates, T, E)
    if entries.slot.numel() and int(entries.slot.max()) >= bank.shape[0]:
        raise ValueError(f"entries name row {int(entries.slot.max())}, the bank has {bank.shape[0]} rows")
