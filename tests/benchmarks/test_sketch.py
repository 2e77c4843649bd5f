# SPDX-License-Identifier: Apache-2.0
"""The sketch benchmark runs at a tiny size and ends with one JSON object."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.machine import machine, machine_line

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
    assert (result["size"], result["machine"]["threads"]) == (70, 1)
    assert table[0] == machine_line(result["machine"])


@pytest.mark.parametrize(("flags", "told"), [("avx2 amx_tile amx_bf16", "AMX"), ("avx2 avx512_bf16", "no AMX")])
def test_a_figure_says_which_cpu_and_whether_it_has_amx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, told: str
) -> None:
    name = "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9354\n"
    (tmp_path / "cpuinfo").write_text(f"{name}flags\t\t: {flags}\n")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    line = machine_line(machine(tmp_path / "cpuinfo"))
    assert line.startswith(f"AMD EPYC 9354 (family 25, model 17), {told}, torch uses ") and "ISA=AVX2" in line
