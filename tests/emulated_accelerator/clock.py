# SPDX-License-Identifier: Apache-2.0
"""The clock: the emulated device takes time, from a profile, instead of computing. Nothing here is a measurement.

`start` switches a process over, before it makes any tensor on the device. Device work costs what `backend/costs.cpp`
says, a thread pays for its launches and for its Python, and host kernels cost what the profile's host would need. They
are not run unless whole numbers come of them. `measure` tells where the time of some steps went.
"""

from __future__ import annotations

import importlib
import math
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.emulated_accelerator import device
from tests.emulated_accelerator.profiles import Profile

SECTOR = 32
"""Bytes of the smallest piece of memory that a gather moves."""


def start(profile: Profile, *, slowdown: float = 10.0, python: float | None = None) -> None:
    """Let the emulated device of this process run on the clock. The product's kernels bring their own cost."""
    pace, rates = device.backend.Pace(), device.backend.Rates()
    pace.slowdown, pace.launch = slowdown, profile.launch_s
    pace.python = profile.python if python is None else python
    rates.matmul_flops, rates.matmul_half_size = profile.matmul_flops, profile.half_size
    rates.fp32_flops, rates.bytes, rates.cache_bytes = (
        profile.fp32_flops,
        profile.bytes_per_s,
        profile.cache_bytes_per_s,
    )
    rates.kernel = profile.kernel_s
    for name in ("pinned_down", "pinned_up", "pageable_down", "pageable_up"):
        setattr(rates, name, profile.pcie[name])
    rates.copy_latency = profile.pcie["latency_us"] * 1e-6
    device.backend.start_clock(pace, rates)
    device.backend.set_capacity(0)
    device.MEMORY = profile.memory_bytes


@contextmanager
def paused() -> Iterator[None]:
    """Let the clock stand still: what runs inside is the emulation's own work."""
    held = device.backend.Paused()
    try:
        yield
    finally:
        del held


@dataclass
class Measured:
    """Where the time of a run went, in virtual seconds."""

    seconds: float = 0.0
    kernels: float = 0.0
    idle: dict[str, float] = field(default_factory=dict)
    syncs: int = 0
    launches: int = 0
    late: float = 0.0
    wall: float = 0.0
    by_kernel: dict[str, list[float]] = field(default_factory=dict)


@contextmanager
def measure() -> Iterator[Measured]:
    """Measure what runs inside, from an idle device to an idle device; the default stream is the one that counts."""
    found, backend = Measured(), device.backend
    device.module.synchronize()
    backend.clear_times()
    begun, wall = backend.thread_time(), time.perf_counter()
    yield found
    found.syncs = backend.sync_count()
    device.module.synchronize()
    found.seconds, found.wall = backend.thread_time() - begun, time.perf_counter() - wall
    times = backend.stream_times(0)
    found.kernels, found.idle, found.launches = times["kernels"], times["idle"], times["launches"]
    found.late = backend.lateness()
    found.by_kernel = {name: list(value) for name, value in backend.seconds_by_kernel().items()}


# -- kernels on the device -----------------------------------------------------------------------------------------


