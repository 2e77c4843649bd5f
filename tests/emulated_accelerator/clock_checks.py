# SPDX-License-Identifier: Apache-2.0
"""What `test_clock.py` asks of the clock; each function runs in a process of its own that has the emulated device."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from meft_ds.offload.dense_unit import DenseUnit
from meft_ds.offload.flat_unit import Place
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.window import StepSettings
from meft_ds.ops.adam import AdamHyper
from tests.emulated_accelerator import clock, device
from tests.emulated_accelerator.profiles import Profile

MB = 1 << 20


def started(**changed: Any) -> Profile:
    """Start the clock of the RTX 4090's profile; Python costs nothing unless told."""
    profile = Profile.load("rtx4090")
    clock.start(profile, **{"python": 0.0, "slowdown": 20.0, **changed})
    return profile


def kernel(seconds: float) -> None:
    """Give the current stream a kernel of so many seconds, whose launch takes no time."""
    device.backend.submit_seconds("kernel", seconds, 0.0)


def streams(folder: Path) -> dict[str, float]:
    """Return how long a thread waited for streams."""
    started()
    found = {}
    other = device.module.Stream()
    with clock.measure() as alone:
        kernel(0.01)
        kernel(0.02)
    found["in order"] = alone.seconds
    with clock.measure() as both:
        kernel(0.01)
        with device.module.stream(other):
            kernel(0.02)
    found["side by side"] = both.seconds
    with clock.measure() as chained:
        kernel(0.01)
        done = device.module.Event(enable_timing=True)
        done.record(device.module.current_stream())
        with device.module.stream(other):
            other.wait_event(done)
            kernel(0.02)
            after = device.module.Event(enable_timing=True)
            after.record(other)
        found["reached at once"] = float(after.query())
        after.synchronize()
        found["reached after"] = float(after.query())
        found["between events"] = done.elapsed_time(after) / 1e3
    found["one after the other"] = chained.seconds
    return found


def pause(folder: Path) -> dict[str, float]:
    """Return what the clock shows before and after half a second of the emulation's own work, and a sleeper beside."""
    started()
    found = {}
    ended = []

    def sleeper() -> None:
        device.backend.clock_sleep(0.005)  # 0.1 s of wall time
        ended.append(time.perf_counter())

    thread = threading.Thread(target=sleeper)
    begun = time.perf_counter()
    thread.start()
    time.sleep(0.02)
    with clock.paused():
        before = device.backend.clock_now()
        time.sleep(0.5)
        found["stands still"] = device.backend.clock_now() - before
    thread.join()
    found["sleeper, wall"] = ended[0] - begun
    return found


def idle(folder: Path) -> dict[str, dict[str, float]]:
    """Return the idle times of the default stream by cause, for one cause at a time."""
    profile = started()
    found = {}
    host = torch.empty(48 * MB, dtype=torch.uint8, pin_memory=True)  # about 2 ms
    on_device = torch.empty(48 * MB, dtype=torch.uint8, device=device.DEVICE)
    other = device.module.Stream()
    with clock.measure() as measured:
        kernel(0.001)
        host.copy_(on_device)  # waits
        kernel(0.001)
    found["blocking copy"] = measured.idle
    with clock.measure() as measured:
        kernel(0.001)
        with device.module.stream(other):
            on_device.copy_(host, non_blocking=True)
            done = device.module.Event()
            done.record(other)
        device.module.current_stream().wait_event(done)
        kernel(0.001)
    found["copy on another stream"] = measured.idle
    with clock.measure() as measured:
        kernel(0.001)
        begun = device.backend.thread_time()
        device.backend.clock_sleep(0.003)
        device.backend.note_blocked(begun, device.backend.thread_time())
        kernel(0.001)
    found["gate"] = measured.idle
    with clock.measure() as measured:
        for _ in range(100):
            device.backend.submit_seconds("small", 1e-6, 21e-6)
    found["launches"] = measured.idle
    found["expected"] = {"copy": 48 * MB / profile.pcie["pinned_down"]}
    return found


def python(folder: Path) -> dict[str, float]:
    """Return what 50 ms of a thread's own work cost, with Python at twice its CPU time and at none."""
    found = {}
    for weight in (0.0, 2.0):
        started(python=weight)
        with clock.measure() as measured:
            kernel(1e-6)
            begun = time.thread_time()
            while time.thread_time() - begun < 0.05:
                pass
            kernel(1e-6)
        found[str(weight)] = measured.seconds
    return found


def values(folder: Path) -> dict[str, Any]:
    """Return what programs see of values that were never computed, and of whole numbers."""
    started()
    x = torch.randn(64, 512, device=DEVICE) @ torch.randn(512, 64, device=DEVICE)
    ids = torch.arange(10, device=DEVICE)
    bits = x.view(torch.int32)
    return {
        "counted in memory that held values": _counted(),
        "whole numbers": ((ids * 3 + 1)[ids > 4]).cpu().tolist(),
        "loss": x.sum().item(),
        "finite": bool(torch.isfinite(x).all()),
        "same twice": torch.equal(x.cpu(), x.cpu()),
        "spread": x.cpu().std().item(),
        "chosen": torch.topk(x, 4, dim=1).indices.cpu().unique().numel(),
        "chosen by bits": torch.topk(bits, 4, dim=1).indices.cpu().unique().numel(),
        "resident bytes": _resident(),
    }


def _counted() -> list[int]:
    """Return counts that lie where values lay before."""
    held = [torch.rand(8, device=DEVICE) for _ in range(20)]
    del held
    return torch.arange(3, device=DEVICE).bincount().cpu().tolist()


def costs(folder: Path) -> dict[str, list[float]]:
    """Return by operator: seconds on the clock, and the floating point operations and bytes that it should count."""
    started()
    d, T = 4096, 2048
    w, x = torch.empty(d, d, dtype=BF16, device=DEVICE), torch.empty(T, d, dtype=BF16, device=DEVICE)
    ids, big, some = torch.arange(T, device=DEVICE), torch.empty(d, d, device=DEVICE), torch.empty(T, d, device=DEVICE)
    scattered = torch.arange(0, d, 32, device=DEVICE)
    found = {}

    def cost(name: str, call: Any, *, flops: float = 0.0, nbytes: float = 0.0) -> None:
        with clock.measure() as measured:
            call()
        found[name] = [measured.kernels, flops, nbytes]

    cost("product", lambda: x @ w, flops=2 * T * d * d)
    cost("transposed product", lambda: x.t() @ x, flops=2 * T * d * d)
    cost("add", lambda: big + big, nbytes=12 * d * d)
    cost("add in place", lambda: big.add_(1), nbytes=8 * d * d)
    cost("fill", lambda: big.zero_(), nbytes=4 * d * d)
    cost("cast", lambda: big.to(BF16), nbytes=6 * d * d)
    cost("broadcast", lambda: big + big[0], nbytes=8 * d * d + 4 * d)
    cost("rows", lambda: w.index_select(0, ids), nbytes=4 * T * d + 8 * T)
    cost("neighbours", lambda: x.index_select(1, ids), nbytes=4 * T * T + 8 * T)
    cost("scattered", lambda: x.index_select(1, scattered), nbytes=(2 + 32) * T * len(scattered) + 8 * len(scattered))
    cost("into rows", lambda: big.index_copy_(0, ids, some), nbytes=8 * T * d + 8 * T)
    return found


DEVICE, BF16 = device.DEVICE, torch.bfloat16


def _resident() -> int:
    """Return the bytes of memory that this process holds."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def cell(folder: Path, method: str, layers: int, tokens: int) -> dict[str, Any]:
    """Return what the benchmark measures of a step of so many layers of the 1.3B shape; Python left out."""
    from benchmarks.emulated_gpu_rows import measure

    spec = {"method": method, "profile": "rtx4090", "shape": "1.3b", "layers": layers, "tokens": [tokens]}
    return measure({**spec, "slowdown": 10.0, "python": 0.0, "steps": 3})["tokens"][str(tokens)]


def schedule(folder: Path, times: dict[str, float], layers: int, numel: int) -> float:
    """Return the seconds of a step of the real pipeline in `exact` mode over layers of a payload of `numel` values.

    `times` are a layer's: f and b on the device, o down, u up, p on the host.
    """
    profile = Profile.load("rtx4090")
    adamw = 28 * numel  # fp32 master and moments read and written, the gradient read
    norm = 4 * numel
    pcie = {**profile.pcie, "pinned_down": 4 * numel / times["o"], "pinned_up": 4 * numel / times["u"]}
    profile = replace(profile, pcie=pcie, host_bytes_per_s=(adamw + norm) / times["p"])
    clock.start(profile, python=0.0, slowdown=10.0)
    clock.replace_product_kernels(profile)
    units = [_payload(f"layer{i}.payload", i, numel) for i in range(layers)]
    pipeline = Pipeline(units, Bus(DEVICE), Ranks(), lambda: _SETTINGS, mode="exact")

    def step() -> None:
        pipeline.begin_forward(training=True)
        for unit in units:
            pipeline.needed(unit)
            kernel(times["f"])
        for unit in reversed(units):
            kernel(times["b"])
            pipeline.gradient(unit)
            pipeline.complete(unit)
        pipeline.step()

    try:
        step()
        with clock.measure() as measured:
            for _ in range(3):
                step()
        pipeline.flush()
    finally:
        pipeline.close()
    return measured.seconds / 3


_HYPER = AdamHyper(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
_SETTINGS = StepSettings(hyper_of=lambda unit: _HYPER, grad_scale=1.0, clip=1.0)


def _payload(name: str, layer: int, numel: int) -> DenseUnit:
    parameter = torch.nn.Parameter(torch.zeros(numel, device=DEVICE))
    unit = DenseUnit(Place(name=name, layer=layer, params=[("payload", parameter)]))
    unit.allocate()
    return unit
