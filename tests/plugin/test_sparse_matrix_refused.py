# SPDX-License-Identifier: Apache-2.0
"""Sparse matrix tuning: what a run leaves out is told or refused; scores go on only as they began."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.plugin.tiles import SCORED, config, differing, everything, method_of, steps
from tests.toy import batch, make_engine, tiny_llama


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **kwargs: Any) -> Any:
        return self.inner(**kwargs)


# Which weights


def test_peft_layers_are_refused_with_what_to_do() -> None:
    peft = pytest.importorskip("peft")
    made = peft.LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny_llama(), made)
    with pytest.raises(ValueError, match=r"PEFT has frozen them \(.*q_proj is a PEFT layer\).*merge_and_unload"):
        make_engine(config(), model)
    engine = make_engine(config(), model.merge_and_unload().requires_grad_(True))
    steps(engine, range(SCORED + 1))
    assert len(method_of(engine).choice.tiles) == 11


@pytest.mark.parametrize("block", ["sparse_matrix", "subspace"])
def test_the_head_of_a_wrapped_model_is_found(block: str) -> None:
    made = config(density=1.0, score="random")
    if block == "subspace":
        made["meft_offload"] = {"subspace": {"dim": 8, "nonzeros": 2}}
    engine = make_engine(made, Wrapped(tiny_llama()))
    (method,) = engine._meft_methods
    found = method.choice.shapes if block == "sparse_matrix" else [m.name for u in method._units for m in u.matrices]
    assert len(found) == 14 and not any("lm_head" in name for name in found)


def test_what_is_left_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    layers = model.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    caplog.set_level(logging.INFO, "meft_ds")
    make_engine(config(target_modules=["lm_head", ".*_proj"], others={"train": ["k_proj"]}), model)
    (line,) = [r.getMessage() for r in caplog.records if "leaves out" in r.getMessage()]
    for expected in (
        "lm_head.weight is the output head",
        "model.layers.0.self_attn.q_proj.weight is tied",
        "model.layers.1.self_attn.k_proj.weight trains whole (meft_offload.train)",
    ):
        assert expected in line


def test_lines_about_what_is_left_out_are_shown_without_any_setting_of_logging(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = logging.getLogger("meft_ds")
    log.setLevel(logging.NOTSET)
    make_engine(config(others={"train": ["k_proj"]}))
    assert any("leaves out" in record.getMessage() for record in caplog.records)


def test_a_share_for_a_role_that_has_no_tiles_is_refused() -> None:
    made = config(budget={"q": 0.5, "v": 0.5}, others={"train": ["q_proj"]})
    del made["meft_offload"]["sparse_matrix"]["density"]
    with pytest.raises(ValueError, match=r"budget gives q a share.*q_proj.weight trains whole.*Take it out of budget"):
        make_engine(made)


def test_weights_that_the_optimizer_does_not_hold_have_no_tiles() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.model.layers[1].parameters(), lr=1e-2)
    made = config(density=1.0, score="random")
    del made["optimizer"]
    engine = make_engine(made, model, optimizer=optimizer)
    assert {tile.layer for tile in method_of(engine).choice.tiles} == {1}
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.model.norm.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="no weight left .* belongs to no parameter group of the optimizer"):
        make_engine(made, model, optimizer=optimizer)


def test_tiles_that_no_gradient_reached_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    kept = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: kept(x.detach()).detach() * 0 + x
    engine = make_engine(config(density=0.5, budget="per_module"), model)
    steps(engine, range(SCORED))
    lines = [r.getMessage() for r in caplog.records if "no gradient reached" in r.getMessage()]
    assert len(lines) == 1 and "model.layers.0.mlp.up_proj.weight" in lines[0] and "layers.1" not in lines[0]


# Files and checkpoints


def test_a_choice_file_that_cannot_be_written_is_refused_before_scoring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "tiles.json", tmp_path):
        with pytest.raises(ValueError, match="choice_out: cannot write"):
            make_engine(config(choice_out=str(path)))
    steps(make_engine(config(choice_out=str(tmp_path / "deep" / "tiles.json"))), range(1))
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"score": "l2"}, {"score": "abs_mean"}, r"sparse_matrix.score 'l2' was taken, this run has 'abs_mean'"),
        ({"score": "abs_mean"}, {"score": "paper"}, r"'abs_mean' was taken, this run has 'paper'"),
        ({"block_size": 16}, {"block_size": 8}, "other tiles were scored; make sparse_matrix.block_size"),
        ({"block_size": 8}, {"block_size": 16}, "other tiles were scored"),
        ({"target_modules": [".*q_proj"]}, {}, "other tiles were scored"),
        ({}, {"others": {"train": ["q_proj"]}}, "."),
    ],
)
def test_scores_go_on_only_with_the_settings_that_they_began_with(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], expected: str
) -> None:
    first = make_engine(config(**before))
    steps(first, range(1))
    first.save_checkpoint(str(tmp_path))
    other = make_engine(config(**after), tiny_llama(seed=9))
    was = everything(other)
    with pytest.raises(ValueError, match=expected):
        other.load_checkpoint(str(tmp_path))
    assert method_of(other)._scorer.windows == 0 and differing(was, everything(other)) == []


def test_a_checkpoint_of_the_scoring_phase_says_where_it_can_be_loaded(tmp_path: Path) -> None:
    engine = make_engine(config())
    steps(engine, range(1))
    engine.save_checkpoint(str(tmp_path))
    steps(engine, range(1, SCORED + 1))
    before = everything(engine)
    with pytest.raises(ValueError, match="while sparse_matrix scored tiles .* load it into a new engine"):
        engine.load_checkpoint(str(tmp_path))
    assert differing(before, everything(engine)) == []
    engine.backward(engine(**batch(7)).loss)
    engine.step()
