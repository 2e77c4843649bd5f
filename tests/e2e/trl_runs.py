# SPDX-License-Identifier: Apache-2.0
"""trl's trainers on a tiny model with a tokenizer made here; test_trl.py forks a process for each run.

The import of trl, which is slow, happens once, before the forks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

IDS = torch.arange(4, 20).view(2, 8)
OTHERS = ("ref_model", "teacher_model", "_precompute_engine")
WORDS = [f"w{n}" for n in range(56)]
METHODS: dict[str, dict[str, Any]] = {
    "sparse_adapter": {"sparse_adapter": {"rows": 48, "experts": 6, "experts_per_token": 3, "keys_per_token": 8}},
    "subspace": {"subspace": {"dim": 8, "nonzeros": 2}},
    "sparse_matrix": {"sparse_matrix": {"density": 0.2, "block_size": 8, "warmup_steps": 3}},
}


def run(folder: Path, *, trainer: str, method: str | None, stage: int, steps: int) -> dict[str, Any]:
    """Train, and return what each step logged and which engines there were."""
    plain = classifier() if trainer == "reward" else model()  # before stage 3 is known, which would partition it
    plain.save_pretrained(folder / "base")
    with torch.no_grad():
        before = plain.eval()(IDS).logits
    args = {
        "output_dir": str(folder / "out"),
        "deepspeed": config(method, stage),
        "max_steps": steps,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    made = MAKERS[trainer](args, folder / "base")
    made.train()
    made.model_wrapped.eval()
    with torch.no_grad():
        after = made.model_wrapped(IDS).logits
    history = [entry for entry in made.state.log_history if "loss" in entry]
    engines = [made.model_wrapped, *(getattr(made, name, None) for name in OTHERS)]
    engines += [engine for engine in getattr(made, "reward_funcs", []) if isinstance(engine, torch.nn.Module)]
    return {
        "losses": [entry["loss"] for entry in history],
        "rewards": [entry.get("reward") for entry in history],
        "finite": all(math.isfinite(v) for entry in history for v in entry.values() if isinstance(v, float)),
        "engines": [type(engine).__name__ for engine in engines if engine is not None],
        "moved": not torch.allclose(after, before, atol=1e-3),
    }


def evaluate_first(folder: Path, *, method: str | None, stage: int) -> dict[str, Any]:
    """transformers' Trainer: an evaluation before training, which in stage 3 makes an engine of its own."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder / "out"),
        deepspeed=config(method, stage),
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = torch.randint(4, 60, (16, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    made = Trainer(model(), args, train_dataset=data, eval_dataset=data)
    first, engine = made.evaluate()["eval_loss"], type(made.deepspeed).__name__
    # transformers keeps the engine that only evaluates, and fails in train() with it, with and without a block
    made.deepspeed, made.model_wrapped = None, made.model
    made.accelerator._models.clear()
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return {"eval": first, "losses": losses, "engines": [engine, type(made.deepspeed).__name__]}


def config(method: str | None, stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 40
    params: dict[str, Any] = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": params},
    }
    if method is None:
        params["torch_adam"] = True
    else:
        made["meft_offload"] = METHODS[method]
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: n for n, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model(kind: Any = LlamaForCausalLM, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    return kind(
        LlamaConfig(
            vocab_size=60,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **more,
        )
    )


def classifier() -> Any:
    return model(LlamaForSequenceClassification, num_labels=1)


def texts(seed: int, length: int, rows: int = 64) -> list[str]:
    chosen = torch.randint(0, len(WORDS), (rows, length), generator=torch.Generator().manual_seed(seed))
    return [" ".join(WORDS[n] for n in row) for row in chosen.tolist()]


def sft(args: dict[str, Any], base: Path) -> Any:
    data = Dataset.from_dict({"text": texts(0, 10)})
    return SFTTrainer(model(), SFTConfig(**args), train_dataset=data, processing_class=tokenizer())


def dpo(args: dict[str, Any], base: Path) -> Any:
    data = Dataset.from_dict({"prompt": texts(0, 4), "chosen": texts(1, 5), "rejected": texts(2, 5)})
    given = {"train_dataset": data, "processing_class": tokenizer(), "ref_model": model()}
    return DPOTrainer(model(), args=DPOConfig(**args), **given)


def dpo_alone(args: dict[str, Any], base: Path) -> Any:
    """Without a reference model: an engine that only evaluates has the very model that is trained afterwards."""
    data = Dataset.from_dict({"prompt": texts(0, 4), "chosen": texts(1, 5), "rejected": texts(2, 5)})
    settings = DPOConfig(**args, precompute_ref_log_probs=True)
    return DPOTrainer(model(), args=settings, train_dataset=data, processing_class=tokenizer())


def gkd(args: dict[str, Any], base: Path) -> Any:
    """A teacher, and a student that generates half of the texts."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    talk = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
        for asked, told in zip(texts(0, 4), texts(1, 5), strict=True)
    ]
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    settings = GKDConfig(**args, max_new_tokens=4, max_length=20, lmbda=0.5)
    given = {"train_dataset": Dataset.from_dict({"messages": talk}), "processing_class": words}
    return GKDTrainer(model(), teacher_model=model(seed=1), args=settings, **given)


def grpo(args: dict[str, Any], base: Path) -> Any:
    """With a model that it loads itself, in stage 3 in parts, a reference model, and a reward model."""
    data = Dataset.from_dict({"prompt": texts(0, 4)})
    scores = [many_low_words, classifier()]
    settings = GRPOConfig(**args, num_generations=4, max_completion_length=6, beta=0.1)
    given = {"train_dataset": data, "processing_class": tokenizer(), "reward_processing_classes": [None, tokenizer()]}
    return GRPOTrainer(str(base), reward_funcs=scores, args=settings, **given)


def reward(args: dict[str, Any], base: Path) -> Any:
    data = Dataset.from_dict({"chosen": texts(1, 5), "rejected": texts(2, 5)})
    return RewardTrainer(classifier(), args=RewardConfig(**args), train_dataset=data, processing_class=tokenizer())


MAKERS = {"sft": sft, "dpo": dpo, "dpo alone": dpo_alone, "grpo": grpo, "reward": reward, "gkd": gkd}


def many_low_words(completions: list[str], **_: Any) -> list[float]:
    words = [[int(word[1:]) for word in text.split() if word.startswith("w")] for text in completions]
    return [sum(n < 28 for n in row) / (len(row) + 1) for row in words]
