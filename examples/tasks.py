# SPDX-License-Identifier: Apache-2.0
"""What `finetune.py` can learn: two embedded jobs that need no download, or any JSONL or text file of the user's.

An `Example` is a prompt and the completion that should follow it; only the completion is trained on, and exact match is
counted on it. A plain text has an empty prompt, is trained on as a whole, and has no exact match.
"""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORE = -100  # label that the loss leaves out


class Example(NamedTuple):
    prompt: str
    completion: str


class Task(NamedTuple):
    """`train` is learned, `test` is what exact match is counted on; empty for plain text."""

    name: str
    train: list[Example]
    test: list[Example]


def load_task(
    name: str, data_file: str | None, eval_file: str | None, num_facts: int, num_eval: int, seed: int
) -> Task:
    """The job named `name`, or the files' own if `data_file` is given.

    Facts are there to be remembered: `test` is the training set. Arithmetic and `eval_file` are tested on problems that
    were not trained on. A `data_file` without `eval_file` is tested on its own first `num_eval` examples.
    """
    if data_file is not None:
        train = load_examples(Path(data_file))
        test = load_examples(Path(eval_file)) if eval_file else train
        return Task(Path(data_file).name, train, [example for example in test if example.prompt][:num_eval])
    if name == "facts":
        examples = facts(num_facts, seed)
        return Task(name, examples, examples)
    if name == "arithmetic":
        train, test = arithmetic(seed)
        return Task(name, train, test[:num_eval])
    raise ValueError(f"--task is {name!r}: expected 'facts' or 'arithmetic', or give --data_file FILE")


# Left out of the facts: names that are computed from the number (CJK, Hangul, Braille), and large syllabaries.
_LEFT_OUT = ("CJK", "HANGUL", "KANGXI", "BRAILLE", "ETHIOPIC", "CANADIAN")


def facts(count: int, seed: int) -> list[Example]:
    """`count` pairs such as ("U+2192", " RIGHTWARDS ARROW"), drawn without repetition.

    They come from Python's copy of Unicode 3.2, so they are the same with every Python version.
    """
    ucd = unicodedata.ucd_3_2_0
    names = {code: ucd.name(chr(code), "") for code in range(0xA1, 0x3400)}
    known = [(code, name) for code, name in names.items() if name and not name.startswith(_LEFT_OUT)]
    if not 0 < count <= len(known):
        raise ValueError(f"--num_facts is {count}: expected 1 to {len(known)}")
    return [Example(f"U+{code:04X}", f" {name}") for code, name in random.Random(seed).sample(known, count)]


def arithmetic(seed: int) -> tuple[list[Example], list[Example]]:
    """Sums of two numbers below 100 as (train, held out), 80 % and 20 %; a + b and b + a are on the same side."""
    pairs = [(a, b) for a in range(100) for b in range(a, 100)]
    random.Random(seed).shuffle(pairs)
    cut = len(pairs) * 4 // 5
    sides = [{*side, *((b, a) for a, b in side)} for side in (pairs[:cut], pairs[cut:])]
    train, test = ([Example(f"{a} + {b} =", f" {a + b}") for a, b in sorted(side)] for side in sides)
    random.Random(seed).shuffle(train)
    random.Random(seed).shuffle(test)
    return train, test


def load_examples(path: Path) -> list[Example]:
    """Examples of a `.jsonl` file (lines {"prompt", "completion"} or {"text"}), or any other file as one plain text."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a .jsonl or text file")
    text = path.read_text(encoding="utf-8")
    if path.suffix not in (".jsonl", ".json"):
        examples = [Example("", text)] if text.strip() else []
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        examples = [_parse_line(line, f"{path}, line {number}") for number, line in lines]
    if not examples:
        raise ValueError(f"{path}: the file is empty; expected at least one example")
    return examples


def _parse_line(line: str, where: str) -> Example:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); a .jsonl file holds one JSON object per line") from None
    for keys in (("prompt", "completion"), ("text",)):
        if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys):
            return Example(row["prompt"], row["completion"]) if len(keys) == 2 else Example("", row["text"])
    raise ValueError(f'{where}: expected an object with strings "prompt" and "completion", or "text"')


def encode(examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, list[int]]]:
    """Rows {"input_ids", "attention_mask", "labels"} of at most `max_length` tokens; a prompt's labels are -100.

    A plain text is cut into as many rows as it needs. A prompt with its completion must fit: ValueError if not.
    """
    rows = []
    for example in examples:
        prompt = tokenizer(example.prompt)["input_ids"] if example.prompt else []
        answer = tokenizer(example.completion, add_special_tokens=not example.prompt, verbose=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        if prompt and len(prompt) + len(answer) > max_length:
            length = len(prompt) + len(answer)
            raise ValueError(f"{example.prompt[:40]!r}: {length} tokens, but --max_length is {max_length}: raise it")
        for start in range(0, len(answer), max_length):
            piece = answer[start : start + max_length]
            ids = [*prompt, *piece]
            labels = [*[IGNORE] * len(prompt), *piece]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def exact_match(produced: str, wanted: str) -> bool:
    """Equal to the last character, case included; only white space at either end is not counted."""
    return produced.strip() == wanted.strip()


@torch.no_grad()
def count_exact(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    batch: int = 64,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """How many of this rank's share of `examples` greedy decoding reproduces.

    Every rank runs the same number of batches (ZeRO-3 gathers weights collectively): a share that is one short is
    filled up with an example that is not counted.
    """
    share: list[Example | None] = list(examples[rank::world_size])
    share += [None] * (-(-len(examples) // world_size) - len(share))
    was_training = model.training
    model.eval()
    right = 0
    for start in range(0, len(share), batch):
        part = share[start : start + batch]
        produced = _complete(model, tokenizer, [example or examples[0] for example in part])
        right += sum(
            exact_match(text, example.completion) for text, example in zip(produced, part, strict=True) if example
        )
    model.train(was_training)
    return right


def _complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> list[str]:
    """Greedy completions of the prompts, with room for one token more than the longest wanted one and its end."""
    inputs = tokenizer([e.prompt for e in examples], return_tensors="pt", padding=True, padding_side="left")
    wanted = tokenizer([e.completion for e in examples], add_special_tokens=False)["input_ids"]
    output = model.generate(
        input_ids=inputs["input_ids"].to(model.device),
        attention_mask=inputs["attention_mask"].to(model.device),
        max_new_tokens=max(map(len, wanted)) + 2,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
