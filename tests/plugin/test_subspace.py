# SPDX-License-Identifier: Apache-2.0
"""The subspace method through `deepspeed.initialize`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from meft_ds.offload.model.capture import TappedLinear
from tests.methods import differing, everything, steps
from tests.sparse_adapter.tiny import tiny_model
from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of, tiny_llama

FEW = r".*\.(q_proj|v_proj|up_proj|c_attn|c_fc|down_proj|experts)"  # what fits cost, not what they cover


def block(*, others: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return {
        "subspace": {"projectors": "learned", "nonzeros": 2, "fit_steps": 2, "refit_interval": 3, **settings},
        **(others or {}),
    }


def config(precision: str = "fp32", *, others: dict[str, Any] | None = None, gas: int = 1, **settings: Any) -> Any:
    made = ds_config(precision=precision, gas=gas, block=block(others=others, **settings))
    if precision == "fp16":
        made["fp16"] |= {"initial_scale_power": 8, "hysteresis": 1}
    return made


def subspace_units(engine: Any) -> list[Any]:
    return [unit for unit in engine.optimizer.pipeline.units if unit.wire == "subspace"]


def biases(engine: Any) -> dict[str, dict[str, float]]:
    return engine.meft_stats()["subspace"]["bias"]


# What a step computes


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2-moe"])
def test_both_sides_give_the_same_losses(name: str) -> None:
    losses = []
    for side in ("activation", "weight"):
        made = config(gradient_side=side, projectors="random", refit_interval=0, gas=2, dim=8)
        made["optimizer"]["params"]["eps"] = 1e-4  # else rounding differences of near-zero gradients become steps
        engine = make_engine(made, tiny_model(name).train())
        torch.manual_seed(3)  # dropout
        losses.append(steps(engine, range(8)))
        tapped = sum(isinstance(m.__dict__.get("forward"), TappedLinear) for m in engine.module.modules())
        assert (tapped > 0) == (side == "activation")
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("side", "rounding"), [("activation", "stochastic"), pytest.param("weight", "residual", marks=pytest.mark.slow)]
)
def test_fp16_overflow_in_any_kind_of_window_leaves_everything_as_it_was(side: str, rounding: str) -> None:
    """Before the first fit, in an ordinary window, and in one with a check; then training goes on as without it."""
    settings = dict(gradient_side=side, rounding=rounding, refit_interval=2, refit_threshold=0.0, target_modules=FEW)
    engine, twin = (make_engine(config("fp16", gas=2, **settings)) for _ in range(2))
    for step in range(3):
        before, checks = everything(engine), engine.meft_stats()["subspace"]["checks"]
        for micro in range(2):
            loss = engine(**batch(7 + micro)).loss
            engine.backward(loss * (math.inf if micro == step % 2 else 1.0))
            engine.step()
        assert engine.optimizer.overflow and engine.skipped_steps == step + 1
        assert differing(before, everything(engine)) == []
        assert engine.meft_stats()["subspace"]["checks"] - checks == (step != 1)
        for each in (engine, twin):
            each.optimizer.loss_scaler.cur_scale = 256.0
            steps(each, [step])
            assert not each.optimizer.overflow
        assert engine.meft_stats()["subspace"]["checks"] - checks == 2 * (step != 1)
        assert differing(everything(engine), everything(twin)) == []
    assert engine.optimizer.applied_steps == 3
    assert all(math.isfinite(b["held_out"]) for b in biases(engine).values())


# Checks of projectors


def test_projectors_are_fitted_before_the_first_update_and_their_bias_is_reported() -> None:
    engine = make_engine(config(fit_steps=20))
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    drawn = [side.projector for unit in subspace_units(engine) for side in unit.sides]
    assert set(map(str, biases(engine).values())) == {"{}"}
    engine.backward(engine(**batch(0)).loss)
    switched = [side.projector for unit in subspace_units(engine) for side in unit.sides]
    assert sum(a is not b for a, b in zip(drawn, switched, strict=True)) > len(drawn) / 2
    assert all(torch.equal(p, before[n]) for n, p in engine.module.named_parameters()), "no update yet"
    engine.step()
    found = biases(engine)
    assert len(found) == 14 and all(b["step"] == 0 and b["held_out"] <= b["before"] for b in found.values())
    stats = engine.meft_stats()["subspace"]
    assert stats["held_out_bias_mean"] < sum(b["before"] for b in found.values()) / 14
    assert stats["held_out_bias_max"] == max(b["held_out"] for b in found.values())
    json.dumps(engine.meft_stats())


def test_checks_follow_the_updates_of_a_run_and_of_what_resumes_it(tmp_path: Path) -> None:
    def checked(engine: Any, count: int) -> list[int]:
        found = []
        for seed in range(count):
            checks = engine.meft_stats()["subspace"]["checks"]
            steps(engine, [seed])
            found.append(engine.meft_stats()["subspace"]["checks"] - checks)
        return found

    engine = make_engine(config(target_modules=FEW))
    assert checked(engine, 5) == [1, 0, 0, 1, 0]
    assert {b["step"] for b in biases(engine).values()} == {3}
    engine.save_checkpoint(str(tmp_path))
    resumed = make_engine(config(target_modules=FEW))
    resumed.load_checkpoint(str(tmp_path))
    assert biases(resumed) == biases(engine)
    assert checked(resumed, 3) == checked(engine, 3) == [0, 1, 0]
    assert biases(resumed) == biases(engine)


def test_a_program_that_trains_in_eval_mode_gets_its_fit_too() -> None:
    engine = make_engine(config(target_modules=FEW))
    engine.eval()
    steps(engine, [0])
    assert all("fit" in b for b in biases(engine).values())


# Save and resume


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dim": 6}, "subspace.dim: checkpoint 0.5, this run 6"),
        ({"nonzeros": 3}, "subspace.nonzeros: checkpoint 2, this run 3"),
        ({"rounding": "residual"}, "subspace.rounding: checkpoint 'stochastic', this run 'residual'"),
        ({"target_modules": FEW}, "subspace.matrices: checkpoint 14, this run"),
    ],
)
def test_a_checkpoint_of_other_projectors_is_refused_naming_the_setting(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    engine = make_engine(config(projectors="random"))
    steps(engine, [0])
    engine.save_checkpoint(str(tmp_path))
    other = make_engine(config(**{"projectors": "random", **change}))
    before = everything(other)
    with pytest.raises(ValueError, match="make the settings equal") as e:
        other.load_checkpoint(str(tmp_path))
    assert expected in str(e.value) and differing(before, everything(other)) == []


def test_save_pretrained_writes_plain_weights_that_give_the_same_logits(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    engine = make_engine(config(target_modules=FEW))
    steps(engine, range(2))
    engine.module.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == set(tiny_llama().state_dict())
    assert not torch.equal(saved["model.layers.0.mlp.up_proj.weight"], tiny_llama().model.layers[0].mlp.up_proj.weight)
    engine.eval()
    plain = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(plain(**batch(3)).logits, engine(**batch(3)).logits)


# What trains


def test_everything_else_trains_uncompressed_tied_weights_too(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.layers[0].mlp.down_proj.requires_grad_(False)
    model.model.layers[1].self_attn.v_proj.weight = model.model.layers[1].self_attn.q_proj.weight
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with caplog.at_level("INFO", logger="meft_ds"):
        engine = make_engine(config(projectors="random"), model)
    (line,) = [r.getMessage() for r in caplog.records if "leaves uncompressed" in r.getMessage()]
    assert "layers.1.self_attn.v_proj.weight is tied or used by several modules" in line
    steps(engine, range(3))
    engine.meft_flush()
    compressed = {name for unit in subspace_units(engine) for name, _ in unit.params}
    assert len(compressed) == 14 - 3  # one is frozen, two are one
    assert not any("lm_head" in n or "embed" in n or "norm" in n for n in compressed)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name == "model.layers.0.mlp.down_proj.weight"), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_matrices_that_are_too_small_are_listed_and_train_densely(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="meft_ds"):
        engine = make_engine(config(dim=20, projectors="random"), tiny_model("qwen2-moe"))
    assert any("is too small for subspace.dim 20" in r.getMessage() for r in caplog.records)
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    steps(engine, range(2))
    engine.meft_flush()
    assert [n for n, p in engine.module.named_parameters() if torch.equal(p, before[n])] == []


def test_train_names_what_trains_and_freezes_the_rest() -> None:
    engine = make_engine(config(projectors="random", others={"train": [r"layers\.1\..*proj", "norm"]}))
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    steps(engine, range(2))
    engine.meft_flush()
    changed = {n for n, p in engine.module.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "norm" in n or ("layers.1." in n and "proj" in n)}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": "q_prj"}, "q_prj"),
        ({"dim": 500}, "too small for subspace.dim 500"),
    ],
)
def test_a_model_without_a_matrix_to_compress_is_refused_with_names(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as e:
        make_engine(config(**settings))
    assert expected in str(e.value)
    if "target_modules" in settings:
        assert "model.layers.0.self_attn.q_proj" in str(e.value)


# The model beside its engine


def test_reentrant_checkpoints_over_frozen_embeddings_change_nothing() -> None:
    def run(checkpoints: bool) -> dict[str, Any]:
        model = tiny_llama()
        model.model.embed_tokens.requires_grad_(False)  # under it reentrant checkpoints would see no graph
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        engine = make_engine(config("bf16", gas=2, target_modules=FEW), model)
        engine.train()
        steps(engine, range(4))
        assert all("held_out" in b for b in biases(engine).values())
        return everything(engine)

    assert differing(run(False), run(True)) == []


# Both methods


def test_both_methods_in_one_block_train_together_save_and_resume(tmp_path: Path) -> None:
    made = config("bf16", gas=2, target_modules=FEW, others={"sparse_adapter": dict(ADAPTER)})
    straight = make_engine(made)
    wires = {unit.wire for unit in straight.optimizer.pipeline.units}
    assert wires == {"rows", "dense", "subspace"}
    before = state_of(straight)
    losses = steps(straight, range(4))
    changed = set(differing(before, state_of(straight)))
    assert all(any(part in name for name in changed) for part in ("rows.master", "router", "up_proj.weight", "norm"))
    assert not any("meft_adapter" in name for unit in subspace_units(straight) for name, _ in unit.params)
    straight.save_checkpoint(str(tmp_path))
    expected = steps(straight, range(4, 7))
    resumed = make_engine(made, tiny_llama(seed=9))
    resumed.load_checkpoint(str(tmp_path))
    assert steps(resumed, range(4, 7)) == expected
    assert differing(everything(straight), everything(resumed)) == []
    stats = straight.meft_stats()
    assert stats["subspace"]["checks"] >= 2 and stats["sparse_adapter"]["active_rows"] and set(stats["bytes"]) >= wires
    assert losses != expected
