# SPDX-License-Identifier: Apache-2.0
"""Scores of tiles against whole gradients, and that scoring changes nothing."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meft_ds.offload.model.capture import TappedLinear
from meft_ds.offload.ranks import Ranks
from meft_ds.sparse_matrix.choice import score as score_module
from meft_ds.sparse_matrix.choice.score import Scorer
from meft_ds.sparse_matrix.choice.select import weight_scores
from meft_ds.sparse_matrix.config import SparseMatrixConfig
from meft_ds.sparse_matrix.discover import find_sites
from tests.sparse_adapter.tiny import tiny_model
from tests.sparse_matrix.hand import brute_force, per_tile, scorer_of
from tests.subspace.hand import CPU
from tests.toy import batch

KINDS = ["abs_mean", "l2", "mean_abs", "paper"]
WINDOWS = [[0, 1], [2, 3], [4, 5]]


def loss_of(model: nn.Module, seed: int) -> Tensor:
    inputs = {k: t.clamp(max=60) for k, t in batch(seed).items()}
    return model(**{**inputs, "labels": torch.where(inputs["attention_mask"] == 0, -100, inputs["input_ids"])}).loss


def backward(model: nn.Module, seed: int) -> None:
    loss_of(model, seed).backward()


def score(model: nn.Module, scorer: Scorer, windows: Any = None) -> dict[str, Tensor]:
    for seeds in windows or WINDOWS:
        for seed in seeds:
            backward(model, seed)
        assert scorer.close_window()
    return scorer.scores()


def close(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].dtype == torch.float64 and found[name].shape == wanted.shape
        torch.testing.assert_close(found[name], wanted, msg=name, **{"rtol": 1e-4, "atol": 1e-7, **tolerance})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["phi3", "gpt2", "mixtral", "qwen2"])
def test_scores_are_those_of_the_whole_gradients(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused q, k, v and gate, up; [in, out] weights; experts; biases and grouped queries; ragged tiles."""
    monkeypatch.setattr(score_module, "_STRIPE", 16 * 32)  # several stripes, of different heights
    model = tiny_model(name)
    scorer, sites = scorer_of(model, kind, block_size=7)
    assert name == "mixtral" or len({role for site in sites for role in site.roles}) >= 5
    assert any(not site.tapped for site in sites) == (name == "mixtral")
    found = score(model, scorer)
    scorer.release()
    close(found, brute_force(model, sites, kind, backward, WINDOWS))
    assert scorer.windows == len(WINDOWS) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_random_and_magnitude_scores_need_no_gradient(name: str) -> None:
    model = tiny_model(name)
    sites, _ = find_sites(model, config := SparseMatrixConfig(score="magnitude", block_size=7))
    close(weight_scores(sites, config), {s.name: per_tile(s, s.weight.detach().double(), "abs_mean") for s in sites})
    state = torch.get_rng_state()
    drawn = [weight_scores(sites, SparseMatrixConfig(score="random", seed=seed, block_size=7)) for seed in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state())
    for site in sites:
        one, again, other = (scores[site.name] for scores in drawn)
        assert torch.equal(one, again) and not torch.equal(one, other) and len(one.unique()) == one.numel()


