# SPDX-License-Identifier: Apache-2.0
"""Seconds per optimizer step on this machine's CPU: DeepSpeed full fine-tuning ("native"), ZeRO-2 offload, meft in its
default schedule (exact, overlapping) and in serial order, lsp (subspace projectors, d = n/2, k = 4) and smt (tiles of
256 x 256, 1 % of the weights; the step in which it scores them is not timed).

    python benchmarks/step_time.py                                   # about 6 minutes on 2 idle cores
    python benchmarks/step_time.py --only meft meft_serial --shapes 256x1
    python benchmarks/step_time.py --rounds 1 --layers 2 --shapes 256x1    # seconds; too small to report

One Llama-shaped model of about 60 M parameters with random weights, bf16, gradient clipping on. All engines live in
one process and take turns of two steps (what a turn leaves under way is waited for and counted), so that a machine
whose speed drifts treats all alike; figures are medians of the rounds, ratios are medians of the ratios within a round.
A round of all contenders and shapes takes about 100 seconds: time goes with --rounds, and --only, --shapes and --layers
select less of it. Not run on a GPU: device and host are the same memory here, so the bus costs nothing and what shows
is the compute that each way of training needs. Prints tables, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.machine import machine, machine_line  # noqa: E402

# What each adds to the common ds_config. One with a "meft_offload" block is compared with all others.
CONTENDERS: dict[str, dict[str, Any]] = {
    "native": {"zero_optimization": {"stage": 0}},
    "zero_offload": {
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()},
        }
    },
    "meft": {"meft_offload": {"sparse_adapter": {}}},
    "lsp": {"meft_offload": {"subspace": {}}},
    "smt": {"meft_offload": {"sparse_matrix": {"density": 0.01, "block_size": 256, "warmup_steps": 1}}},
    "meft_serial": {"meft_offload": {"sparse_adapter": {}, "schedule": {"mode": "serial"}}},
}
# (tokens per step, accumulation): sentences of 256 tokens, divided among the micro-batches
SHAPES = {"2048x1": (2048, 1), "2048x4": (2048, 4), "256x1": (256, 1)}
LENGTH = 256
STEPS_PER_TURN = 2  # an overlapping schedule finishes a step's updates during the next one


def main() -> None:
    options = _options()
    _one_rank()
    results = {shape: measure(*SHAPES[shape], options) for shape in options.shapes}
    first = next(iter(results.values()))
    print(f"\n{machine_line(machine())}, {_versions()}")
    print(f"model: {first['parameters'] / 1e6:.1f} M parameters, bf16, clipping 1.0\n")
    print(f"{'shape':<8} {'contender':<14} {'s/step':>8}" + "".join(f"{'/ ' + name:>15}" for name in options.only))
    for shape, r in results.items():
        for name in options.only:
            ratios = [r.get(f"{name}_vs_{other}") for other in options.only]
            cells = ["" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
            print(f"{shape:<8} {name:<14} {r[f'{name}_s']:>8.3f}" + "".join(f"{cell:>15}" for cell in cells))
    line: dict[str, Any] = {key: value for key, value in first.items() if key.endswith("_s") or "_vs_" in key}
    if "meft" in options.only:
        line["own_work"] = first["own_work"]
        print(f"meft's own work in the training thread: {first['own_work']:.2%} of a step ({options.shapes[0]})")
        line["device_bytes"] = _report_device_bytes(options)
    if "lsp" in options.only:
        print(
            f"lsp: {first['lsp_bus_bytes_per_parameter']:.2f} bytes on the bus per compressed parameter and step, both "
            f"ways (ZeRO-2 offload: {first['zero_offload_bus_bytes_per_parameter']:.0f}, by its design)"
        )
    line |= {"shapes": results, "machine": machine(), "versions": _versions(), "rounds": options.rounds}
    print(json.dumps(line))


def measure(tokens: int, gas: int, options: argparse.Namespace) -> dict[str, float]:
    """Interleaved rounds of the chosen contenders at one shape."""
    micro = tokens // LENGTH // gas
    engines = {name: _engine(name, micro, gas, options) for name in options.only}
    times: dict[str, list[float]] = {name: [] for name in engines}
    own_work: list[float] = []
    for name, engine in engines.items():
        for step in range(options.warmup + (name == "smt")):  # its first step only scores
            _timed_step(engine, micro, gas, step)
    for round_ in range(options.rounds):
        for name, engine in engines.items():
            times[name].append(_timed_turn(engine, micro, gas, options.warmup + STEPS_PER_TURN * round_))
            if name == "meft":
                stats = engine.meft_stats()
                own_work.append(stats["hooks_s"] / stats["step_s"])
    result: dict[str, float] = {f"{name}_s": statistics.median(seconds) for name, seconds in times.items()}
    for name in engines:
        for other in engines:
            if "meft_offload" in CONTENDERS[name] and other != name:
                pairs = zip(times[name], times[other], strict=True)
                result[f"{name}_vs_{other}"] = statistics.median(a / b for a, b in pairs)
    with torch.device("meta"):
        result["parameters"] = sum(p.numel() for p in _model(options.layers).parameters())
    for name in options.profile:
        print(f"one step of {name}")
        _profile(engines[name], micro, gas)
    if "meft" in engines:
        stats = engines["meft"].meft_stats()
        result["own_work"] = statistics.median(own_work)
        result |= {"bytes_down": stats["bytes_down_per_step"], "bytes_up": stats["bytes_up_per_step"]}
    if "lsp" in engines:
        result |= _bus_per_parameter(engines["lsp"])
    for engine in engines.values():
        engine.destroy()
    return result


def _bus_per_parameter(engine: Any) -> dict[str, float]:
    """Bytes both ways per compressed parameter and step; the other parameters of the model go whole, as with ZeRO."""
    stats = engine.meft_stats()
    moved = stats["bytes"]["subspace"]
    return {
        "lsp_bus_bytes_per_parameter": (moved["down"] + moved["up"]) / stats["subspace"]["parameters"],
        # what ZeRO-Offload's paper counts: gradients down and weights up, 2 bytes each
        "zero_offload_bus_bytes_per_parameter": 4.0,
    }


def _report_device_bytes(options: argparse.Namespace) -> dict[int, tuple[int, int]]:
    held = device_bytes_by_rows(options)
    print(f"\ndevice bytes of the adapter, host selection, cache_rows 1024, {options.experts} experts, 2,048 tokens:")
    for rows, (cache, total) in held.items():
        print(
            f"  r = {rows:>6}: rows and their gradients {cache / 2**20:8.2f} MiB, with routers {total / 2**20:8.2f} MiB"
        )
    return held


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

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.0}},
        "steps_per_print": 10**9,
        **copy.deepcopy(CONTENDERS[name]),
    }
    block = config.get("meft_offload", {})
    if "sparse_adapter" in block:
        block["sparse_adapter"] |= adapter or ({} if options.rows == "auto" else {"rows": int(options.rows)})
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


def _timed_turn(engine: Any, micro: int, gas: int, first_seed: int) -> float:
    """Seconds per step over consecutive steps, with all that they left under way."""
    seconds = sum(_timed_step(engine, micro, gas, first_seed + i) for i in range(STEPS_PER_TURN))
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
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders to run")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="tokens per step x accum.")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each contender and shape")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--layers", type=int, default=16, help="16 layers make about 60 M parameters")
    parser.add_argument("--rows", default="auto", help="r of the adapter; auto = the default of meft-ds")
    parser.add_argument("--experts", type=int, default=128, help="N in the table of device bytes, the same for every r")
    parser.add_argument(
        "--profile", nargs="+", choices=CONTENDERS, default=[], help="also print where a step of these spends its time"
    )
    options = parser.parse_args()
    if not set(options.profile) <= set(options.only):
        parser.error("--profile: --only leaves these contenders out")
    return options


def _one_rank() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for key, value in here.items():
        os.environ.setdefault(key, value)


def _versions() -> str:
    import deepspeed

    return f"torch {torch.__version__}, deepspeed {deepspeed.__version__}"


if __name__ == "__main__":
    main()
