# SPDX-License-Identifier: Apache-2.0
"""Ordinary Hugging Face Trainer and Accelerate programs, as functions that the forge runs on every rank.

They know nothing of us, but for saving tiles.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import meft_ds
from tests.toy import batch, tiny_llama

WHOLE = batch(0, rows=32)
DATA = [{k: t[i] for k, t in WHOLE.items()} for i in range(32)]


def arguments(folder: Path, config: str, **more: Any) -> TrainingArguments:
    settings = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1}
    return TrainingArguments(
        output_dir=str(folder), deepspeed=config, use_cpu=True, report_to=[], disable_tqdm=True, **{**settings, **more}
    )


def logits_of(trainer: Trainer) -> torch.Tensor:
    trainer.model.eval()
    with torch.no_grad():
        return trainer.model(**{k: t[:2] for k, t in WHOLE.items() if k != "labels"}).logits


class Watch(TrainerCallback):
    """Takes the digest of all weights after every step."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        found = hashlib.sha256()
        for t in model.state_dict().values():
            found.update(t.contiguous().view(torch.uint8).numpy().data)
        self.digests.append(found.hexdigest())


def train(
    folder: Path, config: str, *, steps: int = 6, resume: bool = False, checkpointing: str = "", watch: bool = False
) -> dict[str, Any]:
    """Train a model that the program made, evaluate and save now and then, and save the model at the end."""
    args = arguments(
        folder,
        config,
        bf16="bf16" in Path(config).read_text(),
        gradient_accumulation_steps=2,
        lr_scheduler_type="linear",
        warmup_steps=1,
        max_steps=steps,
        save_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        max_grad_norm=0.7,
        weight_decay=0.01,
        gradient_checkpointing=bool(checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
    )
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=DATA, eval_dataset=DATA[:4])
    watching = Watch()
    if watch:
        trainer.add_callback(watching)
    trainer.train(resume_from_checkpoint=True if resume else None)
    trainer.save_model(str(folder / "final"))
    torch.save(logits_of(trainer), folder / "logits.pt")
    logged = {"losses": "loss", "norms": "grad_norm", "rates": "learning_rate", "evals": "eval_loss"}
    history, stats = trainer.state.log_history, getattr(trainer.model, "meft_stats", dict)()
    return {
        **{name: [entry[key] for entry in history if key in entry] for name, key in logged.items()},
        "digests": watching.digests,
        "rows": stats.get("bytes", {}).get("rows"),
        "tiles": stats.get("sparse_matrix"),
    }


def train_in_parts(folder: Path, config: str, base: str, *, resume: bool = False) -> dict[str, Any]:
    """Train a model that `from_pretrained` loads, under ZeRO-3 in parts."""
    args = arguments(
        folder,
        config,
        bf16="bf16" in Path(config).read_text(),
        gradient_accumulation_steps=2,
        adam_epsilon=1e-4,
        save_steps=3,
        eval_strategy="steps",
        eval_steps=2,
    )
    # after the arguments: they tell transformers of stage 3, and the model is made in parts
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype="auto")
    parts = all(p.numel() == 0 for p in model.parameters())
    trainer = Trainer(model=model, args=args, train_dataset=DATA, eval_dataset=DATA[:4])
    trainer.train(resume_from_checkpoint=True if resume else None)
    trainer.save_model(str(folder / "final"))
    logits, history = logits_of(trainer), trainer.state.log_history
    if trainer.is_world_process_zero():
        torch.save(logits, folder / "logits.pt")
    found = {name: [entry[name] for entry in history if name in entry] for name in ("loss", "eval_loss", "grad_norm")}
    return {**found, "parts": parts, "engine": type(trainer.deepspeed).__name__}


def save_tiles(folder: Path, config: str) -> dict[str, Any]:
    """Train, save tiles and the model, and then tiles to where no file can be."""
    trainer = Trainer(tiny_llama(), arguments(folder, config, bf16=True, save_strategy="no"), train_dataset=DATA)
    trainer.train()
    meft_ds.save_tiles(trainer.deepspeed, folder / "tiles.safetensors")
    written = (folder / "tiles.safetensors").is_file()  # for every rank, whoever wrote it
    trainer.save_model(str(folder / "final"))
    fault = ""
    try:
        meft_ds.save_tiles(trainer.deepspeed, folder / "tiles.safetensors" / "below a file")
    except OSError as e:
        fault = str(e)
    return {"written": written, "fault": fault}


class TooLarge(Trainer):
    """Its second backward does not fit, as long as the batch is larger than two."""

    tries: list[int] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = inputs["input_ids"].shape[0]
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.tries.append(rows)
        if rows > 2 and len(self.tries) > 1:
            raise RuntimeError("CUDA out of memory.")
        return loss


class Shown(TrainerCallback):
    """Notes the losses of each training."""

    def __init__(self) -> None:
        self.losses: list[list[float]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.losses.append([])

    def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses[-1].append(logs["loss"])


def train_again(folder: Path, config: str, *, how: str) -> dict[str, Any]:
    """Two Trainers train one model ("twice"), or one whose first batch size is too large ("smaller")."""
    made_args = partial(
        arguments,
        folder,
        config,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        save_strategy="no",
        auto_find_batch_size=how == "smaller",
    )
    shown, data = Shown(), [{k: t[i % 4] for k, t in WHOLE.items()} for i in range(32)]
    made = TooLarge if how == "smaller" else Trainer
    trainer = made(model=tiny_llama(), args=made_args(), train_dataset=data, callbacks=[shown])
    trainer.train()
    if how == "twice":  # the same Trainer cannot, with DeepSpeed of any kind: it keeps the engine that it has destroyed
        AcceleratorState._reset_state(reset_partial_state=True)
        Trainer(model=trainer.model, args=made_args(), train_dataset=data, callbacks=[shown]).train()
    return {"losses": shown.losses, "rows": TooLarge.tries}


def accelerate_loop(folder: Path, config: str) -> dict[str, Any]:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # what `accelerate launch --use_deepspeed` sets
    plugin = DeepSpeedPlugin(hf_ds_config=config, gradient_accumulation_steps=2)
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=10)
    loader = torch.utils.data.DataLoader(DATA[:16], batch_size=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses = []
    for _ in range(6):
        total = 0.0
        for inputs in loader:
            with accelerator.accumulate(model):
                loss = model(**inputs).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            total += loss.item()
        losses.append(total)
    return {"losses": losses, "class": type(model).__name__, "lr": scheduler.get_last_lr()[0]}
