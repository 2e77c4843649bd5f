# SPDX-License-Identifier: Apache-2.0
"""The script for a machine with a GPU: steps have limits, none stops the next, and the report says what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# In place of `python`: what the script starts is told from its arguments, and the rest goes to Python itself.
STAND_IN = f"""#!/usr/bin/env bash
for word in "$@"; do
    [[ "$before" == --out ]] && out="$word"
    before="$word"
done
case "$*" in
    *pip\\ install*) echo "asked for $*" ;;
    *tests/gpu/test_sanitizer.py*) echo "sanitizer: $TORCH_CUDA_SANITIZER"
        echo -n 'tests/gpu/b.py::hangs '; sleep 43210 ;;
    *tests/gpu*) echo "interpret: ${{TRITON_INTERPRET-unset}}, sanitizer: ${{TORCH_CUDA_SANITIZER-unset}}"
        echo 'tests/gpu/a.py::good PASSED [ 10%]'
        echo 'tests/gpu/a.py::bad[one, two] FAILED [ 20%]'
        echo 'tests/gpu/a.py::none SKIPPED (why) [ 30%]'
        exit 1 ;;
    *gpu_step.py*) echo "asked for $*"; echo '{{"rows": [{{"status": "ok"}}, {{"status": "not run"}}]}}' >"$out" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


def check(out: Path, *options: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """Run the script; returns its exit code and its report."""
    command = [str(ROOT / "benchmarks" / "gpu_check.sh"), *options, str(out)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=200)
    assert (out / "gpu_check.json").exists(), done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((out / "gpu_check.json").read_text())
    return done.returncode, report


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    """A program in place of `python`."""
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return str(path)


def test_steps_that_fail_or_hang_do_not_keep_the_next_from_running(tmp_path: Path, stand_in: str) -> None:
    out, wheels = tmp_path / "results", tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "some.whl").touch()
    options = ("--minutes", "0.4", "--wheels", str(wheels), "--models", "3b")
    code, report = check(out, *options, PYTHON=stand_in, TRITON_INTERPRET="1")
    assert code == 1
    assert [(step["step"], step["status"]) for step in report["steps"]] == [
        ("install", "0"),
        ("tests", "1"),
        ("sanitizer", "over its 2 s"),
        ("steps", "0"),
    ]
    tests = report["steps"][1]
    assert (tests["passed"], tests["failed"], tests["skipped"]) == (1, 1, 1) and tests["never_ended"] == []
    assert tests["failures"] == ["tests/gpu/a.py::bad[one, two]"]
    assert report["steps"][2]["never_ended"] == ["tests/gpu/b.py::hangs"]
    assert len(report["gpu_step"]["rows"]) == 2
    assert f"--no-index --find-links {wheels} {wheels}/some.whl" in (out / "install.log").read_text()
    assert (out / "tests.log").read_text().startswith("interpret: unset, sanitizer: unset\n")
    assert (out / "sanitizer.log").read_text().startswith("sanitizer: 1\n")
    assert "--models 3b" in (out / "steps.log").read_text()
    assert "sleep 43210" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_without_time_each_step_is_said_not_to_have_run(tmp_path: Path, stand_in: str) -> None:
    code, report = check(tmp_path, "--minutes", "0.01", PYTHON=stand_in)
    assert code == 1 and report["gpu_step"] is None
    assert {step["step"]: step["status"] for step in report["steps"]} == dict.fromkeys(
        ("tests", "sanitizer", "steps"), "not run"
    )


@pytest.mark.slow
def test_it_runs_dry_where_there_is_no_gpu(tmp_path: Path) -> None:
    _, report = check(tmp_path, "--dry-run", "--minutes", "3", PYTHON=sys.executable)
    assert [step["status"] for step in report["steps"]] == ["0", "0", "0"]
    assert report["steps"][0]["skipped"] > 100 and report["steps"][1]["skipped"] > 10
    assert [(row["row"], row["status"]) for row in report["gpu_step"]["rows"]] == [("torch", "ok"), ("tiles", "ok")]
