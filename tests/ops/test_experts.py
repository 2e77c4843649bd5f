# SPDX-License-Identifier: Apache-2.0
"""The sparse adapter's host kernels against plain torch, for every dtype, ragged experts and any number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from meft_ds import ops
from meft_ds.ops import torch_experts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEFT_DS_OPS", "")
    if ops.backend() != "cpp":
        pytest.skip("the C++ kernels cannot be built here")


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    r = draw(st.integers(1, 70))
    n_experts = draw(st.integers(1, r))
    return {
        "r": r,
        "N": n_experts,
        "E": draw(st.integers(1, min(n_experts, 6))),
        "T": draw(st.integers(0, 30)),
        "d": draw(st.sampled_from([1, 3, 8, 15, 16, 31, 32, 33, 64, 100, 128, 131, 256, 300])),
        "k": draw(st.integers(1, 40)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "gate": draw(st.booleans()),
        "padding": draw(st.booleans()),
        "part": draw(st.booleans()),  # only a part of the active rows is in the bank
        "known": draw(st.booleans()),  # q is handed to forward
        "sums": draw(st.booleans()),  # outputs are added to what is there, in fp32
        "seed": draw(st.integers(0, 2**31)),
    }


class Case:
    """Inputs of all kernels for one drawn case."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.g = g = torch.Generator().manual_seed(case["seed"])
        T, d, r, N = case["T"], case["d"], case["r"], case["N"]
        self.k, self.N, self.E, self.dtype, self.sums = case["k"], N, case["E"], case["dtype"], case["sums"]
        e = torch.arange(N + 1)
        self.starts = e * (r // N) + e.clamp(max=r % N)
        self.p = torch.randn(T, N, generator=g)
        self.x = torch.randn(T, d, generator=g).to(self.dtype)
        self.dy = torch.randn(T, d, generator=g).to(self.dtype)
        self.store = torch.randn(r, 2 * d, generator=g).to(self.dtype)
        self.tokens = torch.rand(T, generator=g) < 0.7 if case["padding"] else None
        self.experts = torch_experts.top_experts(self.p, self.E)
        self.gates = self.p.gather(1, self.experts) if case["gate"] else None
        self.m = -(-r // N)
        self.q = torch_experts.expert_scores(
            self.x, self.store[:, :d], self.starts, self.experts, self.tokens, self.m
        ).contiguous()
        self.mask, active = torch_experts.select_keys(self.q, self.gates, self.tokens, self.experts, self.k, N)
        if case["part"]:
            active = active & (torch.rand(active.shape, generator=g) < 0.5)
        expert, slot = active.nonzero().unbind(1)
        self.bank = self.store[self.starts[expert] + slot]
        self.slots = torch.full(active.shape, -1, dtype=torch.int32)
        self.slots[active] = torch.arange(expert.shape[0], dtype=torch.int32)
        self.scores = self.q if case["known"] else None

    def close(self, got: Tensor, want: Tensor, exact: bool = False) -> None:
        scale = float(want.abs().max()) if want.numel() else 0.0
        eps = 1e-5 if exact or got.dtype == torch.float32 else 2 * torch.finfo(got.dtype).eps
        torch.testing.assert_close(got.float(), want.float(), rtol=eps, atol=eps * max(scale, 1e-3))

    def run(self) -> list[Tensor]:
        """Everything that forward and backward return, on the path of this process."""
        entries = ops.list_entries(self.mask, self.experts, self.slots)
        dtype = torch.float32 if self.sums else self.dtype
        y, dx = torch.ones(self.x.shape, dtype=dtype), torch.ones(self.x.shape, dtype=dtype)
        kept = ops.expert_forward(self.x, self.bank, entries, self.scores, self.gates, y, add=self.sums)
        d_gates, grad = torch.ones(self.experts.shape), torch.ones(self.bank.shape)
        ops.expert_backward(
            self.dy,
            self.x,
            self.bank,
            entries,
            kept,
            self.gates,
            dx=dx,
            d_gates=d_gates,
            grad=grad,
            add=self.sums,
            add_grad=self.sums,
        )
        return [entries.ends, entries.slot, entries.candidate, kept, y, dx, d_gates, grad]


@given(case=cases())
def test_selection_equals_plain_torch(case: dict[str, Any]) -> None:
    c = Case(case)
    for dtype in DTYPES:
        p = c.p.to(dtype)
        assert torch.equal(ops.top_experts(p, c.E), torch_experts.top_experts(p, c.E))
    keys = c.store[:, : c.x.shape[1]]
    c.close(ops.expert_scores(c.x, keys, c.starts, c.experts, c.tokens), c.q)
    tied = (c.q * 2).round() / 2
    for q in (c.q, tied):
        got = ops.select_keys(q, c.gates, c.tokens, c.experts, c.k, c.N)
        want = torch_experts.select_keys(q, c.gates, c.tokens, c.experts, c.k, c.N)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@given(case=cases())
def test_output_and_gradients_equal_plain_torch(case: dict[str, Any]) -> None:
    c = Case(case)
    got = c.run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEFT_DS_OPS", "torch")
        want = c.run()
    for a, b in zip(got[:3], want[:3], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(got[3:], want[3:], strict=True):
        c.close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_thread_equals_several_bit_for_bit(dtype: torch.dtype) -> None:
    case = dict(r=203, N=20, E=4, T=301, d=136, k=20, gate=True, padding=True, part=False, known=False, sums=False)
    c = Case({**case, "dtype": dtype, "seed": 1})
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            q = ops.expert_scores(c.x, c.store[:, :136], c.starts, c.experts, c.tokens)
            chosen = ops.select_keys(q, c.gates, c.tokens, c.experts, c.k, c.N)
            runs.append([ops.top_experts(c.p, c.E), q, *chosen, *c.run()])
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_computed_again_are_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    """Under checkpointing q comes from the fetched rows: a score just above 0 must not turn negative."""
    case = dict(r=203, N=20, E=4, T=50, d=136, k=200, gate=True, padding=False, part=False, known=False, sums=False)
    c = Case({**case, "dtype": dtype, "seed": 2})
    c.q = ops.expert_scores(c.x, c.store[:, :136], c.starts, c.experts)
    entries = ops.list_entries(c.mask, c.experts, c.slots)
    kept = [ops.expert_forward(c.x, c.bank, entries, q, c.gates, torch.empty_like(c.x), add=False) for q in (None, c.q)]
    assert torch.equal(*kept)


def test_a_token_without_selected_keys_gives_zero() -> None:
    x, bank = torch.randn(3, 5), torch.randn(0, 10)
    entries = ops.list_entries(
        torch.zeros(3, 1, 2, dtype=torch.bool), torch.zeros(3, 1, dtype=torch.int64), -torch.ones(4, 2).int()
    )
    y = torch.ones(3, 5)
    assert ops.expert_forward(x, bank, entries, None, None, y, add=False).numel() == 0
    assert not y.any()


def test_wrong_inputs_are_named() -> None:
    x, keys, starts = torch.zeros(2, 4), torch.zeros(6, 4), torch.tensor([0, 3, 6])
    with pytest.raises(ValueError, match="^experts "):
        ops.expert_scores(x, keys, starts, torch.tensor([[0], [2]]))
    with pytest.raises(ValueError, match="^keys "):
        ops.expert_scores(x, keys.half(), starts, torch.tensor([[0], [1]]))
    with pytest.raises(ValueError, match="^per_token "):
        ops.top_experts(x, 5)
    with pytest.raises(ValueError, match="^gates "):
        ops.select_keys(torch.zeros(2, 1, 3), torch.zeros(2), None, torch.tensor([[0], [1]]), 1, 2)
