# SPDX-License-Identifier: Apache-2.0
"""Two Trainers that train one model, and one whose first batch size is too large.

Usage: again_program.py FOLDER CONFIG.json twice|smaller
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.toy import batch, tiny_llama


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
    """Notes the first loss of each training."""

    def __init__(self) -> None:
        self.losses: list[list[float]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.losses.append([])

    def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses[-1].append(logs["loss"])


def main() -> None:
    folder, config, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    whole = batch(0, rows=4)
    data = [{k: t[i % 4] for k, t in whole.items()} for i in range(32)]
    made_args = partial(
        TrainingArguments,
        output_dir=str(folder),
        deepspeed=config,
        use_cpu=True,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_steps=6,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        auto_find_batch_size=how == "smaller",
    )
    shown = Shown()
    made = TooLarge if how == "smaller" else Trainer
    trainer = made(model=tiny_llama(), args=made_args(), train_dataset=data, callbacks=[shown])
    trainer.train()
    if how == "twice":  # the same Trainer cannot, with DeepSpeed of any kind: it keeps the engine that it has destroyed
        AcceleratorState._reset_state(reset_partial_state=True)
        Trainer(model=trainer.model, args=made_args(), train_dataset=data, callbacks=[shown]).train()
    print(json.dumps({"losses": shown.losses, "rows": TooLarge.tries}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


main()
