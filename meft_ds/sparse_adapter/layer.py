# SPDX-License-Identifier: Apache-2.0
"""``SparseAdapter``: the adapter beside one frozen FFN. It selects, asks its ``RowSource`` for rows, and computes.

p_t = G x_t;  tau_t = the E largest p_t;  s_tj = p_{t,e(j)} (x_t . k_j) for keys j of tau_t;
I_t = the K largest s_tj above 0;  y_t = sum_{j in I_t} s_tj v_j
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meft_ds import ops
from meft_ds.offload.model.gradient_checkpointing import inside_backward
from meft_ds.sparse_adapter.config import ResolvedSparseAdapter
from meft_ds.sparse_adapter.forward.cpu import apply_fused, can_fuse
from meft_ds.sparse_adapter.forward.grouped import Job, apply_grouped
from meft_ds.sparse_adapter.forward.grouping import (
    GroupPlan,
    SortedPairs,
    chunk_length,
    count_pairs,
    make_banks,
    plan_groups,
    sort_pairs,
)
from meft_ds.sparse_adapter.forward.recompute import Replay, inside_function
from meft_ds.sparse_adapter.forward.router import Router, expert_starts, with_balance_gradient
from meft_ds.sparse_adapter.forward.select import Selection, active_slots, key_scores, select_keys, top_experts
from meft_ds.sparse_adapter.forward.union import apply_union
from meft_ds.sparse_adapter.rows.source import RowSource

__all__ = ["SparseAdapter"]


class SparseAdapter(nn.Module):
    """Sparse adapter of one layer. The router is its only parameter; rows belong to ``rows``.

    What counts is whether grad is enabled, not train or eval mode, which is dropout's: `from_pretrained` leaves models
    in eval mode, and programs train them so. Without grad nothing is written: no row gradients, no metrics, no saved
    selections; except in the first forward of a reentrant checkpoint, which is training that runs without grad.
    """

    rows: RowSource

    def __init__(
        self, config: ResolvedSparseAdapter, router_weight: Tensor, rows: RowSource | None, layer: int = 0
    ) -> None:
        """Take router_weight [N, d] in the router's dtype and on its device. rows may be set later."""
        super().__init__()
        if rows is not None and (rows.r, rows.d) != (config.rows, config.d):
            raise ValueError(f"rows are {rows.r} x {rows.d}, the adapter wants r = {config.rows}, d = {config.d}")
        if tuple(router_weight.shape) != (config.experts, config.d):
            raise ValueError(f"router is {tuple(router_weight.shape)}, expected ({config.experts}, {config.d})")
        self.config = config
        self.union = config.scope == "batch"
        """Whether all tokens meet the union of active rows: the slow form, and the oracle of the other."""
        self.layer = layer
        self.router = Router(router_weight)
        if rows is not None:
            self.rows = rows
        self.aux_scale = 1.0
        """Factor on the balance loss's gradient: the engine sets loss scale / accumulation steps."""
        self.evaluating = False
        """Whether the forward that is running belongs to an evaluation."""
        self._replay = Replay()
        self._starts = expert_starts(config.rows, config.experts)
        self._starts_on: dict[torch.device, Tensor] = {self._starts.device: self._starts}

    def forward(self, x: Tensor, token_mask: Tensor | None = None, *, repeatable: bool = True) -> Tensor:
        """Return y, shaped and typed like x [..., d]. ``token_mask`` [...]: 0 for padding, which selects nothing.

        ``repeatable=False``: the model's whole forward runs without grad, so that no backward will repeat it.
        """
        if not hasattr(self, "rows"):
            raise RuntimeError(f"the sparse adapter of layer {self.layer} has no rows; set adapter.rows first")
        trains = torch.is_grad_enabled() or (inside_function() and (repeatable or inside_backward()))
        self.evaluating = not trains
        try:
            return self._forward(x, token_mask, again=trains and inside_backward())
        finally:
            self.evaluating = False

    def _forward(self, x: Tensor, token_mask: Tensor | None, *, again: bool) -> Tensor:
        """Do what `forward` says; ``again``: backward repeats an earlier forward."""
        config = self.config
        flat = x.reshape(-1, config.d)
        with torch.autocast(x.device.type, enabled=False):
            p = self.router(flat) if config.gate else self.router(flat.detach()).detach()
            x_rows = flat.to(self.rows.dtype)
            selection, scores = self._select(x_rows.detach(), p.detach(), token_mask, again)
            if config.gate and config.balance_loss > 0 and torch.is_grad_enabled():
                weight = config.balance_loss * self.aux_scale
                p = with_balance_gradient(p, selection.experts, selection.tokens, weight)
            job = Job(self.rows, selection, self.rows.trains, scores)
            gate_p = p if config.gate else None
            if not self.union and selection.plan is None:
                y = apply_fused(x_rows, gate_p, job, self._starts)
            elif not self.union:
                y = apply_grouped(x_rows, gate_p, job)
                if not torch.is_grad_enabled():
                    selection.plan = None
            else:
                y = apply_union(x_rows, gate_p, job, self._starts, config.scope == "batch")
            if y.grad_fn is not None:
                self.rows.expect(selection, y.grad_fn)
        return y.to(x.dtype).view(x.shape)

    def end_window(self) -> None:
        """Forget saved selections; called after every optimizer step, when no backward can be pending."""
        self._replay.clear()

    def extra_repr(self) -> str:
        c = self.config
        return f"layer={self.layer}, d={c.d}, r={c.rows}, N={c.experts}, E={c.experts_per_token}, K={c.keys_per_token}"

    def _select(self, x: Tensor, p: Tensor, token_mask: Tensor | None, again: bool) -> tuple[Selection, Tensor | None]:
        if again:
            saved = self._replay.take(x)
            if saved is not None:
                if saved.plan is None and self._needs_plan(x):
                    saved.plan = self._plan(saved, x)
                return saved, None
        with torch.no_grad():
            selection, scores = self._choose(x, p, token_mask)
        if not (again or self.evaluating):
            self._replay.save(x, selection)
            self.rows.foretell(selection)
            self.rows.record(int(selection.active.sum()), x.shape[0], selection.counts.sum(0))
        return selection, scores

    def _choose(self, x: Tensor, p: Tensor, token_mask: Tensor | None) -> tuple[Selection, Tensor | None]:
        config, rows = self.config, self.rows
        tokens = None if token_mask is None else token_mask.reshape(-1).to(x.device) != 0
        experts = top_experts(p, config.experts_per_token)
        gates = p.gather(1, experts) if config.gate else None
        keys = rows.keys_for_selection()
        N = config.experts
        length = chunk_length(x.shape[0], config.experts_per_token, config.d * x.element_size())
        # What a host selection reads may lie in buffers that the next layer's transfer reuses: nothing below keeps it.
        if rows.selection == "host":
            x_s = rows.to_host(x, "x")
            experts_s = rows.to_host(experts.to(torch.int32), "experts").long()
            gates_s = None if gates is None else rows.to_host(gates, "gates")
            tokens_s = None if tokens is None else rows.to_host(tokens, "tokens")
            counts = count_pairs(experts_s, tokens_s, N, length)
        else:
            x_s, experts_s, gates_s, tokens_s = x, experts, gates, tokens
            counts = rows.to_host(count_pairs(experts, tokens, N, length), "counts").clone()
        pairs_s = None
        if can_fuse(x_s):
            q = ops.expert_scores(x_s.contiguous(), keys, self._starts, experts_s, tokens_s)
            gates_s = None if gates_s is None else gates_s.float()
            mask, active = ops.select_keys(q, gates_s, tokens_s, experts_s, config.keys_per_token, N)
        else:
            pairs_s = sort_pairs(experts_s, tokens_s, counts, length)
            q = key_scores(x_s, keys, self._starts_at(x_s.device), pairs_s)
            mask = select_keys(q, gates_s, config.keys_per_token, tokens_s)
            active = active_slots(experts_s, mask, N)
        if rows.selection == "host":
            mask = rows.to_device(mask, "mask")
        else:
            active = rows.to_host(active, "active").clone()
        selection = Selection(experts, mask, active, counts, tokens)
        if self._needs_plan(x):
            selection.plan = self._plan(selection, x, pairs_s if x_s.device == x.device else None)
        return selection, q if q.device == x.device else None

    def _needs_plan(self, x: Tensor) -> bool:
        return not self.union and not can_fuse(x)

    def _plan(self, selection: Selection, x: Tensor, pairs: SortedPairs | None = None) -> GroupPlan:
        row_bytes = self.config.d * x.element_size()
        if pairs is None:
            length = chunk_length(x.shape[0], self.config.experts_per_token, row_bytes)
            pairs = sort_pairs(selection.experts, selection.tokens, selection.counts, length)
        banks = make_banks(selection.active, self._starts, self.rows.capacity, 2 * self.config.d * 4)
        return plan_groups(pairs, banks, row_bytes)

    def _starts_at(self, device: torch.device) -> Tensor:
        if device not in self._starts_on:
            self._starts_on[device] = self._starts.to(device)
        return self._starts_on[device]
