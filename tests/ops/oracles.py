# SPDX-License-Identifier: Apache-2.0
"""What the ops must compute, in the plainest torch, and random inputs for them."""

from __future__ import annotations

import dataclasses
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from meft_ds.ops.adam import AdamHyper

HYPER = AdamHyper(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


@dataclasses.dataclass
class Case:
    """One optimizer state with the gradient of some of its rows."""

    p: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ids: Tensor
    grad: Tensor
    replica: Tensor | None
    row_steps: Tensor
    row_decay: Tensor

    def copy(self) -> Case:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Case(*(v.clone() if v is not None else None for v in values))

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.p, self.exp_avg, self.exp_avg_sq

    def dense_grad(self) -> Tensor:
        dense = torch.zeros(self.p.shape, dtype=self.grad.dtype)
        dense[self.ids] = self.grad
        return dense


@st.composite
def cases(draw: st.DrawFn, moments: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> Case:
    n, w = draw(st.sampled_from([1, 2, 7, 64, 300])), draw(st.sampled_from([1, 5, 16, 33, 1000]))
    k = draw(st.sampled_from([0, 1, n // 2, n - 1, n]))
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    moment = draw(st.sampled_from(moments))
    gradient = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    replica = draw(st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]))
    p = torch.randn(n, w, generator=g)
    return Case(
        p,
        (torch.randn(n, w, generator=g) * 0.1).to(moment),
        (torch.rand(n, w, generator=g) * 0.1).to(moment),
        torch.randperm(n, generator=g)[:k].sort().values,
        torch.randn(k, w, generator=g).to(gradient),
        None if replica is None else torch.zeros(n, w, dtype=replica),
        torch.randint(0, 4, (n,), generator=g, dtype=torch.int32),
        -torch.randint(0, 3, (n,), generator=g).double() * 0.01,
    )


def adamw(p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, step: int, grad_scale: float) -> None:
    """torch.optim.AdamW's formula in float64, stored in the tensors' own dtypes."""
    lr, beta1, beta2, eps, weight_decay = dataclasses.astuple(HYPER)
    g = grad.double() * grad_scale
    m = beta1 * exp_avg.double() + (1 - beta1) * g
    v = beta2 * exp_avg_sq.double() + (1 - beta2) * g * g
    root = (v / (1 - beta2**step)).sqrt() + eps
    p.copy_(p.double() * (1 - lr * weight_decay) - lr / (1 - beta1**step) * m / root)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)


def lazy(case: Case, decay_log: float, grad_scale: float) -> None:
    for i, row in enumerate(case.ids.tolist()):
        case.p[row] = case.p[row].double() * math.exp(decay_log - float(case.row_decay[row]))
        case.row_steps[row] += 1
        state = (case.p[row], case.exp_avg[row], case.exp_avg_sq[row])
        adamw(*state, case.grad[i], int(case.row_steps[row]), grad_scale)
        case.row_decay[row] = decay_log + math.log1p(-HYPER.lr * HYPER.weight_decay)
    if case.replica is not None:
        case.replica[case.ids] = case.p[case.ids].to(case.replica.dtype)


def assert_same_state(actual: Case, expected: Case) -> None:
    torch.testing.assert_close(actual.p, expected.p, rtol=1e-6, atol=1e-6)
    # A moment that lies on a rounding boundary of bf16 may fall either way: one step of 2^-7 at most.
    rtol = 1e-6 if actual.exp_avg.dtype == torch.float32 else 2**-7
    for a, b in zip(actual.state[1:], expected.state[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6)
    assert torch.equal(actual.row_steps, expected.row_steps)
    torch.testing.assert_close(actual.row_decay, expected.row_decay, rtol=1e-12, atol=1e-15)
