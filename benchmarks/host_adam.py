# SPDX-License-Identifier: Apache-2.0
"""How fast the host optimizer and the row moves are, against DeepSpeedCPUAdam and a plain copy on the same machine.

Run: ``python benchmarks/host_adam.py [--rows 16384 --active 2048 --width 4096 --rounds 15]``. Needs about 2.5 GB at the
default size and, once, the minute that DeepSpeed takes to compile its own kernel. Contenders take turns round by round
and every ratio is the median over rounds. Prints a table for people and one JSON line last.

``*_vs_deepspeed`` are parameters/s over DeepSpeedCPUAdam's parameters/s on the whole tensor in one call; row ops work
through all rows, `active` random ones per call; ``gather_vs_copy*`` are bytes/s over torch's ``copy_`` of buffers as
large as the gathered ones. On a busy machine every parallel call waits for its slowest thread, so many short calls lose
to one long call whoever makes them. ``rows_vs_deepspeed_same_calls`` therefore compares with DeepSpeedCPUAdam on
tensors of `active` rows; on one thread (OMP_NUM_THREADS=1) there is no such waiting.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed  # noqa: E402
import torch  # noqa: E402
from deepspeed.ops.adam import DeepSpeedCPUAdam  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.machine import machine, machine_line  # noqa: E402
from meft_ds import ops  # noqa: E402
from meft_ds.ops.adam import AdamHyper  # noqa: E402

HYPER = AdamHyper(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
WHOLE, PARTS = "DeepSpeedCPUAdam, whole tensor", "DeepSpeedCPUAdam, a call per `active` rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--active", type=int, default=2048)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    adam, sizes = adam_contenders(args.rows, args.active, args.width)
    adam_seconds = race(adam, args.rounds)
    adam.clear()
    copies, copied = copy_contenders(args.rows, args.active, args.width)
    copy_seconds = race(copies, args.rounds)

    print(machine_line(machine()))
    print(f"{args.active} active of {args.rows} rows x {args.width}; medians of {args.rounds} interleaved rounds")
    print(f"{'optimizer':<44}{'ms':>9}{'M params/s':>12}{'vs DeepSpeed':>14}")
    adam_ratios = report(adam_seconds, sizes, WHOLE, 1e6)
    print(f"{'row moves':<44}{'ms':>9}{'GB/s':>12}{'vs copy_':>14}")
    copy_ratios = report(copy_seconds, copied, "copy_ bf16", 1e9)
    result = {
        "benchmark": "host_adam",
        "rows_vs_deepspeed": adam_ratios["lazy rows"],
        "rows_vs_deepspeed_same_calls": ratio(adam_seconds, sizes, "lazy rows", PARTS),
        "dense_vs_deepspeed": adam_ratios["whole tensor"],
        "dense_replica_vs_deepspeed": adam_ratios["whole tensor, bf16 replica"],
        "dense_rows_vs_deepspeed": adam_ratios["dense rows"],
        "rows_catch_up_vs_deepspeed": adam_ratios["lazy rows, decay to catch up"],
        "rows_replica_vs_deepspeed": adam_ratios["lazy rows, bf16 replica"],
        "fallback_vs_deepspeed": adam_ratios["lazy rows, plain torch"],
        "fallback_catch_up_vs_deepspeed": adam_ratios["lazy rows, plain torch, decay to catch up"],
        "gather_vs_copy": copy_ratios["gather_rows bf16"],
        "gather_vs_copy_fp32": ratio(copy_seconds, copied, "gather_rows fp32", "copy_ fp32"),
        "deepspeed_mparams_per_s": round(sizes[WHOLE] / statistics.median(adam_seconds[WHOLE]) / 1e6),
        "backend": ops.backend(),
        "rows": args.rows,
        "active": args.active,
        "width": args.width,
        "rounds": args.rounds,
        "machine": machine(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result))


def adam_contenders(rows: int, active: int, width: int) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """Everyone works on the same p and gradient; ours share one pair of moments, DeepSpeed has its own."""
    p, grad = torch.randn(rows, width) * 0.02, torch.randn(rows, width) * 1e-3
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    replica = p.bfloat16()
    id_sets = disjoint_ids(rows, active)
    rows_grad = grad[:active]
    row_steps, row_decay = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.float64)
    parameter = torch.nn.Parameter(p)
    parameter.grad = grad
    parts = [torch.nn.Parameter(part) for part in p.split(active)]
    for part, part_grad in zip(parts, grad.split(active), strict=True):
        part.grad = part_grad
    deepspeed_whole, deepspeed_parts = (
        DeepSpeedCPUAdam(
            parameters, lr=HYPER.lr, betas=(HYPER.beta1, HYPER.beta2), eps=HYPER.eps, weight_decay=HYPER.weight_decay
        )
        for parameters in ([parameter], parts)
    )
    decay_log = 0.0

    def lazy(replica: Tensor | None = None, slept: bool = False) -> None:
        nonlocal decay_log
        if slept:
            decay_log += HYPER.log_decay
        for ids in id_sets:
            ops.adamw_lazy_rows_(
                p, m, v, row_steps, row_decay, ids, rows_grad, HYPER, decay_log=decay_log, replica=replica
            )
        decay_log += HYPER.log_decay

    def dense(replica: Tensor | None = None) -> None:
        ops.adamw_(p, m, v, grad, HYPER, step=10, replica=replica)

    def dense_rows() -> None:
        ops.adamw_rows_(p, m, v, id_sets[0], rows_grad, HYPER, step=10)

    def fallback(slept: bool = False) -> None:
        with plain_torch():
            lazy(slept=slept)

    contenders: dict[str, Callable[[], object]] = {
        WHOLE: deepspeed_whole.step,
        PARTS: deepspeed_parts.step,
        "whole tensor": dense,
        "whole tensor, bf16 replica": lambda: dense(replica),
        "dense rows": dense_rows,
        "lazy rows": lazy,
        "lazy rows, bf16 replica": lambda: lazy(replica),
        "lazy rows, decay to catch up": lambda: lazy(slept=True),
        "lazy rows, plain torch": fallback,
        "lazy rows, plain torch, decay to catch up": lambda: fallback(slept=True),
    }
    sizes = {name: (active * len(id_sets) if name.startswith("lazy") else rows) * width for name in contenders}
    return contenders, sizes


def disjoint_ids(rows: int, active: int) -> list[Tensor]:
    """A random split of the rows into sets of `active` ids: row ops take one set per call, as a model with that many
    layers would, so that they touch as much memory as the whole-tensor update and find none of it in a cache."""
    return [ids.sort().values for ids in torch.randperm(rows).split(active) if ids.numel() == active]


def copy_contenders(rows: int, active: int, width: int) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    contenders: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    id_sets = disjoint_ids(rows, active)

    def every_set(move: Callable[[int, Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            for number, ids in enumerate(id_sets):
                move(number * active, ids)

        return run

    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        store, buffer = torch.randn(rows, width).to(dtype), torch.zeros(rows, width, dtype=dtype)

        def copy(at: int, _: Tensor, store: Tensor = store, buffer: Tensor = buffer) -> None:
            buffer[at : at + active].copy_(store[at : at + active])

        def gather(at: int, ids: Tensor, store: Tensor = store, buffer: Tensor = buffer) -> None:
            ops.gather_rows(store, ids, buffer[at : at + active])

        def scatter(at: int, ids: Tensor, store: Tensor = store, buffer: Tensor = buffer) -> None:
            ops.scatter_rows_(store, ids, buffer[at : at + active])

        for kind, move in (("copy_", copy), ("gather_rows", gather), ("scatter_rows_", scatter)):
            contenders[f"{kind} {name}"] = every_set(move)
            sizes[f"{kind} {name}"] = active * len(id_sets) * width * store.element_size()
    return contenders, sizes


def race(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; the first two rounds warm up (build, page faults, thread pools)."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(seconds: dict[str, list[float]], sizes: dict[str, int], base: str, unit: float) -> dict[str, float]:
    ratios = {name: ratio(seconds, sizes, name, base) for name in seconds}
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{name:<44}{median * 1e3:>9.2f}{sizes[name] / median / unit:>12.1f}{ratios[name]:>14.2f}")
    return ratios


def ratio(seconds: dict[str, list[float]], sizes: dict[str, int], name: str, base: str) -> float:
    """Median over rounds of (speed of `name`) / (speed of `base`)."""
    rounds = zip(seconds[name], seconds[base], strict=True)
    return round(statistics.median(b / a for a, b in rounds) * sizes[name] / sizes[base], 3)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    before = os.environ.get("MEFT_DS_OPS")
    os.environ["MEFT_DS_OPS"] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["MEFT_DS_OPS"]
        else:
            os.environ["MEFT_DS_OPS"] = before


if __name__ == "__main__":
    main()
