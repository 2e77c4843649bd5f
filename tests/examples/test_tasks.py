# SPDX-License-Identifier: Apache-2.0
"""The example's embedded jobs, its file loading and its scoring."""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import tasks  # noqa: E402

BASE = EXAMPLES / "base"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def test_facts_are_deterministic_true_and_distinct() -> None:
    facts = tasks.facts(256, seed=0)
    assert facts == tasks.facts(256, seed=0)
    assert facts != tasks.facts(256, seed=1)
    assert len({fact.prompt for fact in facts}) == len({fact.completion for fact in facts}) == 256
    for prompt, completion in facts:
        assert unicodedata.name(chr(int(prompt.removeprefix("U+"), 16))) == completion.strip()


def test_more_facts_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="--num_facts is 100000: expected 1 to"):
        tasks.facts(100_000, seed=0)


def test_arithmetic_is_deterministic_and_right() -> None:
    train, test = tasks.arithmetic(seed=0)
    assert (train, test) == tasks.arithmetic(seed=0)
    assert len(train) + len(test) == 10_000
    for prompt, completion in train[:200] + test[:200]:
        a, b = prompt.removesuffix(" =").split(" + ")
        assert int(a) + int(b) == int(completion)


def test_arithmetic_holds_out_a_problem_in_both_orders() -> None:
    train, test = tasks.arithmetic(seed=0)

    def unordered(examples: list[tasks.Example]) -> set[tuple[str, ...]]:
        return {tuple(sorted(prompt.removesuffix(" =").split(" + "))) for prompt, _ in examples}

    assert not unordered(train) & unordered(test)


@pytest.mark.parametrize(
    ("produced", "equal"),
    [
        (" RIGHTWARDS ARROW", True),
        ("RIGHTWARDS ARROW ", True),
        (" rightwards arrow", False),
        (" RIGHTWARDS", False),
        (" RIGHTWARDS ARROW RIGHTWARDS", False),
        (" RIGHTWARDS  ARROW", False),
        ("", False),
    ],
)
def test_exact_match_is_strict(produced: str, equal: bool) -> None:
    assert tasks.exact_match(produced, " RIGHTWARDS ARROW") is equal


def test_facts_survive_the_tokenizer(tokenizer) -> None:
    for prompt, completion in tasks.facts(1000, seed=0):
        ids = tokenizer(prompt)["input_ids"] + tokenizer(completion, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion


def test_a_code_point_is_one_token_per_digit(tokenizer) -> None:
    assert tokenizer.tokenize("U+2A3F") == ["U", "+", "2", "A", "3", "F"]
    assert tokenizer.tokenize("U+FACE") == ["U", "+", "F", "A", "C", "E"]


def test_labels_cover_the_completion_and_its_end_only(tokenizer) -> None:
    (row,) = tasks.encode([tasks.Example("U+2192", " RIGHTWARDS ARROW")], tokenizer, 64)
    answer = tokenizer(" RIGHTWARDS ARROW", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    prompt = tokenizer("U+2192")["input_ids"]
    assert row["input_ids"] == prompt + answer
    assert row["labels"] == [-100] * len(prompt) + answer
    assert row["attention_mask"] == [1] * len(row["input_ids"])


def test_a_long_text_is_cut_and_a_long_pair_is_refused(tokenizer) -> None:
    rows = tasks.encode([tasks.Example("", "one two three four " * 20)], tokenizer, 16)
    whole = tokenizer("one two three four " * 20)["input_ids"] + [tokenizer.eos_token_id]
    assert [token for row in rows for token in row["labels"]] == whole
    assert max(len(row["input_ids"]) for row in rows) == 16
    with pytest.raises(ValueError, match="--max_length is 16: raise it"):
        tasks.encode([tasks.Example("one", " two" * 40)], tokenizer, 16)


def test_jsonl_and_text_files_load(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"prompt": "a", "completion": " b"}\n\n{"text": "line\\u2028one"}\n', encoding="utf-8")
    assert tasks.load_examples(path) == [tasks.Example("a", " b"), tasks.Example("", "line\u2028one")]
    text = tmp_path / "some.txt"
    text.write_text("two\nlines\n", encoding="utf-8")
    assert tasks.load_examples(text) == [tasks.Example("", "two\nlines\n")]
    task = tasks.load_task("facts", str(path), None, num_facts=1, num_eval=10, seed=0)
    assert task.name == "some.jsonl" and len(task.train) == 2 and task.test == [tasks.Example("a", " b")]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "line 1: not JSON"), ('{"prompt": "a"}', '"prompt" and "completion", or "text"'), ("\n", "empty")],
)
def test_a_faulty_file_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "faulty.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="faulty.jsonl.*" + message):
        tasks.load_examples(path)


def test_a_missing_file_and_an_unknown_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        tasks.load_examples(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="expected 'facts' or 'arithmetic'"):
        tasks.load_task("poetry", None, None, num_facts=1, num_eval=1, seed=0)


def test_the_shipped_base_is_small_and_knows_none_of_the_facts(tokenizer) -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 8_000_000
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert model.config.model_type == "llama" and len(tokenizer) == model.config.vocab_size
    assert tasks.count_exact(model, tokenizer, tasks.facts(64, seed=0)) == 0


def test_every_example_is_counted_once_whatever_the_world_size(tokenizer, monkeypatch) -> None:
    examples = tasks.facts(11, seed=0)
    answers = dict(examples[:7])
    calls = []

    def complete(model: object, tokenizer: object, part: list[tasks.Example]) -> list[str]:
        calls.append(len(part))
        return [answers.get(example.prompt, "no") for example in part]

    monkeypatch.setattr(tasks, "_complete", complete)
    model = SimpleNamespace(training=False, eval=lambda: None, train=lambda mode: None)
    shares = [tasks.count_exact(model, tokenizer, examples, 2, rank, 4) for rank in range(4)]
    assert sum(shares) == 7
    assert calls == [2, 1] * 4, "ranks must run equal batches"


def test_the_record_of_the_base_is_there() -> None:
    record = json.loads((BASE / "made_with.json").read_text())
    assert {"python", "torch", "seed", "characters", "tokens_seen"} <= record.keys()
