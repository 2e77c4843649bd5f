# SPDX-License-Identifier: Apache-2.0
"""Make the small Llama-architecture base in `examples/base/` from the Python standard library's own text.

    python examples/make_base.py                  # a few minutes on two cores; rewrites examples/base/

The base learns to write Python and English docstrings. It must not learn which code point has which Unicode name, since
`finetune.py --task facts` teaches exactly that: modules full of such tables are left out, and so is every line anywhere
that spells out a character's full name or a code point (see `library_text`). What it does see, as a few per cent of
its text, are the words that names are made of ("GREEK", "ARROW"), shuffled over all names, so that these words are
ordinary tokens to it: never a code point beside one.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import re
import sysconfig
import time
import unicodedata
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BASE_DIR = Path(__file__).resolve().parent / "base"

# Tables of characters, and third-party or test code that varies between installations.
EXCLUDED = ("site-packages", "test", "tests", "encodings", "idlelib", "lib2to3", "__pycache__", "_sysconfigdata")
EXCLUDED_FILES = ("html/entities.py", "stringprep.py", "re/_casefix.py", "tabnanny.py", "tkinter/constants.py")

# One piece per hexadecimal digit after "U+" or "0x", one per decimal digit, otherwise words with their leading space.
HEX_DIGIT = "|".join(rf"(?<=(?:U\+|0x)[0-9A-Fa-f]{{{n}}})[0-9A-Fa-f]" for n in range(6))
PIECES = rf"U\+(?=[0-9A-F])|0x(?=[0-9A-Fa-f])|{HEX_DIGIT}|\d| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def main() -> None:
    args = parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    files = [*library_text(), *word_lists(args.seed)]
    tokenizer = train_tokenizer([text for _, text in files], args.vocab_size)
    blocks = token_blocks(tokenizer, files, args.block, args.seed)
    model = new_model(args, tokenizer)
    start = time.perf_counter()
    loss = train(model, blocks, args)
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "files": len(files),
        "characters": sum(len(text) for _, text in files),
        "tokens": blocks.numel(),
        "tokens_seen": args.steps * args.batch * args.block,
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": round(loss, 4),
        "seconds": round(time.perf_counter() - start, 1),
        **{key: value for key, value in vars(args).items() if key != "out"},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    settings = args.out / "tokenizer_config.json"  # by its name in transformers 4 too, which does not know that of 5
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": TOKENIZER_CLASS}, indent=2))
    (args.out / "made_with.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BASE_DIR)
    parser.add_argument("--hidden", type=int, default=224)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=7)
    parser.add_argument("--intermediate", type=int, default=576)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--block", type=int, default=128, help="tokens per training row")
    parser.add_argument("--batch", type=int, default=16, help="rows per step")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def library_text() -> list[tuple[str, str]]:
    """(path, text) of the standard library's modules, sorted by path, without the lines that `holds_name` finds."""
    root = Path(sysconfig.get_path("stdlib"))
    names = {name for code in range(0x110000) if len((name := unicodedata.name(chr(code), "")).split()) > 1}
    longest = max(len(name.split()) for name in names)
    files = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if str(inside.as_posix()) in EXCLUDED_FILES or any(part.startswith(EXCLUDED) for part in inside.parts):
            continue
        lines = path.read_text(encoding="utf-8", errors="ignore").splitlines()
        kept = [line for line in lines if not holds_name(line, names, longest)]
        files.append((inside.as_posix(), "\n".join(kept) + "\n"))
    return files


def holds_name(line: str, names: set[str], longest: int) -> bool:
    """True where `line` holds, in any case, a Unicode character name of two words or more, or a code point."""
    if re.search(r"U\+[0-9A-Fa-f]{4}|\\u[0-9A-Fa-f]{4}|\\U[0-9A-Fa-f]{8}|\\N\{", line):
        return True
    words = re.findall(r"[A-Z0-9-]+", line.upper())
    spans = ((i, i + n) for i in range(len(words)) for n in range(2, min(longest, len(words) - i) + 1))
    return any(" ".join(words[start:end]) in names for start, end in spans)


def word_lists(seed: int) -> list[tuple[str, str]]:
    """The words of Unicode 3.2 character names, as often as they occur, shuffled over all names, 64 to a text."""
    names = (unicodedata.ucd_3_2_0.name(chr(code), "") for code in range(0x3400))
    words = [word for name in names if not name.startswith(("CJK", "HANGUL")) for word in name.split()]
    random.Random(seed).shuffle(words)
    return [("words", " " + " ".join(words[start : start + 64])) for start in range(0, len(words), 64)]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits; `<s>` is put before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [text for text in texts if text.startswith(" ")] * 3  # again: their words shall be few tokens
    tokenizer.train_from_iterator([*texts, *words, "U+0 " * 100], trainer)  # "U" too, which lines left out held
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, clean_up_tokenization_spaces=False, **SPECIAL
    )


def token_blocks(
    tokenizer: PreTrainedTokenizerFast, files: list[tuple[str, str]], block: int, seed: int
) -> torch.Tensor:
    """int64 [rows, block]: the files in random order, `</s>` after each, cut into rows that each begin with `<s>`."""
    order = random.Random(seed).sample(range(len(files)), len(files))
    stream: list[int] = []
    for index in order:
        stream += tokenizer(files[index][1], add_special_tokens=False, verbose=False)["input_ids"]
        stream.append(tokenizer.eos_token_id)
    rows = len(stream) // (block - 1)
    body = torch.tensor(stream[: rows * (block - 1)]).view(rows, block - 1)
    return torch.cat([torch.full((rows, 1), tokenizer.bos_token_id), body], dim=1)


def new_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            intermediate_size=args.intermediate,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: LlamaForCausalLM, blocks: torch.Tensor, args: argparse.Namespace) -> float:
    """AdamW with warm-up and cosine decay, fp32; returns the mean loss of the last 50 steps."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * s / args.steps)))
    )
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(epochs(len(blocks), args))])
    losses = []
    for step in range(args.steps):
        batch = blocks[order[step * args.batch : (step + 1) * args.batch]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step}/{args.steps} loss {losses[-1]:.3f}", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def epochs(rows: int, args: argparse.Namespace) -> int:
    return args.steps * args.batch // rows + 1


if __name__ == "__main__":
    main()
