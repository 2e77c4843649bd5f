# SPDX-License-Identifier: Apache-2.0
"""Learning projectors: the bias of a pair (P, Q) on a gradient G, a fit of its values, a transport of Adam's moments.

    b = ||P P^T G Q Q^T - G||_F / ||G||_F                               (LSP-Offload, arXiv 2406.10181, eq. 2)

Positions never change, columns keep length 1. Nothing here makes an m x n temporary or a dense product with G: with
S = P^T G Q the residual's norm is ||G||^2 - 2 <S, S> + <P^T P S Q^T Q, S>, and its gradient needs G Q and P^T G only.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from meft_ds import ops
from meft_ds.ops.projector import Projector, overlap

_BETAS = (0.9, 0.9)
"""Of the fit: 0.99 and 0.999 need more steps for the same bias (measured)."""
_RIDGE = 1e-4
"""Ridge of the transport's solve, relative to the mean diagonal of P_old^T P_old."""


@dataclass(frozen=True)
class Fit:
    """What `fit` found.

    Attributes:
        p, q: the best pair seen.
        steps: Adam steps taken; the best pair may be from before the last one.
        start: relative bias of the given pair on the gradient; nan if the gradient is not finite.
        bias: relative bias of (p, q), never above `start`.
        timed_out: the deadline ended the fit before its last step.
    """

    p: Projector
    q: Projector
    steps: int
    start: float
    bias: float
    timed_out: bool = False


def relative_bias(s: Tensor, sq_norm_g: float | Tensor, gram_p: Tensor, gram_q: Tensor) -> float:
    """Return b from S = P^T G Q [d1, d2], ||G||_F^2, P^T P [d1, d1] and Q^T Q [d2, d2]; float64 arithmetic.

    With data parallel ranks S and ||G|| are those of the reduced gradient. G = 0 has bias 0, a non-finite G has nan.
    """
    s = s.double()
    return _relative((s * s).sum(), ((gram_p.double() @ s) * (s @ gram_q.double())).sum(), float(sq_norm_g))


def bias_of(g: Tensor, p: Projector, q: Projector) -> float:
    """Return b of a gradient [m, n], fp32 or bf16, by sparse products."""
    g = g.contiguous()
    norm = _norm(g)
    if norm == 0.0 or not math.isfinite(norm):
        return norm * 0.0
    return _Bias(g, norm, p, q, ops.sketch(g, *q.columns, torch.float32)).value


def fit(
    g: Tensor,
    p: Projector,
    q: Projector,
    *,
    steps: int = 50,
    lr: float = 0.5,
    fix_q: bool = False,
    deadline: float | None = None,
) -> Fit:
    """Minimise b over the values of P and Q with Adam; the same inputs give the same bits on a CPU.

    The gradient is taken at the fp16 values that the kernels use and applied to fp32 ones, so the bias reported is that
    of the projectors returned; with fp32 values throughout it comes out the same to 1e-5. A gradient that is 0 or not
    finite returns the pair given.

    The defaults are measured, on gradients of a small Llama; an lr that falls over the steps came out worse.

    Args:
        g: [m, n], fp32 or bf16.
        steps: Adam steps; each reads g twice (not at all with `fix_q`).
        lr: length of a step relative to the RMS of the values, sqrt(d / (m k)).
        fix_q: leave Q as it is (layers that share one input share Q).
        deadline: time.monotonic() after which no step begins.
    """
    g = g.contiguous()
    norm = _norm(g)
    if norm == 0.0 or not math.isfinite(norm):
        return Fit(p, q, 0, norm * 0.0, norm * 0.0)
    left, right = _Values(p), _Values(q)
    gq = ops.sketch(g, *q.columns, torch.float32)
    now = _Bias(g, norm, p, q, gq)
    best = start = now.value
    best_p, best_q, done = p, q, 0
    while done < steps and math.isfinite(now.value):
        if deadline is not None and time.monotonic() >= deadline:
            return Fit(best_p, best_q, done, start, best, timed_out=True)
        done += 1
        grad_p, grad_q = now.gradient_p(), None if fix_q else now.gradient_q()
        p = left.step(grad_p, lr, done)
        if grad_q is not None:
            q = right.step(grad_q, lr, done)
            gq = ops.sketch(g, *q.columns, torch.float32)
        now = _Bias(g, norm, p, q, gq)
        if now.value < best:
            best, best_p, best_q = now.value, p, q
    return Fit(best_p, best_q, done, start, best)


def transport(
    m: Tensor, v: Tensor, p_old: Projector, p_new: Projector, q_old: Projector, q_new: Projector
) -> tuple[Tensor, Tensor]:
    """Carry Adam's moments [d1, d2] of S = P_old^T G Q_old over to P_new^T G Q_new; keep their dtypes.

    M <- A M B^T, where A = (P_new^T P_old)(P_old^T P_old)^-1: what the new pair would have seen of the part of the
    gradients that lay in the old subspace, exactly; the rest has no history and counts as 0.

    V <- (A*A) V (B*B)^T with the rows of A*A and B*B scaled to sum 1. An entry of V is a mean square along a direction
    of unit length, and so is its successor, hence a mean of the old ones: a new direction is taken to carry outside
    the old subspace what it carries inside. Without the scaling V shrinks with the overlap (10x at d = m / 4) or
    explodes with the condition of P_old^T P_old (26x at d = 7/8 m), and the steps after a refit are too long or too
    short for about 1 / (1 - beta2) steps.

    On the same subspace (columns permuted, signs flipped) both are the identity, permuted and flipped.
    """
    a, b = _coordinates(p_new, p_old), _coordinates(q_new, q_old)
    moved_m = a @ m.float() @ b.T
    moved_v = _shares(a, p_new) @ v.float() @ _shares(b, q_new).T
    return moved_m.to(m.dtype), moved_v.to(v.dtype)


