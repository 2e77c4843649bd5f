# SPDX-License-Identifier: Apache-2.0
"""The sketch benchmark runs at a tiny size and ends with one JSON object."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_tiny_run_prints_a_table_and_json() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "sketch.py"), "--size", "70", "--tokens", "40", "--k", "3"]
    options = ["--matrices", "2", "--rounds", "2", "--threads", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert any(line.startswith("bf16 subspace_apply_") for line in table)
    result = json.loads(last)
    assert all(result[key] > 0 for key in ("bf16_vs_dense", "fp32_vs_dense", "apply_vs_copy"))
    assert (result["size"], result["threads"]) == (70, 1)
