# SPDX-License-Identifier: Apache-2.0
"""Training steps on an EMULATED accelerator with a clock: what a GPU of a profile would wait for. No GPU is used.

    python benchmarks/emulated_gpu.py --profile rtx4090 --shape llama-7b --layers 4 --tokens 2048 512

The real engine trains under DeepSpeed (bf16, one rank) with each method at its defaults, on the emulated accelerator of
the tests (`tests/emulated_accelerator`). Its operators take time instead of running: the larger of arithmetic and
bytes, by a profile of benchmarks/profiles. Beside them, on the same clock: full fine-tuning with its state on the
device (`native`), and ZeRO-Offload's order (`zero_offload`). Every cell runs in a process of its own, at half of
`--layers` and at all of them. Layers cost the same, so the difference is a layer's time, and what is left over is that
of embeddings, head and step. The table is extrapolated from both to the model's full depth.

  s/step     extrapolated; "x" is over native. ~: waits for the host fall with the depth, because layers hide the
             update of the head. A line takes them too low, and the true figure is higher
  idle       share of a step in which the default stream runs no kernel: sync (the launching thread waited for the
             device or a copy), bus (the stream waited for a copy), host (a thread waited for an update), launch (the
             launching thread itself: Python, host work, launches)
  syncs      times that the training thread or autograd's waited for the device, per layer and step
  device     peak bytes at full depth; * says that the profile's memory holds less
  host       bytes of host memory that the method plans at full depth

No projectors are fitted and no tiles scored: neither is a step's time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import emulated_gpu_rows as rows  # noqa: E402
from benchmarks.child_process import run_child  # noqa: E402
from benchmarks.machine import machine, machine_line  # noqa: E402
from benchmarks.models import SHAPES  # noqa: E402

CAUSES = ("sync", "bus", "host", "launch")


def main() -> None:
    """Run all cells and print the table and the JSON."""
    arguments = _arguments()
    if arguments.child:
        rows.run_row(json.loads(arguments.child))
        return
    from tests.emulated_accelerator.profiles import Profile

    profile, begun = Profile.load(arguments.profile), time.monotonic()
    print(f"EMULATED {profile.name}, {arguments.shape}; the emulation runs on {machine_line(machine())}")
    print(f"layers {arguments.layers // 2} and {arguments.layers}, extrapolated to {SHAPES[arguments.shape].layers}")
    print(f"{'method':13}{'tokens':>7}{'s/step':>9}{'x':>7}{'idle':>7}" + "".join(f"{c:>8}" for c in CAUSES), end="")
    print(f"{'syncs':>7}{'device GB':>11}{'host GB':>9}{'layer ms':>10}{'rest ms':>9}")
    cells: dict[str, Any] = {}
    for method in arguments.methods:
        pair = [_run(method, layers, arguments) for layers in (arguments.layers // 2, arguments.layers)]
        failed = next((found["status"] for found in pair if found["status"] != "ok"), None)
        for tokens in map(str, arguments.tokens):
            name = f"{method}_{arguments.profile}_{tokens}"
            cells[name] = {"status": failed} if failed else _cell(pair, tokens, arguments, profile)
            _print_row(method, tokens, cells[name], cells.get(f"native_{arguments.profile}_{tokens}"))
    print(f"EMULATED; {time.monotonic() - begun:.0f} s on this machine")
    report = _report(arguments, profile, cells)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def _run(method: str, layers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    keys = ("profile", "shape", "tokens", "slowdown", "python", "steps")
    spec = {"method": method, "layers": layers, **{key: getattr(arguments, key) for key in keys}}
    return run_child([sys.executable, __file__, "--child", json.dumps(spec)], timeout_s=arguments.cell_seconds)


def _cell(pair: list[dict[str, Any]], tokens: str, arguments: argparse.Namespace, profile: Any) -> dict[str, Any]:
    """Extrapolate the two depths of one cell."""
    depth, (few, many) = SHAPES[arguments.shape].layers, (found["tokens"][tokens] for found in pair)
    layers = arguments.layers - arguments.layers // 2

    def at_depth(small: float, large: float) -> float:
        return large + (large - small) / layers * (depth - arguments.layers)

    # A step is kernels and idle time. Idle time that falls from layer to layer, because they hide an update, ends at 0.
    raw = {cause: at_depth(few["idle"][cause], many["idle"][cause]) for cause in CAUSES}
    idle = {cause: max(0.0, s) for cause, s in raw.items()}
    seconds = at_depth(few["kernels_s"], many["kernels_s"]) + sum(idle.values())
    layer = (seconds - many["s_per_step"]) / max(1, depth - arguments.layers)
    device = at_depth(few["device_bytes"], many["device_bytes"])
    return {
        "status": "ok",
        "s_per_step": seconds,
        "layer_s": layer,
        "rest_s": seconds - depth * layer,
        "bent": few["idle"]["host"] - many["idle"]["host"] > 0.005 * many["s_per_step"],
        "idle": sum(idle.values()) / seconds,
        "idle_by_cause": {cause: idle[cause] / seconds for cause in CAUSES},
        "kernels_s": seconds - sum(idle.values()),
        "syncs_per_layer": (many["syncs"] - few["syncs"]) / layers,
        "device_bytes": int(device),
        "fits": device <= profile.memory_bytes,
        "host_bytes": int(at_depth(*(found["host_bytes"] for found in pair))),
        "measured": {"few_layers": few, "all_layers": many},
    }


def _print_row(method: str, tokens: str, cell: dict[str, Any], native: dict[str, Any] | None) -> None:
    if cell["status"] != "ok":
        print(f"{method:13}{tokens:>7}  {cell['status']}", flush=True)
        return
    if native is not None and native["status"] == "ok":
        cell["vs_native"] = cell["s_per_step"] / native["s_per_step"]
    over, bent = " " if cell["fits"] else "*", "~" if cell["bent"] else " "
    ratio = cell.get("vs_native", float("nan"))
    print(
        f"{method:13}{tokens:>7}{cell['s_per_step']:>9.3f}{bent}{ratio:>6.2f}{cell['idle']:>7.2f}"
        + "".join(f"{cell['idle_by_cause'][c]:>8.2f}" for c in CAUSES)
        + f"{cell['syncs_per_layer']:>7.1f}{cell['device_bytes'] / 1e9:>10.1f}{over}{cell['host_bytes'] / 1e9:>9.1f}"
        + f"{1e3 * cell['layer_s']:>10.2f}{1e3 * cell['rest_s']:>9.1f}",
        flush=True,
    )


def _report(arguments: argparse.Namespace, profile: Any, cells: dict[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "benchmark": "emulated_gpu",
        "emulated": True,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "profile": profile.name,
        "arguments": {key: str(value) for key, value in vars(arguments).items() if key not in ("child", "out")},
    }
    for name, cell in cells.items():
        if cell["status"] != "ok":
            continue
        report[f"{name}_vs_native"] = cell.get("vs_native")
        report[f"{name}_gpu_idle"] = cell["idle"]
        report[f"{name}_device_bytes"] = cell["device_bytes"]
        report[f"{name}_syncs_per_layer"] = cell["syncs_per_layer"]
    return {**report, "cells": cells}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="rtx4090", help="a file of benchmarks/profiles")
    parser.add_argument("--shape", default="7b", choices=sorted(SHAPES), type=lambda name: name.removeprefix("llama-"))
    parser.add_argument("--layers", type=int, default=4, help="at most so many layers are emulated; even")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 512])
    parser.add_argument("--methods", nargs="+", default=list(rows.METHODS), choices=rows.METHODS)
    parser.add_argument("--steps", type=int, default=2, help="that are timed, after the warm-up")
    parser.add_argument("--slowdown", type=float, default=10.0, help="wall seconds of a second on the clock")
    parser.add_argument(
        "--python", type=float, default=None, help="clock seconds of a CPU second of Python; default: the profile's"
    )
    parser.add_argument("--cell-seconds", type=float, default=300.0, help="time limit of a process")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.layers < 2 or arguments.layers % 2:
        parser.error(f"--layers must be even and at least 2, it is {arguments.layers}")
    return arguments


if __name__ == "__main__":
    main()
