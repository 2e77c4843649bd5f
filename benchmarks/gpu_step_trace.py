# SPDX-License-Identifier: Apache-2.0
"""What PyTorch's profiler saw of some steps, in numbers that are short enough to keep."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ROWS = 12
"""Lines of the table: what takes longest."""


def profile(step: Callable[[], None], steps: int, device: Any) -> dict[str, Any]:
    """Run `steps` steps under the profiler and return `summary` of their trace.

    On a GPU only the device is recorded, and the calls of its runtime: recording operators too would slow the host.
    """
    import torch
    from torch.profiler import ProfilerActivity

    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(steps):
            step()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return summary(json.loads(path.read_text())["traceEvents"], steps)


def summary(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Sum up a trace of `steps` steps; all numbers are per step.

    Returns:
        `bytes_down`, `bytes_up`: that crossed the bus.
        `kernel_ms`: in which at least one kernel ran; `device_ms`: from the first thing on the device to the last.
        `launches`; `waits`, `wait_ms`: calls in which a thread of the host waits for the device.
        `table`: what took longest, as {"name", "kind", "calls", "ms"}.
    """
    total: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    crossed = {"DtoH": 0, "HtoD": 0}
    kernels, on_device = [], []
    launches, waits, wait_us = 0, 0, 0.0
    for event in events:
        kind, name = event.get("cat"), str(event.get("name"))
        if event.get("ph") != "X" or kind not in (*ON_DEVICE, "cuda_runtime", "cuda_driver", "cpu_op"):
            continue
        begin, took = float(event["ts"]), float(event["dur"])
        entry = total[kind, name]
        entry[0] += 1
        entry[1] += took
        if kind in ON_DEVICE:
            on_device.append((begin, begin + took))
        if kind == "kernel":
            kernels.append((begin, begin + took))
        elif kind == "gpu_memcpy":
            for direction in crossed:
                crossed[direction] += int(event["args"]["bytes"]) if direction in name else 0
        elif "LaunchKernel" in name:
            launches += 1
        elif "Synchronize" in name:
            waits += 1
            wait_us += took
    longest = sorted(total.items(), key=lambda item: -item[1][1])[:ROWS]
    span = max((end for _, end in on_device), default=0.0) - min((begin for begin, _ in on_device), default=0.0)
    return {
        "bytes_down": crossed["DtoH"] / steps,
        "bytes_up": crossed["HtoD"] / steps,
        "kernel_ms": _union(kernels) / 1e3 / steps,
        "device_ms": span / 1e3 / steps,
        "launches": launches / steps,
        "waits": waits / steps,
        "wait_ms": wait_us / 1e3 / steps,
        "table": [
            {"name": name[:80], "kind": kind, "calls": calls / steps, "ms": round(took / 1e3 / steps, 4)}
            for (kind, name), (calls, took) in longest
        ],
    }


def _union(intervals: list[tuple[float, float]]) -> float:
    """Return how long at least one interval lasts."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered
