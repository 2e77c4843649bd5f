# SPDX-License-Identifier: Apache-2.0
"""The schedule benchmark: it runs in seconds when small, and its last line says what a reader needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EFFICIENCIES = ("serial_efficiency", "exact_efficiency", "eager_efficiency", "zero_offload_efficiency")
KEYS = (
    *EFFICIENCIES,
    "speedup_vs_zero_offload",
    "speedup_vs_zero_offload_same_payload",
    "scenarios",
    "machine",
    "versions",
)


@pytest.mark.slow
def test_small_run_reports_every_mode_of_every_scenario(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "schedule.py"), "--picture", str(tmp_path / "lanes.png")]
    options = ["--scale", "128", "--layers", "4", "--steps", "5", "--warmup", "1", "--full-states", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(KEYS) <= set(result)
    for scenario in result["scenarios"].values():
        modes = scenario["modes"]
        assert all(0 < modes[mode]["efficiency"] <= 1.02 for mode in ("serial", "exact", "eager"))
    assert all(0 < result[key] <= 1.02 for key in EFFICIENCIES)
    assert "emulated" in result["benchmark"]
    assert result["picture"] is None or (tmp_path / "lanes.png").stat().st_size > 0
