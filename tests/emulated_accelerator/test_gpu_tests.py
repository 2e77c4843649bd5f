# SPDX-License-Identifier: Apache-2.0
"""Tests that wait for a GPU (tests/gpu) pass on the emulated accelerator, so they are right before one is there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.forked import Forge
from tests.ranks import REPO

PROGRAM = "import sys, pytest; from tests.emulated_accelerator import accelerator; accelerator.install(); "
PROGRAM += "sys.exit(pytest.main(sys.argv[1:]))"
CHOSEN = (
    *(
        "streams and adapter]",
        "streams and dense]",
        "streams and eager",
        "streams and reentrant]",
        "streams and tiles]",
    ),
    *("streams and accelerator]", "memory and dense"),
)


@pytest.mark.slow
def test_the_tests_of_gpus_pass(emulated_forge: Forge) -> None:  # which skips where the backend cannot be built
    chosen = " or ".join(f"({one})" for one in CHOSEN)
    command = [sys.executable, "-c", PROGRAM, "-q", "-p", "no:cacheprovider", "tests/gpu", "-k", chosen]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "10 passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
