# SPDX-License-Identifier: Apache-2.0
"""What ranks of test_export.py do: train a little, and let the engine write what the export is compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import meft_ds
from tests.plugin.zero3_ranks import destroyed, engine_for, train
from tests.toy import batch, tiny_llama


def train_and_save(folder: Path, *, methods: list[str], stage: int) -> dict[str, Any]:
    """By the method: a checkpoint, the 16-bit model, the method's own files and logits of one batch."""
    gather = {"stage3_gather_16bit_weights_on_model_save": True}
    for method in methods:
        with destroyed(engine_for(method, stage, zero=gather)) as engine:
            train(engine, 4)
            at = folder / method.replace(" ", "_")
            engine.save_checkpoint(str(at))
            engine.save_16bit_model(str(at / "16bit"))
            if "tiles" in method:
                meft_ds.save_tiles(engine, at / "tiles.safetensors")
            engine.eval()
            with torch.no_grad():
                logits = engine(**{k: t for k, t in batch(7).items() if k != "labels"}).logits
            if dist.get_rank() == 0:
                torch.save(logits, at / "logits.pt")
                config = {**tiny_llama().config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
                (at / "config.json").write_text(json.dumps(config))
                (at / "tokenizer.json").write_text("{}")
    return {}
