# SPDX-License-Identifier: Apache-2.0
"""The plain torch path of the row optimizers: torch's fused CPU AdamW over views of runs of rows.

Rows that follow each other form one run; `p` and the moments are updated where they lie, never gathered and scattered
(measured on two cores: views 480-690 M parameters/s, gather/update/scatter 53). Only what the fused kernel cannot take
as it is (16-bit gradients and moments, a gradient scale) goes through fp32 scratch, a bounded chunk at a time.
Callers have checked the inputs.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from meft_ds.ops.pool import single_threaded_pool

# Scratch holds at most this many values, unless one row is wider.
_CHUNK = 1 << 20
_ZERO_BLOCK = 1 << 18
# Small enough for a core's own cache, because catching up, the step and the replica pass over a share in turn.
_SHARE = 1 << 18


class Hyper(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_scale: float


def adamw(
    p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, replica: Tensor | None, hyper: Hyper, step: int
) -> None:
    flat = [t.detach().reshape(-1) for t in (p, exp_avg, exp_avg_sq, grad)]
    if not p.numel():
        return
    chunk = p.numel() if exp_avg.dtype == torch.float32 and not _needs_scratch(grad, hyper) else _CHUNK
    steps = [torch.tensor(float(step))]
    for p_, m_, v_, g_ in zip(*(t.split(chunk) for t in flat), strict=True):
        _update(_Runs([p_], [m_], [v_], [_usable(g_, hyper)], steps, [], []), hyper)
    if replica is not None:
        replica.copy_(p)


def adamw_rows(
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ids: Tensor,
    grad: Tensor,
    replica: Tensor | None,
    hyper: Hyper,
    step: int,
) -> None:
    rows, width = p.shape
    if not p.numel():
        return
    gap_rows = max(1, min(rows, _ZERO_BLOCK // width))
    zeros = p.new_zeros(gap_rows, width, requires_grad=False)
    step_tensor = torch.tensor(float(step))
    team = _Team(hyper)
    done = 0
    for begin, end in _chunks(ids.numel(), width):
        grads = _usable(grad[begin:end], hyper)
        starts, lengths, _ = _runs(ids[begin:end])
        sizes: list[int] = []
        pieces: list[Tensor] = []
        at = done
        for start, length, run_grad in zip(starts, lengths, grads.split(lengths), strict=True):
            _add_zeros(start - at, zeros, sizes, pieces)
            sizes.append(length)
            pieces.append(run_grad)
            at = start + length
        if end == ids.numel():
            _add_zeros(rows - at, zeros, sizes, pieces)
            at = rows
        p_, m_, v_ = (t[done:at].split(sizes) for t in (p, exp_avg, exp_avg_sq))
        team.run(_Runs(p_, m_, v_, pieces, [step_tensor] * len(sizes), [], []))
        done = at
    team.finish()
    if replica is not None:
        replica.copy_(p)


def adamw_lazy_rows(
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_steps: Tensor,
    row_decay: Tensor,
    ids: Tensor,
    grad: Tensor,
    replica: Tensor | None,
    hyper: Hyper,
    decay_log: float,
) -> None:
    if not grad.numel():
        return
    steps = row_steps.index_select(0, ids) + 1
    catch_up = torch.exp(decay_log - row_decay.index_select(0, ids))
    asleep = bool((catch_up != 1.0).any())
    team = _Team(hyper)
    for begin, end in _chunks(ids.numel(), p.shape[1]):
        starts, lengths, heads = _runs(ids[begin:end], steps[begin:end], catch_up[begin:end])
        p_, m_, v_ = (_pick(t, starts, lengths) for t in (p, exp_avg, exp_avg_sq))
        grads = _usable(grad[begin:end], hyper).split(lengths)
        run_steps = steps[begin:end][heads].float().unbind(0)
        factors = catch_up[begin:end][heads].tolist() if asleep else []
        replicas = () if replica is None else _pick(replica, starts, lengths)
        team.run(_Runs(p_, m_, v_, grads, run_steps, factors, replicas))
    team.finish()
    row_steps.index_copy_(0, ids, steps)
    row_decay.index_fill_(0, ids, decay_log + math.log1p(-hyper.lr * hyper.weight_decay))


class _Runs(NamedTuple):
    """Lists with one entry per run of rows; `catch_up` (factors on p before the step) and `replica` may be empty."""

    p: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]
    grads: Sequence[Tensor]
    steps: Sequence[Tensor]
    catch_up: Sequence[float]
    replica: Sequence[Tensor]

    def share(self, i: int, shares: int) -> _Runs:
        p, exp_avg, exp_avg_sq, grads, steps, catch_up, replica = self
        s = slice(i, None, shares)
        return _Runs(p[s], exp_avg[s], exp_avg_sq[s], grads[s], steps[s], catch_up[s], replica[s])


class _Team:
    """Hands runs to threads that each use one core, while the caller prepares the next ones.

    torch would instead split every single run over its threads, thousands of times per call (on a busy machine slower
    by a factor of over 100). A list of one run is a whole tensor and is left to torch.
    """

    def __init__(self, hyper: Hyper) -> None:
        self._hyper = hyper
        self._threads = torch.get_num_threads()
        self._jobs: deque[Future[None]] = deque()

    def run(self, runs: _Runs) -> None:
        if len(runs.p) == 1:
            _update(runs, self._hyper)
            return
        shares = sum(t.numel() for t in runs.p) // _SHARE + 1
        for i in range(shares):
            if self._threads == 1:
                _update(runs.share(i, shares), self._hyper)
            else:
                pool = single_threaded_pool(os.getpid(), self._threads)
                self._jobs.append(pool.submit(_update, runs.share(i, shares), self._hyper))
        # Bounds the scratch memory that waiting shares hold on to.
        while len(self._jobs) > 2 * shares + self._threads:
            self._jobs.popleft().result()

    def finish(self) -> None:
        while self._jobs:
            self._jobs.popleft().result()


@torch.no_grad()
def _update(runs: _Runs, hyper: Hyper) -> None:
    """torch's fused AdamW over lists of views; bf16 moments are widened for the step and rounded back."""
    if not runs.p:
        return
    if runs.catch_up:
        torch._foreach_mul_(list(runs.p), list(runs.catch_up))
    narrow = runs.exp_avg[0].dtype != torch.float32
    means = [t.float() for t in runs.exp_avg] if narrow else list(runs.exp_avg)
    squares = [t.float() for t in runs.exp_avg_sq] if narrow else list(runs.exp_avg_sq)
    torch._fused_adamw_(
        list(runs.p),
        list(runs.grads),
        means,
        squares,
        [],
        list(runs.steps),
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=False,
    )
    if narrow:
        torch._foreach_copy_(list(runs.exp_avg), means)
        torch._foreach_copy_(list(runs.exp_avg_sq), squares)
    if runs.replica:
        torch._foreach_copy_(list(runs.replica), list(runs.p))


