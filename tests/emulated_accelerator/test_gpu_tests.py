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
STREAMS = "tests/gpu/test_streams.py::test_streams_that_are_late_change_no_bit_and_the_cpu_agrees"
CHOSEN = [
    *(f"{STREAMS}[{case}]" for case in ("adapter", "adapter and tiles", "dense", "tiles, eager")),
    *(f"{STREAMS}[{case}]" for case in ("subspace, eager", "subspace, state on the accelerator")),
    "tests/gpu/test_memory.py::test_no_more_device_memory_is_taken_than_announced[dense]",
]


@pytest.mark.slow
def test_the_tests_of_gpus_pass(emulated_forge: Forge) -> None:  # which skips where the backend cannot be built
    command = [sys.executable, "-c", PROGRAM, "-q", "-p", "no:cacheprovider", *CHOSEN]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{len(CHOSEN)} passed" in done.stdout, done.stdout[-2000:]
