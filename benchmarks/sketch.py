# SPDX-License-Identifier: Apache-2.0
"""What the subspace method's kernels save and cost on the host: the compressed gradient against the dense weight
gradient, and the update of a weight against a plain copy.

Run: ``python benchmarks/sketch.py [--size 2048 --tokens 2048 --k 4 --rounds 11]``. Contenders take turns round by
round; every ratio is the median over rounds of (time of ours) / (time of the base in the same round), and beside it
stands the ratio of the fastest rounds, which other load on the machine disturbs least. Prints a table for people and
one JSON line last.

``bf16_vs_dense``, ``fp32_vs_dense``: S = (dY P)^T (X Q), both sketches and the d x d product (torch.mm), over the time
of torch.mm(dY^T, X); d = size / 2. ``apply_vs_copy``: bytes of W read and written per second by subspace_apply_ over
those of torch's ``copy_``, the smaller of bf16 (stochastic rounding) and fp32. It works through `matrices` weights, as
a step over the layers of a model does, so that no cache holds them. ``direction_vs_deepspeed``: elements/s of
adam_direction_ over DeepSpeedCPUAdam's (--deepspeed; it compiles its own kernel once).

On a busy machine every parallel call waits for its slowest thread, by whole slices of the scheduler: that pulls all
ratios of short calls towards one, apply_vs_copy upwards, fp32_vs_dense too. A copy_ far below the memory's speed in the
table gives it away; --threads 1 is then the better witness.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.machine import machine, machine_line  # noqa: E402
from meft_ds import ops  # noqa: E402
from meft_ds.ops.adam import AdamHyper  # noqa: E402

GatherList = tuple[Tensor, Tensor]
Contenders = dict[str, Callable[[], object]]
Seconds = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="m = n")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--k", type=int, default=4, help="nonzeros in a row of P and Q")
    parser.add_argument("--matrices", type=int, default=8, help="weights that an update walks through")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--deepspeed", action="store_true", help="adam_direction_ against DeepSpeedCPUAdam too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    d = args.size // 2
    p, q = (random_projector(args.size, d, args.k) for _ in "PQ")
    result: dict[str, object] = {"benchmark": "sketch"}
    print(machine_line(machine()))
    print(f"m = n = {args.size}, d = {d}, k = {args.k}, {args.tokens} tokens; {args.rounds} interleaved rounds")
    print(f"{'compressed gradient':<34}{'ms':>10}{'fastest':>10}{'GFLOP/s':>10}{'vs dense':>10}{'fastest':>10}")
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        dense, ours = 2 * args.size**2 * args.tokens, 2 * d * d * args.tokens
        sketched = 2 * args.k * args.size * args.tokens
        seconds = race(gradients(args.tokens, args.size, dtype, p[1], q[1]), args.rounds)
        work = dict(zip(seconds, (dense, 2 * sketched + ours, 2 * sketched, ours), strict=True))
        ratios = report(name, seconds, {key: value / 1e9 for key, value in work.items()})
        result[f"{name}_vs_dense"], result[f"{name}_vs_dense_fastest"] = ratios["S, all of it"]

    print(f"{'update of W':<34}{'ms':>10}{'fastest':>10}{'GB/s':>10}{'vs copy_':>10}{'fastest':>10}")
    shares = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        seconds = race(updates(args.matrices, args.size, dtype, p[0], q[0]), args.rounds)
        moved = 2 * args.matrices * args.size**2 * dtype.itemsize / 1e9
        ratios = report(name, seconds, dict.fromkeys(seconds, moved))
        median, fastest = (1 / ratio for ratio in ratios["subspace_apply_"])
        shares.append((median, fastest))
        result[f"apply_vs_copy_{name}"], result[f"apply_vs_copy_{name}_fastest"] = round(median, 3), round(fastest, 3)
    result["apply_vs_copy"], result["apply_vs_copy_fastest"] = (round(min(s), 3) for s in zip(*shares, strict=True))

    if args.deepspeed:
        print(f"{'Adam':<34}{'ms':>10}{'fastest':>10}{'M el/s':>10}{'vs DS':>10}{'fastest':>10}")
        seconds = race(directions(args.matrices * d * d), args.rounds)
        ratios = report("fp32", seconds, dict.fromkeys(seconds, args.matrices * d * d / 1e6))
        result["direction_vs_deepspeed"] = round(1 / ratios["adam_direction_"][0], 3)
    environment = {"backend": ops.backend(), "machine": machine(), "torch": torch.__version__}
    print(json.dumps({**result, **vars(args), **environment, "python": platform.python_version()}))


def random_projector(m: int, d: int, k: int) -> tuple[GatherList, GatherList]:
    """(row view, column view): column range cut into k strata, in each of which every column gets its share of rows."""
    bounds = [d * c // k for c in range(k + 1)]
    strata = [
        low + (torch.arange(m) % (high - low))[torch.randperm(m)] for low, high in zip(bounds, bounds[1:], strict=False)
    ]
    at = torch.stack(strata, 1)
    value = torch.randn(m, k).half()
    column, entry = at.flatten().sort(stable=True)
    lengths = torch.bincount(column, minlength=d)
    place = torch.arange(m * k) - (lengths.cumsum(0) - lengths)[column]
    index, factor = torch.zeros(d, int(lengths.max()), dtype=torch.int64), torch.zeros(d, int(lengths.max())).half()
    index[column, place], factor[column, place] = entry // k, value.flatten()[entry]
    dtype = torch.int16 if max(m, d) <= 65536 else torch.int32
    return (at.to(dtype), value), (index.to(dtype), factor)


def gradients(tokens: int, size: int, dtype: torch.dtype, p: GatherList, q: GatherList) -> Contenders:
    dy, x = torch.randn(tokens, size).to(dtype), torch.randn(tokens, size).to(dtype)
    left, right = ops.sketch(dy, *p), ops.sketch(x, *q)
    return {
        "torch.mm(dY^T, X)": lambda: torch.mm(dy.t(), x),
        "S, all of it": lambda: torch.mm(ops.sketch(dy, *p).t(), ops.sketch(x, *q)),
        "  both sketches": lambda: (ops.sketch(dy, *p), ops.sketch(x, *q)),
        "  the d x d product": lambda: torch.mm(left.t(), right),
    }


def updates(matrices: int, size: int, dtype: torch.dtype, p: GatherList, q: GatherList) -> Contenders:
    weights = [torch.randn(size, size).to(dtype) for _ in range(matrices)]
    copies = [torch.empty_like(weight) for weight in weights]
    s = torch.randn(size // 2, size // 2).to(dtype)
    residuals = [torch.zeros(size, size) for _ in range(matrices if dtype != torch.float32 else 0)]

    def copy() -> None:
        for weight, to in zip(weights, copies, strict=True):
            to.copy_(weight)

    def apply(residuals: list[Tensor | None]) -> None:
        for weight, residual in zip(weights, residuals, strict=True):
            ops.subspace_apply_(weight, s, p, q, alpha=-1e-5, decay=0.9999, key=1, step=1, residual=residual)

    contenders: Contenders = {"copy_": copy, "subspace_apply_": lambda: apply([None] * matrices)}
    if residuals:
        contenders["  with an fp32 residual"] = lambda: apply([*residuals])
    return contenders


def directions(n: int) -> Contenders:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    parameter = torch.nn.Parameter(torch.randn(n))
    parameter.grad = torch.randn(n) * 1e-3
    adam = DeepSpeedCPUAdam([parameter], lr=1e-4)
    m, v, out, grad = torch.zeros(n), torch.zeros(n), torch.zeros(n), parameter.grad
    hyper = AdamHyper(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    return {
        "DeepSpeedCPUAdam": adam.step,
        "adam_direction_": lambda: ops.adam_direction_(m, v, grad, out, hyper, step=10),
    }


def race(contenders: Contenders, rounds: int) -> Seconds:
    """Seconds of each contender in each round; the first two rounds warm up (build, page faults, thread pools)."""
    seconds: Seconds = {name: [] for name in contenders}
    for number in range(rounds + 2):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def report(title: str, seconds: Seconds, work: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Prints a line each; ratios of time to the first contender's: median over rounds, and of the fastest rounds."""
    base = next(iter(seconds.values()))
    ratios = {}
    for name, taken in seconds.items():
        median, fastest = statistics.median(taken), min(taken)
        ratio = statistics.median(a / b for a, b in zip(taken, base, strict=True))
        ratios[name] = round(ratio, 3), round(fastest / min(base), 3)
        numbers = f"{median * 1e3:>10.2f}{fastest * 1e3:>10.2f}{work[name] / median:>10.1f}"
        print(f"{title + ' ' + name:<34}{numbers}{ratio:>10.2f}{fastest / min(base):>10.2f}")
    return ratios


if __name__ == "__main__":
    main()
