# SPDX-License-Identifier: Apache-2.0
"""An ordinary Hugging Face Trainer program (it never names meft_ds), started by test_trainer.py.

Usage: trainer_program.py FOLDER CONFIG.json [--resume] [--checkpointing reentrant|nonreentrant]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from tests.toy import batch, tiny_llama


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("config")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--checkpointing")
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
        max_steps=6,
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
    trainer.train(resume_from_checkpoint=True if given.resume else None)
    trainer.save_model(str(given.folder / "final"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(**{k: t[:2] for k, t in whole.items() if k != "labels"}).logits
    torch.save(logits, given.folder / "logits.pt")
    stats = getattr(trainer.model, "meft_stats", dict)()
    print(json.dumps({"losses": losses, "norms": norms, "rates": rates, "rows": stats.get("bytes", {}).get("rows")}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # else gloo threads that run while the interpreter ends may abort it


main()
