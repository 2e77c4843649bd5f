# SPDX-License-Identifier: Apache-2.0
"""What of this machine and this environment matters to a run, looked at and measured in a few seconds."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import torch

from meft_ds import __version__, ops
from meft_ds.cli import config_checks
from meft_ds.cli.report import Check, finding, fine, note
from meft_ds.config import BLOCK
from meft_ds.offload.host.cgroup import cpu_quota
from meft_ds.offload.host.memory import free_host_bytes, free_shared_bytes, in_units
from meft_ds.offload.schedule.host_threads import allowed_cpus
from meft_ds.ops import build
from meft_ds.ops.adam import AdamHyper
from meft_ds.plugin import build_locks
from meft_ds.plugin import ds_config as checks

_VALUES = 2**23
_SECONDS = 1.0


def examine(ds_config: dict[str, Any] | None, *, start: bool = True) -> tuple[list[Check], dict[str, Any]]:
    """Return all lines, and what was measured.

    Args:
        ds_config: to be judged and started; None takes an empty block.
        start: whether to start an engine on a toy model.
    """
    measured: dict[str, Any] = {}
    locks = _locks()
    lines = [*_versions(), *_autoload(), *_compiler(), *locks, *_cpus(), *_memory()]
    lines += _host_speed(measured)
    lines += _accelerators(measured)
    judged = [] if ds_config is None else config_checks.judged(ds_config)
    lines += judged
    asked = {BLOCK: {}} if ds_config is None else ds_config
    if not start or BLOCK not in asked:
        return lines, measured
    stale = any(line.level == "finding" for line in locks)
    if any(line.level == "finding" for line in judged):
        return [*lines, note("engine", "no toy engine was started, because the config has faults")], measured
    return [*lines, config_checks.started(asked, 90 if stale else 300)], measured


def _versions() -> list[Check]:
    lines = [note("versions", f"meft-ds {__version__}, Python {platform.python_version()}, torch {torch.__version__}")]
    try:
        outside = checks.version_warnings()
    except PackageNotFoundError as fault:
        return [*lines, finding("versions", f"{fault.name} is not installed", f"run: pip install {fault.name}")]
    tested = ", ".join(f"{name} {version(name)}" for name in checks.TESTED)
    lines += [finding("versions", line, "install a version within that range") for line in outside]
    return lines if outside else [*lines, fine("versions", f"{tested}: within the tested ranges")]


def _autoload() -> list[Check]:
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return [finding("autoload", "TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches the hook off", "unset it")]
    if not any(entry.value == "meft_ds.autoload:arm" for entry in entry_points(group="torch.backends")):
        text = f"{sys.executable} has no entry point of meft-ds, so `import torch` does not arm the hook"
        return [finding("autoload", text, f"run: {sys.executable} -m pip install meft-ds")]
    return [fine("autoload", f"`import torch` arms the hook in {sys.executable}")]


def _compiler() -> list[Check]:
    if os.environ.get("MEFT_DS_OPS", "").lower() == "torch":
        text = "MEFT_DS_OPS=torch: the host update takes the slower plain torch path"
        return [finding("kernels", text, "unset MEFT_DS_OPS")]
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    state = f"compiler {compiler or 'none'}"
    if build.is_built():
        return [fine("kernels", f"the C++ kernels for this machine are built; {state}")]
    if compiler is None:
        fix = "install a C++17 compiler (Debian: apt-get install g++)"
        return [finding("kernels", "the C++ kernels are not built, and there is no compiler", fix)]
    return [note("kernels", f"the C++ kernels are not built yet, the first start builds them in about 20 s; {state}")]


def _locks() -> list[Check]:
    found = build_locks.find()
    if not found:
        return [fine("build locks", "none in torch's extension folder")]
    return [
        note("build locks", lock.told()) if lock.held else finding("build locks", lock.told(), lock.fix())
        for lock in found
    ]


def _cpus() -> list[Check]:
    features = set(build.cpu_features().split())
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve") if name in features]
    allowed, quota = len(allowed_cpus()), cpu_quota()
    limited = "" if quota is None else f", a cgroup gives {quota:g} of them"
    lines = [
        note("CPUs", f"this process may use {allowed}{limited}; {' '.join(known) or 'no vector extensions known'}")
    ]
    omp = os.environ.get("OMP_NUM_THREADS")
    if omp == "1" and min(allowed, quota or allowed) > 1:
        text = f"OMP_NUM_THREADS=1 leaves the host update 1 thread of {allowed}"
        lines.append(finding("CPUs", text, "unset it, or set meft_offload.schedule.host_threads"))
    else:
        lines.append(
            note("CPUs", f"OMP_NUM_THREADS is {omp or 'not set'}, torch uses {torch.get_num_threads()} threads")
        )
    return lines


def _memory() -> list[Check]:
    free, shared = free_host_bytes(), free_shared_bytes()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    locked = "unlimited" if soft == resource.RLIM_INFINITY else in_units(soft)
    lines = [
        note("memory", f"{in_units(free)} of {in_units(total)} may be taken (cgroups included); ulimit -l {locked}")
    ]
    if shared < 2**30:
        text = f"/dev/shm has {in_units(shared)} free, and several ranks share rows there"
        lines.append(finding("memory", text, "containers: start with --shm-size=8g or more; one rank needs none"))
    else:
        lines.append(fine("memory", f"/dev/shm has {in_units(shared)} free, which several ranks share"))
    return lines


def _host_speed(measured: dict[str, Any]) -> list[Check]:
    p, m, v, g = (torch.zeros(_VALUES, device="cpu") for _ in range(4))
    hyper = AdamHyper(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    path = ops.backend()
    rate = _VALUES / _seconds(lambda: ops.adamw_(p, m, v, g, hyper, step=1))
    bandwidth = 2 * 4 * _VALUES / _seconds(lambda: p.copy_(g))
    measured |= {"host_adamw_params_per_s": rate, "host_copy_bytes_per_s": bandwidth, "host_ops": path}
    text = (
        f"AdamW updates {rate / 1e6:,.0f} M parameters/s ({path}), copies move {bandwidth / 1e9:.1f} GB/s, measured now"
    )
    return [note("host speed", text)]


def _seconds(work: Any) -> float:
    """Return the median seconds of `work` over about a second."""
    work()
    taken: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(taken) < 3 or (time.perf_counter() < end and len(taken) < 1000):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[len(taken) // 2]


def _accelerators(measured: dict[str, Any]) -> list[Check]:
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            text = f"nvidia-smi is here but torch {torch.__version__} sees no GPU"
            return [finding("GPU", text, "install a CUDA build of torch that the driver can run; see nvidia-smi")]
        return [note("GPU", "torch sees none: engines start on the CPU")]
    lines = []
    for index in range(torch.cuda.device_count()):
        about = _of_gpu(index)
        measured[f"gpu{index}"] = about
        down, up, rate = (about[key] / 1e9 for key in ("down_bytes_per_s", "up_bytes_per_s", "bf16_flop_per_s"))
        text = f"{about['name']}, {in_units(about['total'])}, {in_units(about['used'])} in use; pinned memory "
        text += f"{down:.1f} GB/s down, {up:.1f} GB/s up; bf16 GEMM {rate / 1e3:.1f} TFLOP/s, measured now"
        lines.append(note(f"GPU {index}", text))
    return lines


def _of_gpu(index: int) -> dict[str, Any]:
    device = torch.device("cuda", index)
    free, total = torch.cuda.mem_get_info(device)
    about: dict[str, Any] = {"name": torch.cuda.get_device_name(device), "total": total, "used": total - free}
    host, there = (
        torch.empty(2**28, dtype=torch.uint8, device="cpu", pin_memory=True),
        torch.empty(2**28, dtype=torch.uint8, device=device),
    )
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)

    def timed(work: Any) -> float:
        def whole() -> None:
            work()
            torch.cuda.synchronize(device)

        return _seconds(whole)

    about["down_bytes_per_s"] = there.numel() / timed(lambda: host.copy_(there, non_blocking=True))
    about["up_bytes_per_s"] = there.numel() / timed(lambda: there.copy_(host, non_blocking=True))
    about["bf16_flop_per_s"] = 2 * 4096**3 / timed(lambda: a @ a)
    return about
