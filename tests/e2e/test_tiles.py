# SPDX-License-Identifier: Apache-2.0
"""Sparse matrix tuning in Hugging Face Trainer programs."""

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
from tests.e2e.test_trainer import config_file, run
from tests.forked import Forge
from tests.toy import batch, tiny_llama

SCORED = 2


def config(folder: Path, **settings: Any) -> str:
    # without an optimizer in the file the program's own is used, and its linear schedule
    settings = {"density": 0.2, "budget": "per_module", "block_size": 6, "warmup_steps": SCORED, **settings}
    return str(config_file(folder, block={"sparse_matrix": settings}, optimizer=False))


def train(forge: Forge, folder: Path, config: str, **settings: Any) -> dict[str, Any]:
    return run(forge, programs.train, folder, config=config, steps=9, **settings)


@pytest.fixture(scope="module")
def straight(forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """What a whole run of 9 steps returned, its folder and its config."""
    folder = tmp_path_factory.mktemp("straight")
    path = config(folder)
    return train(forge, folder / "run", path, watch=True), folder / "run", path


def exported(folder: Path) -> tuple[Any, Any]:
    """The model as plain transformers loads it, and its logits where the program took them."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder / "final", output_loading_info=True, attn_implementation="eager", dtype="auto"
    )
    assert not info["unexpected_keys"] and not info["missing_keys"]
    with torch.no_grad():
        return model, model.eval()(**{k: t[:2] for k, t in batch(0, rows=32).items() if k != "labels"}).logits


@pytest.mark.compat
def test_scoring_steps_train_nothing_and_the_learning_rate_schedule_starts_after_them(straight: Any) -> None:
    found = straight[0]
    # the first learning rate of the schedule is 0: its update changes nothing either
    assert found["digests"][:SCORED] == [found["digests"][0]] * SCORED and len(set(found["digests"])) == 7
    assert found["rates"] == pytest.approx([0.0] * SCORED + [0.01 * k / 8 for k in (0, 8, 7, 6, 5, 4, 3)])
    assert len(found["losses"]) == 9 and len(found["norms"]) == 9 - SCORED, "scoring has no gradient norm to log"
    assert all(norm > 0 for norm in found["norms"])
    assert found["evals"][-1] < found["evals"][0] - 0.1
    assert found["tiles"]["tiles"] > 10 and found["tiles"]["scored_steps"] is None


@pytest.mark.compat
def test_resume_in_training_is_bit_identical(forge: Forge, straight: Any, tmp_path: Path) -> None:
    found, folder, path = straight
    shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-6")
    resumed = train(forge, tmp_path, path, resume=True, watch=True)
    assert resumed["losses"] == found["losses"] and resumed["digests"] == found["digests"][6:]
    assert resumed["rates"] == found["rates"] and resumed["tiles"] == found["tiles"]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), torch.load(folder / "logits.pt"))


def test_save_model_writes_the_bases_keys_and_nothing_else(straight: Any) -> None:
    folder = straight[1]
    saved = load_file(folder / "final" / "model.safetensors")
    assert {k: t.shape for k, t in saved.items()} == {k: t.shape for k, t in tiny_llama().state_dict().items()}
    model, logits = exported(folder)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits, torch.load(folder / "logits.pt"))


def test_two_ranks_save_one_file_that_turns_the_base_into_the_exported_model(forge: Forge, tmp_path: Path) -> None:
    told = forge.results(programs.save_tiles, tmp_path, config=config(tmp_path))
    assert all(rank["written"] and rank["fault"] for rank in told)
    assert "the first rank could not write" in told[1]["fault"]
    base, plain = tiny_llama().bfloat16().state_dict(), tiny_llama().bfloat16()
    meft_ds.apply_tiles(plain, tmp_path / "tiles.safetensors")
    saved, merged = load_file(tmp_path / "final" / "model.safetensors"), plain.state_dict()
    assert all(torch.equal(saved[name], t) for name, t in merged.items())
    assert not all(torch.equal(saved[name], t) for name, t in base.items())
    meft_ds.revert_tiles(plain, tmp_path / "tiles.safetensors")
    assert all(torch.equal(plain.state_dict()[name], t) for name, t in base.items())


@pytest.mark.long
def test_resume_within_scoring_chooses_the_same_tiles(forge: Forge, tmp_path: Path) -> None:
    path = config(tmp_path, warmup_steps=4, choice_out=str(tmp_path / "a.json"))
    found = train(forge, tmp_path / "a", path, watch=True)
    assert found["digests"][:4] == [found["digests"][0]] * 4 and len(set(found["digests"])) == 5
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    again = config(tmp_path / "again", warmup_steps=4, choice_out=str(tmp_path / "b.json"))
    resumed = train(forge, tmp_path / "b", again, resume=True, watch=True)
    assert resumed["digests"] == found["digests"][3:] and resumed["losses"] == found["losses"]
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["tiles"] == b["tiles"]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["reentrant", "nonreentrant"])
def test_trainers_gradient_checkpointing_changes_nothing(
    forge: Forge, tmp_path: Path, straight: Any, kind: str
) -> None:
    checkpointed = train(forge, tmp_path / "b", config(tmp_path / "b"), checkpointing=kind, watch=True)
    assert checkpointed == straight[0]


@pytest.mark.long
def test_a_scheduler_of_the_ds_config_starts_after_scoring_too(forge: Forge, tmp_path: Path) -> None:
    settings = {"density": 0.2, "budget": "per_module", "block_size": 6}
    rates = []
    for name, score in (("scored", {"warmup_steps": SCORED}), ("unscored", {"score": "magnitude"})):
        path = config_file(tmp_path / name, block={"sparse_matrix": {**settings, **score}})
        rates.append(train(forge, tmp_path / name / "run", str(path))["rates"])
    scored, unscored = rates
    assert scored[SCORED:] == unscored[:-SCORED] and len(set(scored)) > 4
