# SPDX-License-Identifier: Apache-2.0
"""Which experts and keys a token uses."""

from __future__ import annotations

import pytest
import torch

from meft_ds.sparse_adapter.forward.grouping import count_pairs, sort_pairs
from meft_ds.sparse_adapter.forward.router import expert_starts
from meft_ds.sparse_adapter.forward.select import key_scores, select_keys, top_experts
from meft_ds.sparse_adapter.rows.source import DeviceRows
from tests.sparse_adapter.oracle import dense_adapter, grid, make_adapter, random_adapter, small_config

pytestmark = pytest.mark.usefixtures("ops_path")


def test_equal_logits_go_to_the_smaller_expert() -> None:
    p = torch.tensor([[0.0, 1.0, 1.0, 1.0, 2.0], [-0.0, 0.0, -1.0, -0.0, -2.0], [-1.0, -1.0, -1.0, -1.0, -1.0]])
    assert top_experts(p, 2).tolist() == [[1, 4], [0, 1], [0, 1]]


def test_equal_scores_go_to_the_smaller_key_and_zero_is_never_selected() -> None:
    q = torch.tensor([[[1.0, 2.0, 1.0], [1.0, 0.0, 1.0]], [[-1.0, 0.0, 0.0], [3.0, -0.0, 0.0]]])
    mask = select_keys(q, None, 3)
    assert mask.tolist() == [[[True, True, True], [False] * 3], [[False] * 3, [True, False, False]]]
    assert select_keys(q, torch.tensor([[-1.0, -1.0], [-1.0, 0.0]]), 3).tolist() == [
        [[False] * 3, [False] * 3],
        [[True, False, False], [False] * 3],
    ]


@pytest.mark.parametrize("seed", range(5))
def test_selected_ids_equal_sorting_in_python(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    config = small_config(rows=43, experts=7)
    adapter = make_adapter(config, grid(43, 32, generator=g), grid(7, 16, generator=g))
    x = grid(30, 16, generator=g)
    selection, _ = adapter._choose(x, adapter.router(x).detach(), None)
    _, want = dense_adapter(x, adapter.rows.master, adapter.router.weight.detach(), config)
    starts = expert_starts(43, 7)
    ids = (starts[selection.experts][..., None] + torch.arange(7)).where(selection.mask, 43).view(30, -1)
    got = torch.zeros(30, 44, dtype=torch.bool).scatter_(1, ids, True)[:, :-1]
    assert torch.equal(got, want)
    assert int(selection.active.sum()) == int(want.any(0).sum())


def test_host_and_device_selection_give_equal_ids() -> None:
    on_host, on_device = (random_adapter(small_config(selection=s)) for s in ("host", "device"))
    x, tokens = torch.randn(40, 16), torch.rand(40) < 0.8
    a, _ = on_host._choose(x, on_host.router(x).detach(), tokens)
    b, _ = on_device._choose(x, on_device.router(x).detach(), tokens)
    assert torch.equal(a.experts, b.experts) and torch.equal(a.mask, b.mask)
    assert torch.equal(a.active, b.active) and torch.equal(a.counts, b.counts)


@pytest.mark.parametrize("n_experts", [1, 7, 43, 50])
def test_slices_are_contiguous_and_differ_by_at_most_one(n_experts: int) -> None:
    sizes = expert_starts(50, n_experts).diff()
    assert sizes.sum() == 50 and sizes.max() - sizes.min() <= 1
    assert sizes.tolist() == [len(part) for part in torch.arange(50).tensor_split(n_experts)]


def test_padding_selects_nothing_and_gets_nothing() -> None:
    adapter = random_adapter(small_config())
    x = torch.randn(2, 6, 16)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    y = adapter(x, mask)
    assert not y[mask == 0].any() and y[mask == 1].abs().sum(-1).all()
    torch.testing.assert_close(y[0, 2:], adapter(x[:1, 2:])[0])


def test_a_sentence_does_not_depend_on_its_neighbours_except_in_batch_scope() -> None:
    g = torch.Generator().manual_seed(3)
    for scope in ("token", "batch"):
        config = small_config(scope=scope)
        rows, router = grid(50, 32, generator=g), grid(8, 16, generator=g)
        adapter = make_adapter(config, rows, router).eval()
        x = grid(4, 9, 16, generator=g)
        together, alone = adapter(x)[:1], adapter(x[:1])
        assert torch.equal(together, alone) == (scope == "token")


def test_candidate_scores_cover_short_slices_and_strided_keys() -> None:
    store = DeviceRows(torch.randn(11, 10))
    x, experts, starts = torch.randn(6, 5), torch.tensor([[0, 3]] * 6), expert_starts(11, 4)
    pairs = sort_pairs(experts, None, count_pairs(experts, None, 4, 6), 6)
    q = key_scores(x, store.keys_for_selection(), starts, pairs)
    torch.testing.assert_close(q[:, 0], x @ store.master[:3, :5].t())
    torch.testing.assert_close(q[:, 1, :2], x @ store.master[9:, :5].t())
    assert not q[:, 1, 2].any()
