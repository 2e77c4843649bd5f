# SPDX-License-Identifier: Apache-2.0
"""An ordinary Hugging Face Trainer program that loads its model with from_pretrained; started by test_zero3_trainer.py.

Usage: zero3_trainer_program.py FOLDER CONFIG.json BASE [--resume] [--steps N]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.toy import batch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("config")
    parser.add_argument("base")
    parser.add_argument("--resume", action="store_true")
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
        adam_epsilon=1e-4,
        max_steps=given.steps,
        save_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        report_to=[],
    )
    # after the arguments: they tell transformers of stage 3, and the model is made in parts
    model = AutoModelForCausalLM.from_pretrained(given.base, attn_implementation="eager", dtype="auto")
    parts = all(p.numel() == 0 for p in model.parameters())
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data[:4])
    trainer.train(resume_from_checkpoint=True if given.resume else None)
    trainer.save_model(str(given.folder / "final"))
    history = trainer.state.log_history
    found = {name: [entry[name] for entry in history if name in entry] for name in ("loss", "eval_loss", "grad_norm")}
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(**{k: t[:2] for k, t in whole.items() if k != "labels"}).logits
    if trainer.is_world_process_zero():
        torch.save(logits, given.folder / "logits.pt")
    print(json.dumps({**found, "parts": parts, "engine": type(trainer.deepspeed).__name__}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


main()
