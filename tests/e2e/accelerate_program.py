# SPDX-License-Identifier: Apache-2.0
"""An ordinary Accelerate loop, started by test_trainer.py. Usage: accelerate_program.py CONFIG.json"""

from __future__ import annotations

import json
import os
import sys

import torch
from accelerate import Accelerator, DeepSpeedPlugin

from tests.toy import batch, tiny_llama


def main() -> None:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # what `accelerate launch --use_deepspeed` sets
    plugin = DeepSpeedPlugin(hf_ds_config=sys.argv[1], gradient_accumulation_steps=2)
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=10)
    whole = batch(0, rows=16)
    data = [{k: t[i] for k, t in whole.items()} for i in range(16)]
    loader = torch.utils.data.DataLoader(data, batch_size=4)
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
    print(json.dumps({"losses": losses, "class": type(model).__name__, "lr": scheduler.get_last_lr()[0]}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # else gloo threads that run while the interpreter ends may abort it


main()
