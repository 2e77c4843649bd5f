# SPDX-License-Identifier: Apache-2.0
"""An ordinary Hugging Face Trainer program (it never names meft_ds), started by test_trainer.py.

Usage: trainer_program.py FOLDER CONFIG.json [--resume] [--checkpointing reentrant|nonreentrant] [--watch]
    [--steps N]
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.toy import batch, tiny_llama


class Watch(TrainerCallback):
    """Takes the digest of all weights after every step."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        found = hashlib.sha256()
        for t in model.state_dict().values():
            found.update(t.contiguous().view(torch.uint8).numpy().data)
        self.digests.append(found.hexdigest())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("config")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--checkpointing")
    parser.add_argument("--watch", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    whole = batch(0, rows=32)
    data = [{k: t[i] for k, t in whole.items()} for i in range(32)]
    args = TrainingArguments(
        output_dir=str(given.folder),
        deepspeed=given.config,
        use_cpu=True,
        bf16="bf16" in Path(given.config).read_text(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        warmup_steps=1,
        max_steps=given.steps,
        save_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        report_to=[],
        max_grad_norm=0.7,
        weight_decay=0.01,
        gradient_checkpointing=given.checkpointing is not None,
        gradient_checkpointing_kwargs={"use_reentrant": given.checkpointing == "reentrant"},
    )
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=data, eval_dataset=data[:4])
    watch = Watch()
    if given.watch:
        trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=True if given.resume else None)
    trainer.save_model(str(given.folder / "final"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(**{k: t[:2] for k, t in whole.items() if k != "labels"}).logits
    torch.save(logits, given.folder / "logits.pt")
    stats = getattr(trainer.model, "meft_stats", dict)()
    found = {"losses": losses, "norms": norms, "rates": rates, "evals": evals, "digests": watch.digests}
    found |= {"rows": stats.get("bytes", {}).get("rows"), "tiles": stats.get("sparse_matrix")}
    print(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # else gloo threads that run while the interpreter ends may abort it


main()
