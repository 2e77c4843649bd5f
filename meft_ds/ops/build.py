# SPDX-License-Identifier: Apache-2.0
"""Choose the path that an op takes: C++ on the host, Triton on a GPU, plain torch elsewhere. Compile the C++ once.

The first op compiles the C++ kernels. Setting ``MEFT_DS_OPS=torch`` in the environment chooses plain torch everywhere.
The build goes to torch's extension folder (``TORCH_EXTENSIONS_DIR``). The name of the build holds a hash of everything
that the result depends on, so different machines may share a home folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from meft_ds.ops.checks import CPU

logger = logging.getLogger(__name__)

#: Codes of the dtypes that the kernels know (``meft::Dtype`` in csrc/numbers.h).
DTYPE_CODES: dict[torch.dtype | None, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, None: 3}

_CSRC = Path(__file__).parent / "csrc"
# No -ffast-math: it would drop NaN and infinity, and flush subnormals in the whole process. -fno-math-errno and
# -fno-trapping-math only let the compiler use vector instructions for sqrt and for conditional moves.
_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden")
_NATIVE_FLAGS = ("-mcpu=native",) if platform.machine() == "aarch64" else ("-march=native",)
_OPENMP_FLAGS = ("-fopenmp",)
_loading = threading.Lock()
_without_triton = threading.Event()


def backend() -> Literal["cpp", "torch"]:
    """Return the path that ops on host tensors take. The first call may compile (about 20 s, once per machine)."""
    return "torch" if kernels() is None else "cpp"


def is_built() -> bool:
    """Return whether the C++ kernels for this machine and environment are built, without building them."""
    from torch.utils import cpp_extension

    name = f"meft_ds_ops_{_fingerprint()}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    return (folder / "finished").exists() and (folder / f"{name}.so").exists()


def kernels(device: torch.device = CPU) -> Any | None:
    """Return the compiled extension module, or None where another path serves tensors on `device`."""
    if device.type != "cpu" or _plain_torch():
        return None
    with _loading:
        return _load_once()


def triton_kernels(device: torch.device) -> Any | None:
    """Return the module of Triton kernels, or None where another path serves tensors on `device`."""
    if device.type != "cuda" or _plain_torch() or _without_triton.is_set():
        return None
    module, fault = _probed(device)
    if fault:
        do_without_triton(fault)
    return module


def triton_fault(device: torch.device) -> str:
    """Return why Triton's kernels cannot run on `device`; "" where they can, and where nobody asks for them.

    The first call runs one, which may compile (about a second, once per machine).
    """
    return "" if device.type != "cuda" or _plain_torch() else _probed(device)[1]


def do_without_triton(fault: str, *, warn: bool = True) -> None:
    """Take plain torch on accelerators from now on, because of `fault`, perhaps another rank's."""
    known = _without_triton.is_set()
    _without_triton.set()
    if warn and not known:
        logger.warning(
            "Triton's kernels cannot run (%s); going on with the slower plain torch path. Triton needs a C compiler "
            "and Python's headers; MEFT_DS_OPS=torch silences this.",
            fault,
        )


def typed(t: Tensor | None) -> tuple[int, int]:
    """Return (address, code of the dtype) as kernels take a tensor that may have several dtypes or be left out."""
    return address(t), DTYPE_CODES[None if t is None else t.dtype]


def address(t: Tensor | None) -> int:
    """Return where the values lie; 0 for a tensor that is left out."""
    return 0 if t is None else t.data_ptr()


def _plain_torch() -> bool:
    return os.environ.get("MEFT_DS_OPS", "").lower() == "torch"


def _probed(device: torch.device) -> tuple[Any | None, str]:
    with _loading:
        return _probe_once(device)


@functools.cache
def _probe_once(device: torch.device) -> tuple[Any | None, str]:
    try:
        from meft_ds.ops import triton_sketch

        triton_sketch.probe(device)
    except Exception as error:
        logger.debug("Triton's kernels cannot run", exc_info=error)
        return None, _reason(error)
    return triton_sketch, ""


def _reason(error: Exception) -> str:
    """Return an error's last line: compilers tell much before it."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), repr(error))


@functools.cache
def _load_once() -> Any | None:
    try:
        return _load()
    except Exception as error:
        logger.warning(
            "the C++ host kernels could not be built (%s); going on with the slower plain torch path. "
            "A C++17 compiler and ninja are needed; MEFT_DS_OPS=torch silences this.",
            _reason(error),
        )
        logger.debug("build of the C++ host kernels failed", exc_info=error)
        return None


def _load() -> Any:
    from torch.utils import cpp_extension

    name = f"meft_ds_ops_{_fingerprint()}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    library, finished = folder / f"{name}.so", folder / "finished"
    # The operating system frees this lock when its holder dies. Torch's own lock file would stay behind and block every
    # later start, so the process that holds our lock removes it.
    with open(folder / "flock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if finished.exists() and library.exists():
            with contextlib.suppress(ImportError):
                return _import(name, library)
        (folder / "lock").unlink(missing_ok=True)
        with _quiet(), _ninja_on_path():
            module = cpp_extension.load(
                name,
                [str(source) for source in sorted(_CSRC.glob("*.cpp"))],
                extra_cflags=[*_FLAGS, *_NATIVE_FLAGS, *_OPENMP_FLAGS],
                extra_ldflags=list(_OPENMP_FLAGS),
                build_directory=str(folder),
                with_cuda=False,
            )
        finished.touch()
        return module


def _import(name: str, library: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fingerprint() -> str:
    """Return a hash of sources, flags, compiler choice, torch, Python and the CPU's instruction sets."""
    parts = [torch.__version__, sys.version, platform.machine(), os.environ.get("CXX", ""), cpu_features()]
    parts += [*_FLAGS, *_NATIVE_FLAGS, *_OPENMP_FLAGS]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(_CSRC.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def cpu_features() -> str:
    """Return the CPU's instruction sets as the operating system names them."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return " ".join(sorted(value.split()))
    return platform.processor()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide torch's remarks on compilers: the user gets one warning, from `_load_once`."""
    torch_logger = logging.getLogger("torch.utils.cpp_extension")
    level = torch_logger.level
    torch_logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch_logger.setLevel(level)


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Let torch find a ninja that is installed beside the interpreter, even if that environment is not activated."""
    beside_python = Path(sys.executable).parent
    if shutil.which("ninja") or not (beside_python / "ninja").exists():
        yield
        return
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{before}{os.pathsep}{beside_python}" if before else str(beside_python)
    try:
        yield
    finally:
        os.environ["PATH"] = before