class _Bias:
    """b at one pair, and what its gradient shares with it. Everything is in units of ||G||."""

    def __init__(self, g: Tensor, norm: float, p: Projector, q: Projector, gq: Tensor) -> None:
        self.g, self.norm, self.p, self.q, self.gq = g, norm, p, q, gq
        self.s = ops.combine(gq, *p.columns).div_(norm)
        self.gram_s = ops.combine(ops.combine(self.s, *p.rows), *p.columns)  # P^T P S
        self.s_gram = ops.sketch(ops.sketch(self.s, *q.rows), *q.columns)  # S Q^T Q
        inner = (self.gram_s.double() * self.s_gram.double()).sum()
        self.value = _relative(self.s.double().square().sum(), inner, 1.0)

    def gradient_p(self) -> Tensor:
        """Return d b^2 / d values of P, fp32 [m, k].

        With b^2 = 1 - 2 <S, S> + <P^T P S Q^T Q, S>: (G Q) D^T + 2 P (S Q^T Q) S^T, read at the nonzeros only, where
        D = d b^2 / d S = 2 P^T P S Q^T Q - 4 S.
        """
        p_s_gram = ops.combine(self.s_gram, *self.p.rows)
        d = ops.combine(p_s_gram, *self.p.columns).mul_(2).sub_(self.s, alpha=4)
        at = self.p.positions
        return _sampled(self.gq, d, at).div_(self.norm).add_(_sampled(p_s_gram, self.s, at), alpha=2)

    def gradient_q(self) -> Tensor:
        """Return d b^2 / d values of Q, fp32 [n, k]: (P^T G)^T D + 2 Q (S^T P^T P) S at the nonzeros."""
        gram_s_q = ops.sketch(self.gram_s, *self.q.rows)
        d = ops.sketch(gram_s_q, *self.q.columns).mul_(2).sub_(self.s, alpha=4)
        at = self.q.positions
        ptg = ops.combine(self.g, *self.p.columns)
        return _sampled(ptg.T, d.T, at).div_(self.norm).add_(_sampled(gram_s_q.T, self.s.T, at), alpha=2)


class _Values:
    """fp32 values of a projector under Adam; columns keep length 1."""

    def __init__(self, projector: Projector) -> None:
        self.projector = projector
        self.at, self.value = projector.positions, projector.row_value.float()
        self.mean, self.square = torch.zeros_like(self.value), torch.zeros_like(self.value)
        self.unit = math.sqrt(projector.dim / self.value.numel())

    def step(self, grad: Tensor, lr: float, t: int) -> Projector:
        """Take one step. grad is of the values as they are; drop its part along each column (the length)."""
        p = self.projector
        grad = grad - self.value * p.column_sums(grad * self.value)[self.at]
        self.mean.lerp_(grad, 1 - _BETAS[0])
        self.square.lerp_(grad.square(), 1 - _BETAS[1])
        scale = (self.square / (1 - _BETAS[1] ** t)).sqrt_().add_(1e-12)
        moved = self.value - lr * self.unit / (1 - _BETAS[0] ** t) * self.mean / scale
        self.value = p.normalised(moved)
        return p.with_values(self.value)


def _coordinates(new: Projector, old: Projector) -> Tensor:
    """Return A = (P_new^T P_old)(P_old^T P_old)^-1, float32 [d_new, d_old]; solved in float64.

    With ridge r and one step of refinement (iterated Tikhonov) a direction of eigenvalue e is off by (r / (e + r))^2,
    1e-6 at e = 0.1, and none is amplified by more than about 0.8 / sqrt(r).
    """
    gram, cross = overlap(old, old), overlap(old, new)
    ridged = gram.clone()
    ridged.diagonal().add_(_RIDGE * float(gram.diagonal().mean()))
    factor = torch.linalg.cholesky(ridged)
    first = torch.cholesky_solve(cross, factor)
    return (first + torch.cholesky_solve(cross - gram @ first, factor)).T.float()


def _shares(a: Tensor, new: Projector) -> Tensor:
    """A*A with rows of sum 1; a column that does not meet the old subspace takes the mean of all, an empty one none."""
    square = a.square()
    total = square.sum(1, keepdim=True)
    shares = torch.where(total > 0, square / total, torch.full_like(square, 1 / a.shape[1]))
    return shares * (new.columns[1] != 0).any(1, keepdim=True)


def _sampled(u: Tensor, v: Tensor, at: Tensor) -> Tensor:
    """Return (u v^T)[i, at[i, c]], [m, k], for u [m, d] and v [d_v, d]."""
    u, v = u.contiguous(), v.contiguous()
    return torch.stack([(u * v.index_select(0, at[:, c])).sum(1) for c in range(at.shape[1])], 1)


def _relative(sq_s: Tensor, inner: Tensor, sq_norm_g: float) -> float:
    """Return sqrt((||G||^2 - 2 <S, S> + inner) / ||G||^2); rounding can make the residual a little negative."""
    if sq_norm_g == 0.0 or not math.isfinite(sq_norm_g):
        return sq_norm_g * 0.0
    square = 1.0 + (float(inner) - 2.0 * float(sq_s)) / sq_norm_g
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.nan


def _norm(g: Tensor) -> float:
    return float(torch.linalg.vector_norm(g, dtype=torch.float64))