class Kernels(types.SimpleNamespace):
    """What stands for the product's Triton kernels: their outputs, unwritten, and one launch of their cost."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self._profile = profile

    def sketch(self, x: Tensor, index: Tensor, value: Tensor, out_dtype: torch.dtype) -> Tensor:
        """Gather single elements of x: each is a sector of the cache."""
        out = torch.empty(x.shape[0], index.shape[0], dtype=out_dtype, device=x.device)
        gathers = x.shape[0] * index.numel() * SECTOR
        self._launch("sketch", _bytes(x, index, value, out), gathers)
        return out

    def combine(self, z: Tensor, index: Tensor, value: Tensor) -> Tensor:
        """Gather whole rows of z."""
        out = torch.empty(index.shape[0], z.shape[1], device=z.device)
        self._launch("combine", _bytes(z, index, value, out), index.numel() * z.shape[1] * z.element_size())
        return out

    def subspace_apply(
        self, weight: Tensor, s: Tensor, p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor], **rest: Any
    ) -> None:
        """Write R = P s in fp32, then gather single elements of its rows for every element of the weight."""
        products = torch.empty(weight.shape[0], s.shape[1], device=weight.device)
        self._launch("subspace_apply: P s", _bytes(s, *p, products), p[0].numel() * s.shape[1] * s.element_size())
        residual = rest.get("residual")
        written = 2 * _bytes(weight) + (0 if residual is None else 2 * _bytes(residual))
        gathers = weight.shape[0] * q[0].numel() * SECTOR
        self._launch("subspace_apply: update", _bytes(products, *q) + written, gathers)

    def adam_direction(self, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, out: Tensor, **rest: Any) -> None:
        """Read and write both moments."""
        self._launch("adam_direction", 2 * _bytes(exp_avg, exp_avg_sq) + _bytes(grad, out))

    def _launch(self, name: str, nbytes: float, cache_bytes: float = 0.0) -> None:
        p = self._profile
        seconds = p.kernel_s + max(nbytes / p.bytes_per_s, cache_bytes / p.cache_bytes_per_s)
        device.backend.submit_seconds(name, seconds, p.triton_launch_s)


def charge(profile: Profile, name: str, nbytes: float, launches: int = 1) -> None:
    """Take the time of a kernel that reads and writes `nbytes` on the current stream."""
    device.backend.submit_seconds(name, profile.kernel_s + nbytes / profile.bytes_per_s, launches * profile.launch_s)


def _bytes(*tensors: Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


# -- the host ------------------------------------------------------------------------------------------------------


def replace_product_kernels(profile: Profile) -> None:
    """Let the product's Triton and host kernels take their time on the clock. Changes `meft_ds.ops` in this process."""
    from meft_ds import ops
    from meft_ds.offload.schedule import lanes, timing
    from meft_ds.subspace import calibrate

    kernels = Kernels(profile)
    for name in ("adam", "sketch"):
        module: Any = importlib.import_module(f"meft_ds.ops.{name}")  # a function of the package has the same name
        module.triton_kernels = lambda where: kernels if where.type == device.NAME else None

    def host(name: str, cost: Callable[..., float], result: Callable[..., Any] | None = None) -> None:
        real = getattr(ops, name)

        def on_the_clock(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(a, Tensor) and a.device.type != "cpu" for a in args):
                return real(*args, **kwargs)
            with paused():  # the real work, where whole numbers come of it
                found = real(*args, **kwargs) if result is None else result(*args, **kwargs)
            device.backend.clock_sleep(cost(*args, **kwargs))
            return found

        setattr(ops, name, on_the_clock)

    def moved(nbytes: float) -> float:
        return nbytes / profile.host_bytes_per_s

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    def adamw(p: Tensor, m: Tensor, v: Tensor, grad: Tensor, hyper: Any, **rest: Any) -> float:
        replica = rest.get("replica")
        return moved(2 * _bytes(p, m, v) + _bytes(grad) + (0 if replica is None else _bytes(replica)))

    def adamw_rows(p: Tensor, m: Tensor, v: Tensor, ids: Tensor, grad: Tensor, hyper: Any, **rest: Any) -> float:
        return adamw(p, m, v, grad, hyper, **rest)

    def lazy(
        p: Tensor, m: Tensor, v: Tensor, steps: Tensor, decay: Tensor, ids: Tensor, grad: Tensor, *_: Any, **rest: Any
    ) -> float:
        row = p.element_size() + m.element_size() + v.element_size()
        replica = rest.get("replica")
        written = 0 if replica is None else replica.element_size()
        return moved(grad.numel() * (2 * row + grad.element_size() + written))

    def direction(m: Tensor, v: Tensor, grad: Tensor, out: Tensor, *_: Any, **__: Any) -> float:
        return moved(2 * _bytes(m, v) + _bytes(grad, out))

    def scores(x: Tensor, keys: Tensor, starts: Tensor, experts: Tensor, tokens: Any = None) -> float:
        pairs, rows = experts.numel(), math.ceil(keys.shape[0] / (starts.numel() - 1))
        return max(2 * pairs * rows * x.shape[1] / profile.host_flops, moved(_bytes(x, keys)))

    def chosen(q: Tensor, *_: Any, **__: Any) -> float:
        return moved(4 * _bytes(q))  # scores are written, and looked at to find the smallest that stays

    def merged(rows: Any) -> float:
        parts = [_bytes(part) for _, part in rows._spilled]
        return moved(3 * sum(parts) + max(parts, default=0.0))  # zeros, then each part is read and added

    host("adamw_", adamw, nothing)
    host("adamw_rows_", adamw_rows, nothing)
    host("adamw_lazy_rows_", lazy, nothing)
    host("adam_direction_", direction, nothing)
    host("sq_norm", lambda t: moved(_bytes(t)), lambda t: 1.0)
    host("gather_rows", lambda src, ids, out: moved(2 * _bytes(out)), nothing)
    host("scatter_rows_", lambda dst, ids, rows: moved(2 * _bytes(rows)), nothing)
    host("expert_scores", scores)
    host("select_keys", chosen)
    _replace_merge(merged)
    _tell_gates(lanes)
    virtual = types.SimpleNamespace(**{**vars(time), "perf_counter": device.backend.clock_now})
    for module in (timing, calibrate):
        module.time = virtual


def _tell_gates(lanes: Any) -> None:
    """Note when a thread that launches waits for a lane."""
    real = lanes.Progress.wait_for

    def wait_for(self: Any, *args: Any) -> None:
        begun = device.backend.thread_time()
        try:
            real(self, *args)
        finally:
            device.backend.note_blocked(begun, device.backend.thread_time())

    lanes.Progress.wait_for = wait_for


def _replace_merge(cost: Callable[[Any], float]) -> None:
    """Merge spilled gradients at the speed of the profile's host, which may have ten times this machine's."""
    from meft_ds.sparse_adapter.rows.host import HostRows

    real = HostRows._merge_spilled

    def merge(self: Any) -> Any:
        with paused():
            seconds = cost(self)
            found = real(self)
        device.backend.clock_sleep(seconds)
        return found

    HostRows._merge_spilled = merge  # type: ignore[method-assign]
