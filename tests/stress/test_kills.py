# SPDX-License-Identifier: Apache-2.0
"""A few of the kills of kill_program.py, which has a command line for many."""

import json
import os
import subprocess
import sys

import pytest

from tests.ranks import REPO


@pytest.mark.long
def test_runs_that_are_killed_at_random_times_resume_and_go_on_bit_for_bit() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.stress.kill_program", "--kills", "8", "--seed", str(os.getpid())],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1000,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and not found["faults"], done.stdout[-3000:] + done.stderr[-3000:]
    assert found["kills"] >= 8 and found["resumes"] >= 8
