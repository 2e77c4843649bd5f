# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a causal language model with the Hugging Face Trainer: an ordinary program that never imports meft_ds.

    deepspeed examples/finetune.py --deepspeed ds_configs/meft.json            # 256 facts, the embedded base
    deepspeed examples/finetune.py --deepspeed ds_configs/lsp.json             # the same job, subspace projectors
    deepspeed examples/finetune.py --deepspeed ds_configs/smt.json             # the same job, sparse matrix tuning
    deepspeed examples/finetune.py --deepspeed ds_configs/zero2_offload.json   # the same job, full fine-tuning
    python examples/finetune.py                                                # without DeepSpeed
    deepspeed examples/finetune.py --deepspeed ds_configs/meft.json --model_name_or_path MODEL --data_file my.jsonl

Any argument of `transformers.TrainingArguments` can be given too. The last line printed is JSON.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from report import ExactMatch, draw_loss, figures, show
from tasks import encode, load_task
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

HERE = Path(__file__).resolve().parent

# Tuned for the sparse adapter on the embedded base (see examples/README.md); a user's own file gets Trainer's defaults.
EMBEDDED: dict[str, dict[str, Any]] = {
    "facts": {"learning_rate": 4e-3, "max_steps": 700, "warmup_steps": 40, "per_device_train_batch_size": 32},
    "arithmetic": {"learning_rate": 3e-3, "max_steps": 600, "warmup_steps": 40, "per_device_train_batch_size": 64},
}


@dataclass
class Job:
    """What to learn, and from what."""

    model_name_or_path: str = field(default=str(HERE / "base"), metadata={"help": "model folder or hub name"})
    task: str = field(default="facts", metadata={"help": "embedded job: facts or arithmetic"})
    data_file: str | None = field(default=None, metadata={"help": ".jsonl (prompt/completion or text) or text file"})
    eval_file: str | None = field(default=None, metadata={"help": ".jsonl whose exact match is counted"})
    num_facts: int = field(default=256, metadata={"help": "how many facts --task facts teaches"})
    num_eval: int = field(default=512, metadata={"help": "most examples that exact match is counted on"})
    max_length: int = field(default=256, metadata={"help": "tokens per training row"})
    task_seed: int = field(default=0, metadata={"help": "which facts, which split; --seed is the training's"})
    save: bool = field(default=False, metadata={"help": "save model and tokenizer to --output_dir at the end"})


def main() -> None:
    job, args = parse_args()
    set_seed(args.seed)
    if args.use_cpu and args.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.world_size))
    if args.use_cpu and args.deepspeed:
        import deepspeed

        deepspeed.init_distributed()  # accelerate does it on accelerators only; ZeRO-3 needs it to build the model

    task = load_task(job.task, job.data_file, job.eval_file, job.num_facts, job.num_eval, job.task_seed)
    tokenizer = AutoTokenizer.from_pretrained(job.model_name_or_path, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer = Trainer(
        model=load_model(job.model_name_or_path, args),
        args=args,
        train_dataset=encode(task.train, tokenizer, job.max_length),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    exact_match = ExactMatch(trainer, task)
    trainer.add_callback(exact_match)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    after = exact_match.fraction()
    result = figures(trainer, task, exact_match.before, after, exact_match.seconds)
    if job.save:
        trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        curve = Path(args.output_dir) / "loss.png"
        show(result, curve, draw_loss(trainer.state.log_history, curve))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def parse_args() -> tuple[Job, TrainingArguments]:
    """The job and Trainer's own arguments, with defaults for the embedded jobs and for the machine that runs them."""
    parser = HfArgumentParser((Job, TrainingArguments))
    parser.set_defaults(
        output_dir="out",
        use_cpu=not torch.accelerator.is_available(),
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        lr_scheduler_type="linear",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    known, _ = parser.parse_known_args()
    if known.data_file is None:
        parser.set_defaults(**EMBEDDED.get(known.task, {}))
    job, args = parser.parse_args_into_dataclasses()
    args.include_num_input_tokens_seen = "non_padding"  # the command line can only switch it on or off
    return job, args


def load_model(name: str, args: TrainingArguments) -> PreTrainedModel:
    """Under DeepSpeed in the compute dtype, since the engine keeps the fp32 master weights; otherwise in fp32."""
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return AutoModelForCausalLM.from_pretrained(name, dtype=half if args.deepspeed else torch.float32)


if __name__ == "__main__":
    main()
