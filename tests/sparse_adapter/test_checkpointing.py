# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing: the first forward's selection is used again, gradients are unchanged, nothing leaks."""

from __future__ import annotations

import gc
from collections.abc import Callable

import deepspeed
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meft_ds.sparse_adapter.forward import recompute
from tests.sparse_adapter.oracle import random_adapter, rows_grad, small_config

pytestmark = pytest.mark.usefixtures("ops_path")

Run = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def _deepspeed(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return deepspeed.checkpointing.checkpoint(f, x)


RUNS: dict[str, Run] = {
    "plain": lambda f, x: f(x),
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "non-reentrant": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "deepspeed": _deepspeed,
}
CHECKPOINTS = ["reentrant", "non-reentrant", "deepspeed"]


class Net(nn.Module):
    """Two checkpointed segments of two adapters each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.ModuleList(nn.Linear(16, 16) for _ in range(4)).requires_grad_(False)
        self.adapters = nn.ModuleList(random_adapter(small_config(), seed=s) for s in range(4))

    def segment(self, first: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for i in (first, first + 1):
                h = torch.nn.functional.dropout(self.mix[i](x), 0.1, self.training)
                x = x + 0.1 * self.adapters[i](h.tanh())
            return x

        return run

    def forward(self, x: Tensor, run: Run) -> Tensor:
        return run(self.segment(2), run(self.segment(0), x))

    def gradients(self) -> list[Tensor]:
        return [g for a in self.adapters for g in (a.router.weight.grad, rows_grad(a))]


def _train(kind: str, inputs: list[Tensor]) -> tuple[Net, list[Tensor]]:
    net = Net()
    torch.manual_seed(1)
    inputs = [x.clone().requires_grad_() for x in inputs]
    sum(net(x, RUNS[kind]).square().sum() for x in inputs).backward()
    return net, net.gradients() + [x.grad for x in inputs]


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("forwards", [1, 3])
def test_gradients_equal_those_without_checkpointing(kind: str, forwards: int) -> None:
    inputs = [torch.randn(2, 9, 16) for _ in range(forwards)]
    _, want = _train("plain", inputs)
    net, got = _train(kind, inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    gc.collect()
    assert [len(a._replay) for a in net.adapters] == [0] * 4


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_selection_is_made_once_per_forward_and_matched_to_its_own_input(kind: str) -> None:
    net = Net().eval()
    net.adapters.train()
    made: list[int] = []
    seen: dict[int, list[tuple[float, int]]] = {}
    for i, adapter in enumerate(net.adapters):
        choose = adapter._choose
        adapter._choose = lambda *a, choose=choose, i=i: (made.append(i), choose(*a))[1]
        select = adapter._select

        def spy(x: Tensor, *rest: object, select=select, i=i):
            selection, scores = select(x, *rest)
            seen.setdefault(i, []).append((float(x.sum()), id(selection.mask)))
            return selection, scores

        adapter._select = spy
    inputs = [torch.randn(2, 9, 16).requires_grad_() for _ in range(3)]
    losses = [net(x, RUNS[kind]).square().sum() for x in inputs]
    for order in (1, 0, 2):  # backward in another order than forward
        losses[order].backward()
    assert len(made) == 3 * 4
    for pairs in seen.values():
        first, again = dict(pairs[:3]), dict(pairs[3:])
        assert first == again and len(again) == 3


def test_a_checkpoint_inside_a_checkpoint_chooses_once() -> None:
    net = Net().eval()
    made: list[int] = []
    for adapter in net.adapters:
        choose = adapter._choose
        adapter._choose = lambda *a, choose=choose: (made.append(1), choose(*a))[1]
    inner = RUNS["reentrant"]
    inner(lambda x: net(x, inner), torch.randn(3, 16).requires_grad_()).sum().backward()
    assert len(made) == 4 and all(rows_grad(a).any() for a in net.adapters)
    assert [len(a._replay) for a in net.adapters] == [0] * 4


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_without_grad_saves_and_records_nothing_in_either_mode(training: bool) -> None:
    net = Net().train(training)
    for adapter in net.adapters:
        adapter.rows.record = lambda *_: pytest.fail("recorded")
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            net(torch.randn(3, 16), RUNS["plain"])
    assert [len(a._replay) for a in net.adapters] == [0] * 4


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpointed_forwards_are_recorded_once(kind: str) -> None:
    net = Net()
    count: list[int] = []
    for adapter in net.adapters:
        adapter.rows.record = lambda *_: count.append(1)
    net(torch.randn(3, 16).requires_grad_(), RUNS[kind]).sum().backward()
    assert len(count) == 4


def test_end_window_forgets_and_forwards_without_backward_stay_bounded(caplog: pytest.LogCaptureFixture) -> None:
    adapter = random_adapter(small_config())
    for _ in range(recompute._MOST_PENDING + 5):
        checkpoint(adapter, torch.randn(2, 16, requires_grad=True), use_reentrant=True)
    assert len(adapter._replay) == recompute._MOST_PENDING
    assert sum("without a backward" in r.message for r in caplog.records) == 1
    adapter.end_window()
    assert len(adapter._replay) == 0
    for _ in range(5):
        adapter(torch.randn(2, 16))  # with grad: owned by a graph that is gone at once
    gc.collect()
    assert len(adapter._replay) == 0


def test_a_selection_that_waits_for_recomputation_holds_no_index_arrays() -> None:
    adapter = random_adapter(small_config())
    checkpoint(adapter, torch.randn(4, 16, requires_grad=True), use_reentrant=True)
    (entry,) = adapter._replay._pending
    assert entry.strong is not None and entry.strong.plan is None
