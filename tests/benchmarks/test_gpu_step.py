# SPDX-License-Identifier: Apache-2.0
"""The step benchmark: its tiny preset runs anywhere, and what goes wrong in a row becomes a row."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.child_process import run_child

ROOT = Path(__file__).resolve().parents[2]
WRITE_OK = "from benchmarks.child_process import write_result; write_result({'status': 'ok', 'own_peak_bytes': 2**30})"


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]


@pytest.mark.slow
def test_tiny_preset_measures_native_and_meft_and_reports_what_fails(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_step.py"), "--models", "tiny", "--rows", "native,meft"]
    options = ["--accumulation", "1", "--steps", "2", "--seq-len", "16", "--micro-batch", "2", "--out", str(out)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text())
    native, meft = report["rows"]
    assert native["status"] == meft["status"] == "ok"
    assert native["practicality"] == 1.0
    assert meft["bytes_down"] > 0 and meft["bytes_up"] > 0
    assert meft["loss_last"] < meft["loss_first"]


def test_result_counts_whatever_the_exit_code() -> None:
    result = run_child(_python(f"{WRITE_OK}\nimport os; os._exit(3)"), timeout_s=60)
    assert result["status"] == "ok"
    assert result["host_gib"] == 1.0


def test_child_over_its_time_is_ended_with_all_that_it_started() -> None:
    code = "import subprocess, time\nsubprocess.Popen(['sleep', '987654'])\ntime.sleep(600)"
    result = run_child(_python(code), timeout_s=2)
    assert result["status"] == "over its time limit"
    assert "987654" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_child_that_fails_says_why() -> None:
    result = run_child(_python("raise RuntimeError('no such kernel')"), timeout_s=60)
    assert result["status"] == "failed with exit code 1: RuntimeError: no such kernel"


def test_child_killed_for_memory_is_named_so() -> None:
    result = run_child(_python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), timeout_s=60)
    assert result["status"].startswith("killed, most likely for host memory")
