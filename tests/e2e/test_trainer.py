# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Trainer and Accelerate programs that know nothing of us, with and without the block."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e import programs
from tests.forked import Forge
from tests.toy import ADAPTER, tiny_llama

pytestmark = pytest.mark.compat


def run(forge: Forge, program: Callable[..., Any], folder: Path, *, world: int = 1, **arguments: Any) -> dict[str, Any]:
    """What the first rank returns."""
    return forge.results(program, folder, world=world, **arguments)[0]


def config_file(folder: Path, *, block: Any = ..., precision: str = "bf16", optimizer: bool = True) -> Path:
    """A ds_config as Hugging Face users write it, with "auto" wherever Trainer fills it in (no block with None)."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": "auto"}
    if optimizer:
        params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
        config["optimizer"] = {"type": "AdamW", "params": params}
        config["scheduler"] = {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": 0,
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
            },
        }
    if block is not None:
        config["meft_offload"] = {"sparse_adapter": dict(ADAPTER)} if block is ... else block
    path = folder / "ds.json"
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("optimizer", [True, False])
def test_trainer_trains_saves_and_resumes_bit_identically(forge: Forge, tmp_path: Path, optimizer: bool) -> None:
    config = str(config_file(tmp_path, optimizer=optimizer))
    straight = run(forge, programs.train, tmp_path / "a", config=config)
    assert straight["losses"][-1] < straight["losses"][0]
    assert straight["rows"]["up"] == straight["rows"]["down"] > 0
    assert len(set(straight["rates"])) > 3 and all(norm > 0 for norm in straight["norms"])

    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    resumed = run(forge, programs.train, tmp_path / "b", config=config, resume=True)
    assert resumed["losses"] == straight["losses"]  # the log history of the first half comes with the checkpoint
    assert torch.equal(torch.load(tmp_path / "a" / "logits.pt"), torch.load(tmp_path / "b" / "logits.pt"))


def test_save_model_of_trainer_holds_a_plain_base_and_the_adapter(forge: Forge, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import meft_ds
    from tests.toy import batch

    run(forge, programs.train, tmp_path / "a", config=str(config_file(tmp_path, precision="fp32")))
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a" / "final", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)
    meft_ds.load_adapter(model.eval(), tmp_path / "a" / "final")
    with torch.no_grad():
        logits = model(**{k: t[:2] for k, t in batch(0, rows=32).items() if k != "labels"}).logits
    torch.testing.assert_close(logits, torch.load(tmp_path / "a" / "logits.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reentrant", "nonreentrant"])
def test_trainers_gradient_checkpointing_changes_nothing(forge: Forge, tmp_path: Path, kind: str) -> None:
    config = str(config_file(tmp_path))
    plain = run(forge, programs.train, tmp_path / "a", config=config)
    checkpointed = run(forge, programs.train, tmp_path / "b", config=config, checkpointing=kind)
    assert checkpointed["losses"] == plain["losses"]


@pytest.mark.slow
def test_the_same_program_runs_on_two_ranks_and_without_the_block(forge: Forge, tmp_path: Path) -> None:
    config = str(config_file(tmp_path))
    two = run(forge, programs.train, tmp_path / "two", world=2, config=config)
    assert two["losses"][-1] < two["losses"][0]
    config = str(config_file(tmp_path / "p", block=None))
    plain = run(forge, programs.train, tmp_path / "plain", config=config)
    assert plain["rows"] is None


def test_accelerate_loop_trains_and_its_scheduler_drives_the_learning_rate(forge: Forge, tmp_path: Path) -> None:
    config = str(config_file(tmp_path, optimizer=False, precision="fp32"))
    got = run(forge, programs.accelerate_loop, tmp_path, config=config)
    assert got["class"] == "MeftEngine"
    assert got["losses"][-1] < got["losses"][0] - 0.2
    assert got["lr"] == pytest.approx(5e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "method"), [("twice", "adapter"), ("twice", "tiles"), ("smaller", "adapter"), ("smaller", "subspace")]
)
def test_a_trainer_trains_again_with_another_engine_on_the_same_model(
    forge: Forge, tmp_path: Path, how: str, method: str
) -> None:
    blocks: dict[str, Any] = {
        "adapter": {"sparse_adapter": dict(ADAPTER)},
        "subspace": {"subspace": {"dim": 8, "nonzeros": 2}},
        "tiles": {"sparse_matrix": {"density": 0.1, "block_size": 8, "score": "magnitude"}},
    }
    config = config_file(tmp_path, block=blocks[method], precision="fp32", optimizer=False)
    found = run(forge, programs.train_again, tmp_path, config=str(config), how=how)
    first, *_, last = found["losses"]
    if how == "twice":
        assert len(first) == len(last) == 6
        assert last[0] < first[0] and last[-1] < last[0], "it goes on with what was learned"
    else:
        assert max(found["rows"]) > 2 and found["rows"][-6:] == [2] * 6 and len(last) == 6
        assert last[-1] < last[0]
