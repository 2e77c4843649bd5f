# SPDX-License-Identifier: Apache-2.0
"""What is learned: the methods of meft-ds and others on the example's tasks, with equal steps, batches and tuning.

    python benchmarks/quality.py --methods full lsp_k4                  # facts
    python benchmarks/quality.py --tasks arithmetic --methods full lsp_k4 --lrs 1e-3 2e-3
    python benchmarks/quality.py --methods lsp_k4 --lrs 2e-3 --seeds 0 --steps 8 --num-eval 16    # seconds; a look

All start from examples/base in fp32, see the same batches in the same order (a function of the seed) and a linear
warm-up of 40 steps, then a linear decay to 0. Each task and method tries every learning rate of --lrs with --tune-seed;
the one with the best score (of equals, the lower final loss) is then run with --seeds. A run already done is not done
again, so a tuning seed among the seeds is scored in the run it was chosen by; without --tune-seed every rate gets all
seeds. --log FILE keeps finished runs, and finds them there when the command is given again.

Score: share of greedy completions that are exactly right, of the 256 facts (there is nothing to generalise), or of 512
sums that were not trained on. `values` are those with Adam moments: of the compressed matrices, and in all. `jump` is
how the loss changes at a multiple of 100 steps, where projectors change: the mean of the ten losses after over that of
the ten before, averaged over those steps; what it is without a change of projectors is what "full" shows on the same
batches. `lora` trains embeddings and norms as the subspace method does, `lora_only` nothing but the adapters.

`smt` and its variants train tiles of 32 x 32 and nothing else; `lora_equal` has adapters of exactly as many values.
The 20 steps in which smt only scores count as steps; the learning rate's schedule spans those that are left.

Prints a line per run, tables, and one line of JSON last. Seconds are those of training alone, on a machine whose cores
may be shared.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import deepspeed  # noqa: E402
import tasks  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq  # noqa: E402

from benchmarks.machine import machine, machine_line  # noqa: E402
from benchmarks.quality_methods import METHODS  # noqa: E402

BASE = ROOT / "examples" / "base"
WARMUP = 40
REFIT = 100
STEPS = {"facts": 400, "arithmetic": 600}
BATCH = {"facts": 32, "arithmetic": 64}


def main() -> None:
    args = options()
    log = Log(args.log, args)
    for name in args.tasks:
        for method in args.methods:
            compare(log, name, method, args)
    table = summary(log.runs)
    print(f"\n{machine_line(machine())}")
    show(table)
    print(json.dumps({"benchmark": "quality", "table": table, "runs": log.runs, **about(args)}))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tasks", nargs="+", choices=STEPS, default=["facts"])
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--tune-seed", type=int, default=None, help="choose the learning rate with this seed")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="none: only tune")
    parser.add_argument("--steps", type=int, default=None, help=f"default: {STEPS}")
    parser.add_argument("--num-eval", type=int, default=512, help="most examples to score")
    parser.add_argument("--log", type=Path, default=None, help="JSON lines of finished runs, read and appended to")
    return parser.parse_args()


def compare(log: Log, task: str, method: str, args: argparse.Namespace) -> None:
    rates = args.lrs
    if args.tune_seed is not None:
        tried = [log.run(task, method, lr, args.tune_seed) for lr in rates]
        rates = [max(tried, key=lambda run: (run["score"], -run["final_loss"]))["lr"]]
    for seed in args.seeds:
        for lr in rates:
            log.run(task, method, lr, seed)


class Log:
    """Runs, each done once."""

    def __init__(self, path: Path | None, args: argparse.Namespace) -> None:
        self.path, self.args = path, args
        kept = path.read_text().splitlines() if path is not None and path.exists() else []
        self._all = [json.loads(line) for line in kept]
        self.runs: list[dict[str, Any]] = []

    def run(self, task: str, method: str, lr: float, seed: int) -> dict[str, Any]:
        steps = self.args.steps or STEPS[task]
        wanted = {"task": task, "method": method, "lr": lr, "seed": seed, "steps": steps}
        found = next((run for run in self._all if wanted.items() <= run.items()), None)
        if found is None:
            found = wanted | train(task, method, lr, seed, steps, self.args.num_eval)
            self._all.append(found)
            if self.path is not None:
                with self.path.open("a") as out:
                    out.write(json.dumps(found) + "\n")
            short = f"{found['score']:.3f}  loss {found['final_loss']:.4f}  {found['seconds']:.0f} s"
            print(f"{task} {method:<20} lr {lr:<8g} seed {seed}  {short}", flush=True)
        if found not in self.runs:
            self.runs.append(found)
        return found


def train(name: str, method: str, lr: float, seed: int, steps: int, num_eval: int) -> dict[str, Any]:
    """One run, scored at its end."""
    torch.manual_seed(seed)
    task = tasks.load_task(name, None, None, 256, num_eval, 0)
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="right")
    rows = tasks.encode(task.train, tokenizer, 256)
    collate = DataCollatorForSeq2Seq(tokenizer)
    learner = METHODS[method](AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), seed, BATCH[name])
    losses = []
    start = time.perf_counter()
    for step, chosen in enumerate(orders(len(rows), BATCH[name], steps, seed)):
        batch = {key: t for key, t in collate([rows[i] for i in chosen]).items()}
        training = step - learner.scoring
        losses.append(learner.step(batch, lr * rate(training, steps - learner.scoring) if training >= 0 else 0.0))
    more = learner.finish()
    seconds = time.perf_counter() - start
    right = tasks.count_exact(learner.model, tokenizer, task.test[:num_eval])
    learner.close()
    return {
        "score": right / len(task.test[:num_eval]),
        "final_loss": statistics.fmean(losses[-10:]),
        "jump": jump(losses),
        "compressed": learner.compressed,
        "state": learner.state,
        "seconds": round(seconds, 1),
        **more,
        "losses": [round(statistics.fmean(losses[at : at + 10]), 5) for at in range(0, len(losses), 10)],
    }


def orders(rows: int, batch: int, steps: int, seed: int) -> list[list[int]]:
    """Row numbers of each batch: whole epochs, each shuffled anew; a short last batch is left out."""
    shuffle = random.Random(seed)
    out: list[list[int]] = []
    while len(out) < steps:
        order = list(range(rows))
        shuffle.shuffle(order)
        out += [order[at : at + batch] for at in range(0, rows - batch + 1, batch)]
    return out[:steps]


def rate(step: int, steps: int) -> float:
    """Factor on the learning rate: up over `WARMUP` steps (or a tenth, if that is less), down to 0 at the end."""
    warmup = min(WARMUP, max(1, steps // 10))
    return min((step + 1) / warmup, (steps - step) / (steps - warmup))


def jump(losses: list[float]) -> float | None:
    """Mean of (ten losses after) / (ten losses before) over the steps at which projectors change; see above."""
    ratios = [
        statistics.fmean(losses[at + 1 : at + 11]) / statistics.fmean(losses[at - 9 : at + 1])
        for at in range(REFIT, len(losses) - 10, REFIT)
    ]
    return statistics.fmean(ratios) if ratios else None


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per task, method and learning rate."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["task"], run["method"], run["lr"]), []).append(run)
    table = []
    for (task, method, lr), members in groups.items():
        scores = [run["score"] for run in members]
        jumps = [run["jump"] for run in members if run["jump"] is not None]
        biases = [run["held_out_bias_mean"] for run in members if run.get("held_out_bias_mean") is not None]
        table.append(
            {
                "task": task,
                "method": method,
                "lr": lr,
                "scores": {run["seed"]: round(run["score"], 4) for run in members},
                "mean": round(statistics.fmean(scores), 4),
                "min": round(min(scores), 4),
                "max": round(max(scores), 4),
                "jump": round(statistics.fmean(jumps), 3) if jumps else None,
                "held_out_bias": round(statistics.fmean(biases), 3) if biases else None,
                "compressed": members[0]["compressed"],
                "state": members[0]["state"],
                "seconds": round(statistics.median(run["seconds"] for run in members), 1),
            }
        )
    return table


def show(table: list[dict[str, Any]]) -> None:
    head = f"{'method':<20}{'lr':>9}{'mean':>8}{'min - max':>16}{'jump':>7}{'bias':>7}{'values':>20}{'s':>7}  by seed"
    for task in dict.fromkeys(row["task"] for row in table):
        print(f"\n{task}\n{head}")
        for row in (row for row in table if row["task"] == task):
            span = f"{row['min']:.3f} - {row['max']:.3f}"
            values = f"{row['compressed']:,} {row['state'] / 1e6:.2f}M"
            jump, bias = ("-" if row[key] is None else f"{row[key]:.2f}" for key in ("jump", "held_out_bias"))
            cells = f"{row['mean']:>8.3f}{span:>16}{jump:>7}{bias:>7}{values:>20}{row['seconds']:>7.0f}"
            seeds = ", ".join(f"{seed}: {score:.3f}" for seed, score in row["scores"].items())
            print(f"{row['method']:<20}{row['lr']:>9g}{cells}  {seeds}")


def about(args: argparse.Namespace) -> dict[str, Any]:
    """How the runs were made."""
    return {
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "batch": BATCH,
        "warmup": WARMUP,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__,
        },
    }


if __name__ == "__main__":
    main()
