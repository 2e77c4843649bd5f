# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Trainer under ZeRO-3: from_pretrained in parts, save_model whole, resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import meft_ds
from tests.e2e import programs
from tests.e2e.test_trainer import run
from tests.forked import Forge
from tests.toy import ADAPTER, batch, tiny_llama

METHODS: dict[str, dict[str, Any]] = {
    "adapter": {"sparse_adapter": dict(ADAPTER), "train": ["norm"]},
    # learned ones amplify rounding: stage 2 against itself, weights changed by 1e-7, differs by as much
    "subspace": {"subspace": {"nonzeros": 2, "projectors": "random"}},
    "tiles": {"sparse_matrix": {"density": 0.2, "block_size": 6, "warmup_steps": 2}},
}


def config_file(folder: Path, method: str, *, stage: int = 3, gather: bool = True, precision: str = "fp32") -> str:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = gather
        zero["stage3_param_persistence_threshold"] = 20
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": "auto", "weight_decay": "auto"}},
        "meft_offload": METHODS[method],
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": "auto"}
    path = folder / f"{method}{stage}{gather}.json"
    path.write_text(json.dumps(config))
    return str(path)


def train(forge: Forge, folder: Path, config: str, **settings: Any) -> dict[str, Any]:
    base = folder.parent / "base"
    if not base.exists():
        tiny_llama().save_pretrained(base)
    return run(forge, programs.train_in_parts, folder, world=2, config=config, base=str(base), **settings)


def plain_logits(folder: Path) -> torch.Tensor:
    """Of what save_model wrote, loaded without DeepSpeed."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder / "final", output_loading_info=True, attn_implementation="eager", dtype="auto"
    )
    assert not info["unexpected_keys"] and not info["missing_keys"]
    if (folder / "final" / "meft_adapter.json").exists():
        meft_ds.load_adapter(model, folder / "final")
    with torch.no_grad():
        return model.eval()(**{k: t[:2] for k, t in batch(0, rows=32).items() if k != "labels"}).logits


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_trainer_trains_a_model_in_parts_as_a_whole_one_and_saves_complete_weights(
    forge: Forge, tmp_path: Path, method: str
) -> None:
    found = train(forge, tmp_path / "a", config_file(tmp_path, method))
    assert found["parts"] and found["engine"] == "MeftEngine"
    saved = load_file(tmp_path / "a" / "final" / "model.safetensors")
    assert {k: t.shape for k, t in saved.items()} == {k: t.shape for k, t in tiny_llama().state_dict().items()}
    assert (tmp_path / "a" / "final" / "meft_adapter.json").exists() == (method == "adapter")
    torch.testing.assert_close(plain_logits(tmp_path / "a"), torch.load(tmp_path / "a" / "logits.pt"))
    assert any(not torch.equal(saved[name], t) for name, t in tiny_llama().state_dict().items())

    whole = train(forge, tmp_path / "b", config_file(tmp_path, method, stage=2))
    assert not whole["parts"]
    for name in ("loss", "eval_loss", "grad_norm"):
        assert found[name] == pytest.approx(whole[name], abs=2e-4), name  # logs are rounded to four digits


@pytest.mark.long
@pytest.mark.compat
@pytest.mark.parametrize("method", ["adapter", "tiles"])
def test_trainer_resumes_bit_identically_in_bf16(forge: Forge, tmp_path: Path, method: str) -> None:
    config = config_file(tmp_path, method, precision="bf16")
    straight = train(forge, tmp_path / "a", config)
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    resumed = train(forge, tmp_path / "b", config, resume=True)
    assert resumed["loss"] == straight["loss"] and resumed["grad_norm"] == straight["grad_norm"]
    assert torch.equal(torch.load(tmp_path / "a" / "logits.pt"), torch.load(tmp_path / "b" / "logits.pt"))


@pytest.mark.long
def test_without_gathering_save_model_writes_a_checkpoint_instead_and_nobody_hangs(
    forge: Forge, tmp_path: Path
) -> None:
    train(forge, tmp_path / "a", config_file(tmp_path, "adapter", gather=False))
    final = tmp_path / "a" / "final"
    assert not (final / "model.safetensors").exists() and not (final / "meft_adapter.json").exists()
    states = list(final.glob("global_step*/mp_rank_00_model_states.pt"))
    assert len(states) == 1
    whole = torch.load(states[0], weights_only=False)["module"]
    assert whole["lm_head.weight"].shape == tiny_llama().lm_head.weight.shape
