# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_sparse_matrix_exports.py do: let a model whose tiles trained leave by every ordinary way, and
look which of its weights came out wrong."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

import meft_ds
from tests.toy import batch, ds_config, make_engine, tiny_llama


class Wrapped(nn.Module):
    """A model around a transformers one; it has no save_pretrained of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return {"loss": out.loss, "logits": out.logits}


def trainer_of(model: nn.Module, stage: int, folder: Path) -> Any:
    from transformers import Trainer, TrainingArguments

    config = ds_config(
        micro=2,
        block={"sparse_matrix": {"density": 0.3, "block_size": 8, "score": "random"}},
        zero_optimization={
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,
        },
    )
    config["gradient_clipping"] = "auto"
    del config["optimizer"]  # the program's own
    whole = batch(0, rows=16)
    args = TrainingArguments(
        output_dir=str(folder),
        deepspeed=config,
        use_cpu=True,
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    return Trainer(model=model, args=args, train_dataset=[{k: t[i] for k, t in whole.items()} for i in range(16)])


def exports(folder: Path, stage: int, make: Any) -> dict[str, Any]:
    """By the way out: names of the weights that are not base + tiles, bit for bit."""
    trainer = trainer_of(make(), stage, folder)
    trainer.train()
    engine, accelerator, first = trainer.deepspeed, trainer.accelerator, dist.get_rank() == 0
    meft_ds.save_tiles(engine, folder / "tiles.safetensors")
    taken: dict[str, Any] = {}
    trainer.save_model(str(folder / "trainer"))
    accelerator.save_model(trainer.model_wrapped, str(folder / "accelerate"))
    taken["get_state_dict"] = state = accelerator.get_state_dict(engine)
    engine.save_16bit_model(str(folder), "16bit.bin")
    engine.save_checkpoint(str(folder), tag="t")
    if stage == 3:
        taken["consolidated"] = engine._zero3_consolidated_16bit_state_dict()
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            taken["gathered"] = engine.module.state_dict()
        engine.load_module_state_dict({"module": _everywhere(state)})  # what it has already changes nothing
        taken["loaded again"] = engine._zero3_consolidated_16bit_state_dict()
    else:
        engine.module.load_state_dict(state)
        taken["loaded again"] = engine.module.state_dict()
    inner = getattr(engine.module, "inner", engine.module)
    if first:
        # not the dict that was given, nor its tensors: programs filter and copy
        mine = {name.removeprefix("inner."): t.clone() for name, t in state.items()}
        inner.save_pretrained(folder / "pretrained", state_dict=mine)
    engine.destroy()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        taken["destroyed"] = engine.module.state_dict()
    if not first:
        return {}
    for name in ("trainer", "accelerate", "pretrained"):
        taken[name] = load_file(folder / name / "model.safetensors")
    taken["16 bit"] = torch.load(folder / "16bit.bin")
    taken["checkpoint"] = torch.load(folder / "t" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    base, trained = make().state_dict(), meft_ds.apply_tiles(make(), folder / "tiles.safetensors").state_dict()
    found: dict[str, Any] = {name: _differing(way, trained) for name, way in taken.items()}
    return {"wrong": found, "changed": len(_differing(trained, base))}


def _everywhere(state: dict[str, Tensor] | None) -> dict[str, Tensor]:
    told = [state]
    dist.broadcast_object_list(told)
    assert told[0] is not None
    return told[0]


def _differing(taken: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    inner = {name.removeprefix("inner."): t for name, t in wanted.items()}
    return [name for name, t in inner.items() if not torch.equal(taken.get(f"inner.{name}", taken.get(name, t + 1)), t)]


def scoring() -> Any:
    """An engine after three of five windows of scoring."""
    engine = make_engine(ds_config(block={"sparse_matrix": {"density": 0.3, "block_size": 8, "warmup_steps": 5}}))
    for step in range(3):
        engine.backward(engine(**batch(step)).loss)
        engine.step()
    return engine


def every_way(folder: Path, stage: int) -> dict[str, Any]:
    """By model: what the first rank found of each way."""
    deepspeed.init_distributed("gloo", verbose=False)
    from accelerate.state import AcceleratorState

    found = {}
    for name, make in (("plain", tiny_llama), ("wrapped", lambda: Wrapped(tiny_llama()))):
        (folder / name).mkdir(exist_ok=True)
        found[name] = exports(folder / name, stage, make)
        AcceleratorState._reset_state(reset_partial_state=True)
    return found


def just_exits(folder: Path) -> None:
    """End with an engine that still scores tiles, which nobody destroys."""
    logging.basicConfig(stream=sys.stdout)  # the test reads what is told there
    globals()["alive"] = scoring()
