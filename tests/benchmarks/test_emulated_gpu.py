# SPDX-License-Identifier: Apache-2.0
"""The emulated GPU benchmark: a small run reports every method, and its arithmetic over two depths is right."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.emulated_gpu import CAUSES, _cell
from benchmarks.emulated_gpu_rows import METHODS
from tests.emulated_accelerator.profiles import Profile

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_small_run_reports_every_method(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "emulated_gpu.py"), "--out", str(tmp_path / "out.json")]
    options = ["--shape", "tiny", "--layers", "2", "--tokens", "64", "--steps", "1", "--slowdown", "5"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert result["emulated"] is True and "EMULATED" in done.stdout
    for method in METHODS:
        name = f"{method}_rtx4090_64"
        assert result["cells"][name]["status"] == "ok"
        assert result[f"{name}_vs_native"] > 0 and 0 <= result[f"{name}_gpu_idle"] <= 1
        assert result[f"{name}_device_bytes"] > 0 and result[f"{name}_syncs_per_layer"] >= 0
    assert result["native_rtx4090_64_vs_native"] == 1


def test_two_depths_are_extrapolated_by_a_line() -> None:
    few, many = depth(2, fixed=1.0, layer=0.5, host=0.0), depth(4, fixed=1.0, layer=0.5, host=0.0)
    found = cell(few, many)
    assert found["s_per_step"] == pytest.approx(1.0 + 32 * 0.5 + 32 * 0.1)
    assert (found["layer_s"], found["rest_s"]) == (pytest.approx(0.6), pytest.approx(1.0))
    assert found["idle"] == pytest.approx(32 * 0.1 / found["s_per_step"])
    assert found["syncs_per_layer"] == 10
    assert found["device_bytes"] == 32 * 1000 and found["fits"] and not found["bent"]


def test_idle_time_that_falls_with_the_depth_ends_at_nothing() -> None:
    found = cell(depth(2, fixed=1.0, layer=0.5, host=2.0), depth(4, fixed=1.0, layer=0.5, host=1.0))
    assert found["idle_by_cause"]["host"] == 0 and found["bent"]
    assert found["s_per_step"] == pytest.approx(1.0 + 32 * 0.5 + 32 * 0.1)


def cell(few: dict[str, Any], many: dict[str, Any]) -> dict[str, Any]:
    arguments = argparse.Namespace(shape="7b", layers=4)
    pair = [{"tokens": {"64": found}, "host_bytes": 0} for found in (few, many)]
    return _cell(pair, "64", arguments, Profile.load("rtx4090"))


def depth(layers: int, *, fixed: float, layer: float, host: float) -> dict[str, Any]:
    """What a cell measures when a layer is idle for 0.1 s at launches and 10 syncs."""
    idle = {**dict.fromkeys(CAUSES, 0.0), "launch": 0.1 * layers, "host": host}
    kernels = fixed + layer * layers
    return {
        "s_per_step": kernels + sum(idle.values()),
        "kernels_s": kernels,
        "idle": idle,
        "syncs": 10 * layers,
        "device_bytes": 1000 * layers,
    }