def test_kinds_differ_where_they_should() -> None:
    """Else the comparisons above could not fail."""
    model = tiny_model("gpt2")
    sites, _ = find_sites(model, SparseMatrixConfig(block_size=7))
    found = [brute_force(model, sites, kind, backward, WINDOWS) for kind in KINDS]
    for i, one in enumerate(found):
        for other in found[:i]:
            for name in one:
                assert not torch.allclose(one[name], other[name], rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_of_micro_batches_is_a_sum_and_windows_are_averaged(kind: str) -> None:
    model = tiny_model("llama")
    (four, _), (two, sites) = scorer_of(copy.deepcopy(model), kind), scorer_of(model, kind)
    assert all(isinstance(m.__dict__["forward"], TappedLinear) for m in (site.module for site in sites))
    found = score(model, two, [[0, 1], [2, 3]])
    two.release()
    four, _ = scorer_of(model, kind)
    once = score(model, four, [[0, 1, 2, 3]])
    close(once, {name: 2 * scores for name, scores in found.items()}, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_scores_in_bf16_and_under_autocast_are_close_to_those_in_fp32(kind: str, how: str) -> None:
    model = tiny_model("qwen2")
    sites, _ = find_sites(model, SparseMatrixConfig(block_size=16))
    expected = brute_force(model, sites, kind, backward, [[0, 1]])
    if how == "bf16":
        model.bfloat16()
    scorer, _ = scorer_of(model, kind, block_size=16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        losses = [loss_of(model, seed) for seed in (0, 1)]
    for loss in losses:
        loss.backward()
    assert scorer.close_window()
    for name, scores in scorer.scores().items():  # |mean| of a tile is a difference of what nearly cancels
        torch.testing.assert_close(scores, expected[name], rtol=0.1, atol=float(expected[name].max()) / 10, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_scale_does_not_matter(kind: str) -> None:
    model = tiny_model("mixtral")
    plain, _ = scorer_of(model, kind)
    expected = score(model, plain, [[0, 1]])
    plain.release()
    scaled, _ = scorer_of(model, kind)
    for seed, factor in ((0, 1024.0), (1, 1024.0)):
        scaled.begin_window(factor)
        (loss_of(model, seed) * factor).backward()
    assert scaled.close_window()
    for name, scores in scaled.scores().items():
        torch.testing.assert_close(scores, expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 1])
def test_a_window_that_is_not_finite_leaves_no_trace(kind: str, bad: float, at: int) -> None:
    model = tiny_model("mixtral")
    plain, _ = scorer_of(model, kind)
    expected = score(model, plain, [[0, 1], [2, 3]])
    plain.release()
    scorer, _ = scorer_of(model, kind)
    score(model, scorer, [[0, 1]])
    for micro in range(2):
        (loss_of(model, 7 + micro) * (bad if micro == at else 1.0)).backward()
    assert not scorer.close_window() and scorer.windows == 1
    found = score(model, scorer, [[2, 3]])
    assert scorer.windows == 2
    for name, scores in found.items():
        assert torch.equal(scores, expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_that_was_given_up_leaves_no_trace(kind: str) -> None:
    model = tiny_model("mixtral")
    plain, _ = scorer_of(model, kind)
    expected = score(model, plain, [[0, 1]])
    plain.release()
    scorer, _ = scorer_of(model, kind)
    backward(model, 9)
    scorer.drop_window()
    for name, scores in score(model, scorer, [[0, 1]]).items():
        assert torch.equal(scores, expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_resumes_to_the_same_bits_from_its_state(kind: str) -> None:
    model = tiny_model("mixtral")
    straight, _ = scorer_of(model, kind)
    score(model, straight, [[0, 1]])
    state, windows = {name: t.clone() for name, t in straight.state().items()}, straight.windows
    backward(model, 2)
    assert all(torch.equal(t, state[name]) for name, t in straight.state().items()), "open windows are not saved"
    backward(model, 3)
    straight.close_window()
    expected = straight.scores()
    straight.release()
    resumed, _ = scorer_of(model, kind)
    backward(model, 9)  # a window that was begun is given up
    resumed.load_state(state, windows)
    assert all(torch.equal(s, expected[name]) for name, s in score(model, resumed, [[2, 3]]).items())


class Outside(nn.Module):
    """A linear layer whose weight is also read past its module."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(12, 9), nn.Linear(9, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.up_proj(x))) + torch.tanh(x @ self.up_proj.weight.t()).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_from_outside_a_layers_forward_are_scored_and_do_not_stay(kind: str) -> None:
    torch.manual_seed(0)
    model = Outside()
    scorer, sites = scorer_of(model, kind, block_size=4)

    def backward(model: nn.Module, seed: int) -> None:
        model(torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))).square().mean().backward()

    for seed in (0, 1):
        backward(model, seed)
        assert model.up_proj.weight.grad is None
    assert scorer.close_window()
    if kind == "paper":  # the others score each of the two parts
        close(scorer.scores(), brute_force(model, sites, kind, backward, [[0, 1]]))


def test_scoring_keeps_neither_gradients_nor_the_model_and_a_released_scorer_hears_nothing() -> None:
    model = tiny_model("mixtral")
    forwards = {name for name, m in model.named_modules() if "forward" in m.__dict__}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    scorer, sites = scorer_of(model, "abs_mean")
    score(model, scorer)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and len(before) == len(
        model.state_dict()
    )
    expected = scorer.scores()
    scorer.release()
    assert {name for name, m in model.named_modules() if "forward" in m.__dict__} == forwards
    backward(model, 5)
    assert all(site.weight.grad is not None for site in sites)
    assert all(torch.equal(s, expected[name]) for name, s in scorer.scores().items())


def test_a_scorer_that_is_gone_leaves_a_model_that_trains() -> None:
    model = tiny_model("mixtral")
    scorer, sites = scorer_of(model, "abs_mean")
    del scorer
    gc.collect()
    backward(model, 0)
    assert all(site.weight.grad is not None for site in sites)


def test_layers_of_one_shape_share_what_sums_over_tiles() -> None:
    """One [features, tiles] matrix per weight would be as large as a few of a large model's matrices."""
    model = tiny_model("llama", num_hidden_layers=4)
    scorer, sites = scorer_of(model, "abs_mean", block_size=4)
    held = {t.untyped_storage().data_ptr(): t.numel() for pair in scorer._edges for t in pair}
    sizes = {(site.rows, site.rows[-1][1]) for site in sites} | {(site.cols, site.cols[-1][1]) for site in sites}
    assert sum(held.values()) == sum(len(cuts) * size for cuts, size in sizes)


def test_ranks_and_windows_of_nothing_are_zero() -> None:
    model = tiny_model("gpt2")
    sites, _ = find_sites(model, SparseMatrixConfig())
    scorer = Scorer(sites, "abs_mean", Ranks(), CPU)
    assert all(not scores.any() for scores in scorer.scores().values())
    assert Scorer.host_bytes(sites, "abs_mean") == 0
    assert Scorer.host_bytes(sites, "paper") == 8 * sum(site.weight.numel() for site in sites)
    scorer.release()