def _needs_scratch(grad: Tensor, hyper: Hyper) -> bool:
    return grad.dtype != torch.float32 or hyper.grad_scale != 1.0


def _usable(grad: Tensor, hyper: Hyper) -> Tensor:
    """The gradient in fp32 and scaled; the caller's own tensor is never written."""
    if not _needs_scratch(grad, hyper):
        return grad.detach()
    return grad.detach().to(torch.float32, copy=True).mul_(hyper.grad_scale)


def _chunks(k: int, width: int) -> list[tuple[int, int]]:
    """Pieces of a list of k ids; no ids make one empty piece."""
    rows = max(1, _CHUNK // width)
    return [(begin, min(k, begin + rows)) for begin in range(0, max(k, 1), rows)]


def _runs(ids: Tensor, *same: Tensor) -> tuple[list[int], list[int], Tensor]:
    """Runs of ids that follow each other and agree in `same`: first ids, lengths, and where in `ids` they begin."""
    if not ids.numel():
        return [], [], ids
    breaks = ids[1:] != ids[:-1] + 1
    for values in same:
        breaks |= values[1:] != values[:-1]
    heads = torch.cat([ids.new_zeros(1), breaks.nonzero().flatten() + 1])
    lengths = torch.diff(heads, append=heads.new_tensor([ids.numel()]))
    return ids[heads].tolist(), lengths.tolist(), heads


def _pick(t: Tensor, starts: list[int], lengths: list[int]) -> Sequence[Tensor]:
    """Views of the runs, cut out in one call together with the gaps between them: cheaper than one slice per run."""
    sizes = []
    at = starts[0]
    for start, length in zip(starts, lengths, strict=True):
        sizes += [start - at, length]
        at = start + length
    return t[starts[0] : at].split(sizes)[1::2]


def _add_zeros(rows: int, zeros: Tensor, sizes: list[int], pieces: list[Tensor]) -> None:
    """Adds a gap of `rows` rows whose gradient is zero, in pieces no longer than the shared block of zeros."""
    while rows > 0:
        length = min(rows, zeros.shape[0])
        sizes.append(length)
        pieces.append(zeros[:length])
        rows -= length
