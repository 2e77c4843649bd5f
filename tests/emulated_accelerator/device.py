# SPDX-License-Identifier: Apache-2.0
"""Build the backend, and register the device type "emulated" with its module `torch.emulated`.

Importing this module does both. The build takes about a minute, once per machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import sys
import time
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

NAME = "emulated"
MEMORY = 24 << 30

_SOURCES = Path(__file__).parent / "backend"
_FLAGS = ["-O1", "-g0", "-std=c++20"]


def missing() -> str:
    """Return why the backend cannot be built here; "" if it can."""
    for program in ("c++", "ninja"):
        if shutil.which(program) is None:
            return f"the emulated accelerator needs {program}"
    if torch.__version__ < "2.13":
        return "the emulated accelerator needs torch 2.13"
    return ""


def _build() -> Any:
    sources = sorted(_SOURCES.glob("*.cpp"))
    digest = hashlib.sha256("\0".join([torch.__version__, sys.version, *_FLAGS]).encode())
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.read_bytes())
    name = f"meft_emulated_{digest.hexdigest()[:16]}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    with open(folder / "flock", "w") as lock:  # torch's own lock outlives a process that is killed
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        return cpp_extension.load(
            name, [str(path) for path in sources], extra_cflags=_FLAGS, build_directory=str(folder), with_cuda=False
        )


backend = _build()
"""The compiled module: `set_delay`, `set_lazy`, `set_one_queue`, `unfinished`, `counts`, `device_usage`, ..."""


class Stream(torch.Stream):
    """A stream; with `stream_id` and so on, the one that these name."""

    def __new__(cls, device: Any = None, priority: int = 0, **named: Any) -> Stream:
        if named:
            return super().__new__(cls, priority=priority, **named)
        return super().__new__(cls, device=_device(device), priority=priority)


def Event(enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> torch.Event:
    """Make an event. No subclass: `torch.Event.elapsed_time` asks for the exact type."""
    return torch.Event(_device(None), enable_timing=enable_timing)


def current_device() -> int:
    """Return the number of the calling thread's device."""
    return torch.accelerator.current_device_index()


def _device(device: Any) -> torch.device:
    if isinstance(device, int):
        return torch.device(NAME, device)
    device = torch.device(NAME) if device is None else torch.device(device)
    return device if device.index is not None else torch.device(NAME, current_device())


def default_stream(device: Any = None) -> torch.Stream:
    """Return the stream that is current where no other was set."""
    found = _device(device)
    return torch.Stream(stream_id=0, device_index=found.index, device_type=20)


@contextlib.contextmanager
def stream(chosen: torch.Stream | None) -> Iterator[None]:
    """Make a stream the calling thread's current one."""
    if chosen is None:
        yield
        return
    before = torch.accelerator.current_stream()
    torch.accelerator.set_stream(chosen)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


def properties(device: Any = None) -> types.SimpleNamespace:
    """Return what a program may ask of the device."""
    return types.SimpleNamespace(
        name="emulated accelerator", total_memory=MEMORY, major=8, minor=9, multi_processor_count=1
    )


def memory_allocated(device: Any = None) -> int:
    """Return the bytes in use."""
    return backend.device_usage().get("", (0, 0))[0]


def max_memory_allocated(device: Any = None) -> int:
    """Return the most bytes that were in use."""
    return backend.device_usage().get("", (0, 0))[1]


def sleep(cycles: int) -> None:
    """Keep the current stream busy for so many cycles of 2 GHz, as `torch.cuda._sleep` does."""
    backend.enqueue(torch.accelerator.current_stream().stream_id, partial(time.sleep, cycles / 2e9), "sleep")


def _register() -> types.ModuleType:
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    functions: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "set_stream": torch.accelerator.set_stream,
        "current_stream": lambda device=None: torch.accelerator.current_stream(),
        "default_stream": default_stream,
        "synchronize": lambda device=None: torch.accelerator.synchronize(),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 2,
        "current_device": current_device,
        "set_device": lambda device: torch.accelerator.set_device_index(_device(device).index),
        "get_device_properties": properties,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "is_bf16_supported": lambda: True,
        "manual_seed": lambda seed: None,  # the generator is the CPU's
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "memory_allocated": memory_allocated,
        "max_memory_allocated": max_memory_allocated,
        "memory_reserved": memory_allocated,
        "max_memory_reserved": max_memory_allocated,
        "reset_peak_memory_stats": lambda device=None: backend.reset_peaks(),
        "empty_cache": lambda: None,
        "_sleep": sleep,
        "mem_get_info": lambda device=None: (MEMORY - memory_allocated(), MEMORY),
        "memory_stats": lambda device=None: {},
    }
    for name, function in functions.items():
        setattr(module, name, function)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return module


module = _register()
"""`torch.emulated`."""
DEVICE = torch.device(NAME, 0)
