# SPDX-License-Identifier: Apache-2.0
"""What all tests share: a fresh interpreter for tests whose subject is import order or process-wide state."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; workers of pytest-xdist share the CPUs

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import tests.toy  # noqa: F401  fp16 for tests that build their engines without it

RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def linear() -> Iterator[None]:
    """ZeRO-3 replaces torch's linear by DeepSpeed's for as long as the process lives: put torch's back."""
    own = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = own


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Runs Python code in a new interpreter, outside the repository, and returns its result; fails if it fails.

    Keyword arguments: `env` (dict of str, added to the environment), `args` (interpreter options, or a script's path),
    `check` (default True).
    """

    def run(
        code: str, *, env: dict[str, str] | None = None, args: tuple[str, ...] = (), check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
        result = subprocess.run(
            [sys.executable, *args, "-c", code],
            env={**inherited, "OMP_NUM_THREADS": "1", **(env or {})},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check and result.returncode != 0:
            pytest.fail(f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result

    return run
