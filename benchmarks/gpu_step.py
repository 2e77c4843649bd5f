# SPDX-License-Identifier: Apache-2.0
"""Training steps side by side on one accelerator: native, ZeRO-2 offload, ZenFlow, LoRA and meft.

    python benchmarks/gpu_step.py --models 1.3b,3b,7b --out gpu_step.json      # each model within 8 minutes
    python benchmarks/gpu_step.py --models 7b --memory-cap-gb 24               # as on a smaller card
    python benchmarks/gpu_step.py --models tiny                                # no accelerator: a check of the program

Llama-architecture models with random weights, random tokens, bf16, clipping on, one process, no network. Every row runs
in its own fresh process with a time limit; one that runs out of memory or fails becomes a row that says so.

  native         DeepSpeed stage 0, full fine-tuning, torch's fused AdamW: what a step costs without any offload
  zero2_offload  ds_configs/zero2_offload.json: DeepSpeedCPUAdam, pinned host memory, overlapped communication
  zenflow        ds_configs/zenflow.json; it replaces the accumulation by its own update interval, so one of its steps
                 is a window of the same number of micro-batches, and whole update intervals are timed
  lora           peft, r = 32 on all linear layers
  meft           ds_configs/meft.json, or its block given with --meft-block

Columns: s/step (median over windows), tokens/s, practicality (native s/step over this s/step, same accumulation), peak
device memory of torch, peak host memory of the process tree, and bytes per step each way as PyTorch's profiler saw them
on the bus (on a CPU nothing crosses a bus: meft's own counters only). The last line is JSON.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_step_rows as rows_module  # noqa: E402
from benchmarks.child_process import run_child  # noqa: E402
from benchmarks.machine import machine, machine_line  # noqa: E402
from benchmarks.models import SHAPES  # noqa: E402

COLUMNS = ("s_per_step", "tokens_per_s", "practicality", "device_gib", "host_gib", "mib_down", "mib_up")


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        rows_module.run_row(json.loads(arguments.child))
        return
    _build_kernels(arguments.rows)
    hardware = _hardware()
    print(f"Device: {hardware['device']}; {machine_line(hardware)}; {hardware['host_gib']} GiB host memory")
    results = []
    for model in arguments.models:
        print(f"\n{model}: {arguments.seq_len} tokens x {arguments.micro_batch} per micro-batch")
        print(f"{'row':15}{'accum.':>7}" + "".join(f"{name:>14}" for name in COLUMNS))
        results += _run_model(model, arguments)
    report = {
        "benchmark": "gpu_step",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware,
        "memory_cap_gb": arguments.memory_cap_gb,
        "checkpointing": arguments.checkpointing,
        "rows": results,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def _build_kernels(rows: list[str]) -> None:
    """Builds DeepSpeed's host optimizer before the clock runs, so that no row pays for it or is killed in it."""
    if not {"zero2_offload", "zenflow"} & set(rows):
        return
    spec = json.dumps({"row": "build"})
    outcome = run_child([sys.executable, __file__, "--child", spec], timeout_s=900)
    print(f"Building DeepSpeed's CPUAdam: {outcome['status']}, {outcome['wall_s']} s")


def _run_model(model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one model; what does not fit into the model's time becomes a row that says so."""
    deadline = time.monotonic() + arguments.model_minutes * 60
    results: list[dict[str, Any]] = []
    # All rows at the first accumulation before any at the second: if the time ends, it ends on the repetition.
    for accumulation in arguments.accumulation:
        for row in arguments.rows:
            spec = {
                "model": model,
                "row": row,
                "accumulation": accumulation,
                "steps": arguments.steps,
                "seq_len": arguments.seq_len,
                "micro_batch": arguments.micro_batch,
                "memory_cap_gb": arguments.memory_cap_gb,
                "checkpointing": arguments.checkpointing,
                "meft_block": arguments.meft_block,
            }
            left = deadline - time.monotonic()
            if left < 5:
                outcome: dict[str, Any] = {
                    "status": f"not run: the {arguments.model_minutes:g} minutes of this model are over"
                }
            else:
                outcome = run_child([sys.executable, __file__, "--child", json.dumps(spec)], timeout_s=left)
            result = {"model": model, "row": row, "accumulation": accumulation, **outcome}
            native = next((r for r in results if r["row"] == "native" and r["accumulation"] == accumulation), result)
            if "s_per_step" in result and "s_per_step" in native and "native" in arguments.rows:
                result["practicality"] = native["s_per_step"] / result["s_per_step"]
            results.append(result)
            _print_row(result)
    return results


def _print_row(result: dict[str, Any]) -> None:
    head = f"{result['row']:15}{result['accumulation']:>7}"
    if result["status"] != "ok":
        print(f"{head}   {result['status']}", flush=True)
        return
    cells = ("-" if result.get(name) is None else f"{result[name]:.4g}" for name in COLUMNS)
    print(head + "".join(f"{cell:>14}" for cell in cells), flush=True)


def _hardware() -> dict[str, Any]:
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    from importlib.metadata import PackageNotFoundError, version

    for package in ("deepspeed", "transformers", "peft", "meft-ds"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    device = "CPU only: these are no accelerator timings"
    if torch.cuda.is_available():
        # Properties, not a tensor: the parent must not hold a context on a device whose memory is being measured.
        properties = torch.cuda.get_device_properties(0)
        device = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return {
        "device": device,
        **machine(),
        "host_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "versions": versions,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models, rows = ",".join(SHAPES), ",".join(rows_module.ROWS)
    parser.add_argument("--models", type=_names(SHAPES), default=["1.3b"], help=f"of {models}")
    parser.add_argument("--rows", type=_names(rows_module.ROWS), default=list(rows_module.ROWS), help=f"of {rows}")
    parser.add_argument("--accumulation", type=_positive_numbers, default=[1, 4], help="micro-batches per step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps per row, after two that are not timed")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences per micro-batch")
    parser.add_argument("--memory-cap-gb", type=float, help="GiB of device memory that torch may take")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false", help="keep activations")
    parser.add_argument("--meft-block", type=json.loads, help="JSON in place of meft.json's meft_offload block")
    parser.add_argument("--model-minutes", type=float, default=8.0, help="time limit of all rows of one model")
    parser.add_argument("--out", type=Path, help="also write the JSON report to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _names(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
        return names

    return parse


def _positive_numbers(text: str) -> list[int]:
    numbers = [int(number) for number in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("each must be at least 1")
    return numbers


if __name__ == "__main__":
    main()
