# SPDX-License-Identifier: Apache-2.0
"""What all tests share: ranks that are forked, fresh interpreters, and how many examples hypothesis tries."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; workers of pytest-xdist share the CPUs

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import tests.toy  # noqa: F401  fp16 for tests that build their engines without it
from tests.forked import Forge

RunPython = Callable[..., subprocess.CompletedProcess[str]]

# Machines that run other things too make deadlines fail.
settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=200, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    """The process that forks ranks, one for each worker of pytest-xdist."""
    with Forge() as made:
        yield made


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
