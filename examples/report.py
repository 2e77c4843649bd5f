# SPDX-License-Identifier: Apache-2.0
"""What `finetune.py` shows at the end: a few lines for people, the loss curve as PNG, one line of JSON for programs."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from tasks import Task, count_exact
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ExactMatch(TrainerCallback):
    """Counts exact match at the start of training, when the engine already exists, and again when `fraction` is called.

    `seconds` is the time from the first step to the last, exact match and loading left out.
    """

    def __init__(self, trainer: Trainer, task: Task) -> None:
        self.trainer, self.task = trainer, task
        self.before: float | None = None
        self.started = self.seconds = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.before = self.fraction()
        self.started = time.perf_counter()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds = time.perf_counter() - self.started

    def fraction(self) -> float | None:
        """Share of `task.test` that greedy decoding reproduces exactly, over all ranks; None without a test."""
        if not self.task.test:
            return None
        args, accelerator = self.trainer.args, self.trainer.accelerator
        right = count_exact(
            self.trainer.model,
            self.trainer.processing_class,
            self.task.test,
            rank=args.process_index,
            world_size=args.world_size,
        )
        total = accelerator.reduce(torch.tensor(right, device=accelerator.device), "sum")
        return int(total.item()) / len(self.task.test)


def figures(trainer: Trainer, task: Task, before: float | None, after: float | None, seconds: float) -> dict[str, Any]:
    """The JSON line's content. Those of the method are None where the model offers no `meft_stats()`."""
    model, args, state = trainer.model, trainer.args, trainer.state
    stats: dict[str, Any] = getattr(model, "meft_stats", dict)()
    tokens = state.num_input_tokens_seen
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return {
        "task": task.name,
        "exact_match_before": before,
        "exact_match_after": after,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
        "steps": state.global_step,
        "final_loss": losses[-1] if losses else None,
        "bytes_down_per_step": stats.get("bytes_down_per_step"),
        "bytes_up_per_step": stats.get("bytes_up_per_step"),
        "device_bytes": stats.get("device_bytes"),
        "host_bytes": stats.get("host_bytes"),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "peak_host_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "trainable_parameters": trainable_parameters(model, stats),
        "examples": len(task.train),
        "tested": len(task.test),
        "world_size": args.world_size,
        "batch_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "bf16": args.bf16,
        "fp16": args.fp16,
        "seed": args.seed,
        "config": args.deepspeed if isinstance(args.deepspeed, str) else None,
        "output_dir": args.output_dir,
    }


def trainable_parameters(model: PreTrainedModel, stats: dict[str, Any]) -> int:
    """Parameters with a gradient (whole, even where ZeRO-3 holds a part) and adapter rows outside the model; of
    matrices that have tiles only these."""
    inside = sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters() if p.requires_grad)
    tiles = stats.get("sparse_matrix", {"parameters": 0, "matrix_parameters": 0})
    inside += tiles["parameters"] - tiles["matrix_parameters"]
    return inside + int(stats.get("sparse_adapter", {}).get("rows_total", 0)) * 2 * int(model.config.hidden_size)


def draw_loss(history: list[dict[str, Any]], path: Path) -> bool:
    """Writes the loss curve as PNG; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(*zip(*points, strict=True)) if points else None
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return True


def show(result: dict[str, Any], curve: Path, drawn: bool) -> None:
    """Prints the figures for people and, last, the line of JSON, which also goes to result.json beside the curve."""
    for label, key, unit, scale in (
        ("exact match before", "exact_match_before", "%", 100),
        ("exact match after", "exact_match_after", "%", 100),
        ("training", "seconds", "s", 1),
        ("speed", "tokens_per_s", "tokens/s", 1),
        ("device -> host", "bytes_down_per_step", "MB/step", 1e-6),
        ("host -> device", "bytes_up_per_step", "MB/step", 1e-6),
        ("state on the device", "device_bytes", "MB", 1e-6),
        ("state on the host", "host_bytes", "MB", 1e-6),
        ("trainable parameters", "trainable_parameters", "M", 1e-6),
    ):
        value = result[key]
        print(f"{label:>22}: " + ("not reported" if value is None else f"{value * scale:.2f} {unit}"))
    print(f"{'loss curve':>22}: " + (str(curve) if drawn else "not drawn; pip install matplotlib"))
    line = json.dumps(result)
    curve.with_name("result.json").write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)
