# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Trainer program that also saves its tiles, on any number of ranks, started by test_tiles.py.

Usage: tiles_program.py FOLDER CONFIG.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

import meft_ds
from tests.toy import batch, tiny_llama


def main() -> None:
    folder = Path(sys.argv[1])
    whole = batch(0, rows=32)
    args = TrainingArguments(
        output_dir=str(folder),
        deepspeed=sys.argv[2],
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_steps=6,
        save_strategy="no",
        report_to=[],
    )
    trainer = Trainer(
        model=tiny_llama(), args=args, train_dataset=[{k: t[i] for k, t in whole.items()} for i in range(32)]
    )
    trainer.train()
    meft_ds.save_tiles(trainer.deepspeed, folder / "tiles.safetensors")
    written = (folder / "tiles.safetensors").is_file()  # for every rank, whoever wrote it
    trainer.save_model(str(folder / "final"))
    fault = ""
    try:
        meft_ds.save_tiles(trainer.deepspeed, folder / "tiles.safetensors" / "below a file")
    except OSError as e:
        fault = str(e)
    print(json.dumps({"written": written, "fault": fault}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


main()
