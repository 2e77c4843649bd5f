# SPDX-License-Identifier: Apache-2.0
"""Seconds per optimizer step on this machine's CPU: DeepSpeed full fine-tuning ("native"), ZeRO-2 offload, and meft
in its default schedule (exact, overlapping) and in serial order.

    python benchmarks/step_time.py [--rounds 5] [--layers 16] [--rows auto]

One Llama-shaped model of about 60 M parameters with random weights, bf16, gradient clipping on. Four engines live in
one process and take turns of two steps (what a turn leaves under way is waited for and counted), so that a machine
whose speed drifts treats all alike; figures are medians of the rounds, ratios are medians of the ratios within a round.
Not run on a GPU: device and host are the same memory here, so the bus costs nothing and what shows is the compute that
each way of training needs. Prints tables, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import time
from typing import Any

import torch
from torch import nn

CONTENDERS = ("native", "zero_offload", "meft", "meft_serial")
# (tokens per step, accumulation): sentences of 256 tokens, divided among the micro-batches
SHAPES = ((2048, 1), (2048, 4), (256, 1))
LENGTH = 256
STEPS_PER_TURN = 2  # an overlapping schedule finishes a step's updates during the next one


def main() -> None:
    options = _options()
    _one_rank()
    results: dict[str, Any] = {}
    for tokens, gas in SHAPES:
        results[f"{tokens}x{gas}"] = measure(tokens, gas, options)
    print(f"\n{_machine()}\nmodel: {results['2048x1']['parameters'] / 1e6:.1f} M parameters, bf16, clipping 1.0\n")
    print(
        f"{'tokens/step':>11} {'accum':>5} {'native s':>9} {'zero-2 offload s':>17} {'meft s':>7} "
        f"{'/native':>8} {'/offload':>9} {'serial s':>9} {'meft/serial':>12} {'own work':>9}"
    )
    for (tokens, gas), r in zip(SHAPES, results.values(), strict=True):
        print(
            f"{tokens:>11} {gas:>5} {r['native_s']:>9.3f} {r['zero_offload_s']:>17.3f} {r['meft_s']:>7.3f} "
            f"{r['meft_vs_native']:>8.3f} {r['meft_vs_zero_offload']:>9.3f} {r['meft_serial_s']:>9.3f} "
            f"{r['meft_vs_meft_serial']:>12.3f} {r['own_work']:>9.4f}"
        )
    held = device_bytes_by_rows(options)
    print(f"\ndevice bytes of the adapter, host selection, cache_rows 1024, {options.experts} experts, 2,048 tokens:")
    for rows, (cache, total) in held.items():
        print(
            f"  r = {rows:>6}: rows and their gradients {cache / 2**20:8.2f} MiB, with routers {total / 2**20:8.2f} MiB"
        )
    first = results["2048x1"]
    line = {
        key: first[key] for key in ("native_s", "zero_offload_s", "meft_s", "meft_vs_native", "meft_vs_zero_offload")
    }
    line |= {key: first[key] for key in ("meft_serial_s", "meft_vs_meft_serial", "own_work")}
    line |= {"shapes": results, "device_bytes": held, "machine": _machine(), "rounds": options.rounds}
    print(json.dumps(line))


def measure(tokens: int, gas: int, options: argparse.Namespace) -> dict[str, float]:
    """Interleaved rounds of all contenders at one shape."""
    micro = tokens // LENGTH // gas
    engines = {name: _engine(name, micro, gas, options) for name in CONTENDERS}
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    own_work: list[float] = []
    for round_ in range(options.warmup + options.rounds):
        for name, engine in engines.items():
            seconds = _timed_turn(engine, micro, gas, round_)
            if round_ >= options.warmup:
                times[name].append(seconds)
                if name == "meft":
                    stats = engine.meft_stats()
                    own_work.append(stats["hooks_s"] / stats["step_s"])
    if options.profile:
        _profile(engines["meft"], micro, gas)
    result = {f"{name}_s": statistics.median(seconds) for name, seconds in times.items()}
    for other in ("native", "zero_offload", "meft_serial"):
        pairs = zip(times["meft"], times[other], strict=True)
        result[f"meft_vs_{other}"] = statistics.median(a / b for a, b in pairs)
    result["parameters"] = sum(p.numel() for p in engines["native"].module.parameters())
    result["own_work"] = statistics.median(own_work)
    stats = engines["meft"].meft_stats()
    result |= {"bytes_down": stats["bytes_down_per_step"], "bytes_up": stats["bytes_up_per_step"]}
    for engine in engines.values():
        engine.destroy()
    return result


def device_bytes_by_rows(options: argparse.Namespace) -> dict[int, tuple[int, int]]:
    """Bytes the adapter holds on the device after two steps, for growing r."""
    held = {}
    for rows in (1024, 4096, 16384):
        adapter = {"rows": rows, "experts": options.experts, "cache_rows": 1024}
        engine = _engine("meft", 8, 1, argparse.Namespace(**{**vars(options), "layers": 2}), adapter)
        for step in range(2):
            _timed_step(engine, 8, 1, step)
        stats = engine.meft_stats()
        routers = sum(p.numel() * (2 + 4) for n, p in engine.module.named_parameters() if "router" in n)
        held[rows] = (stats["device_bytes"] - routers, stats["device_bytes"])
        engine.destroy()
    return held


def _engine(name: str, micro: int, gas: int, options: argparse.Namespace, adapter: dict[str, Any] | None = None) -> Any:
    import deepspeed

    zero: dict[str, Any] = {"stage": 0}
    if name == "zero_offload":
        zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.0}},
        "steps_per_print": 10**9,
    }
    if name.startswith("meft"):
        settings = adapter if adapter is not None else ({} if options.rows == "auto" else {"rows": int(options.rows)})
        config["meft_offload"] = {"sparse_adapter": settings}
        if name == "meft_serial":
            config["meft_offload"]["schedule"] = {"mode": "serial"}
    model = _model(options.layers)
    return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def _model(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def _timed_step(engine: Any, micro: int, gas: int, seed: int) -> float:
    g = torch.Generator().manual_seed(seed)
    batches = [torch.randint(0, 8192, (micro, LENGTH), generator=g) for _ in range(gas)]
    engine.train()
    start = time.perf_counter()
    for ids in batches:
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
    return time.perf_counter() - start


def _timed_turn(engine: Any, micro: int, gas: int, seed: int) -> float:
    """Seconds per step over consecutive steps, with all that they left under way."""
    seconds = sum(_timed_step(engine, micro, gas, STEPS_PER_TURN * seed + i) for i in range(STEPS_PER_TURN))
    start = time.perf_counter()
    if hasattr(engine, "meft_flush"):
        engine.meft_flush()
    return (seconds + time.perf_counter() - start) / STEPS_PER_TURN


def _profile(engine: Any, micro: int, gas: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        _timed_step(engine, micro, gas, 99)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender and shape")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--layers", type=int, default=16, help="16 layers make about 60 M parameters")
    parser.add_argument("--rows", default="auto", help="r of the adapter; auto = the default of meft-ds")
    parser.add_argument("--experts", type=int, default=128, help="N in the table of device bytes, the same for every r")
    parser.add_argument("--profile", action="store_true", help="also print where a meft step spends its time")
    return parser.parse_args()


def _one_rank() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for key, value in here.items():
        os.environ.setdefault(key, value)


def _machine() -> str:
    import deepspeed

    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            cpu = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = f"torch {torch.__version__}, deepspeed {deepspeed.__version__}"
    return f"{cpu}, {torch.get_num_threads()} threads, {versions}, CPU only"


if __name__ == "__main__":
    main()
