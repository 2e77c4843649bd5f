# SPDX-License-Identifier: Apache-2.0
"""Runs one measurement in a fresh process: a failure, an out-of-memory kill or a hang becomes a result, not a crash."""

import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT_VARIABLE = "MEFT_BENCHMARK_RESULT"


def run_child(command: list[str], timeout_s: float) -> dict[str, Any]:
    """Runs `command`, which calls `write_result`, and returns that result.

    Always holds `status` ("ok" or what went wrong), `wall_s`, and `host_gib`: the peak memory of the process tree.
    Whatever the child started is ended too.
    """
    with tempfile.TemporaryDirectory() as folder:
        result_path, log_path = Path(folder) / "result.json", Path(folder) / "log"
        begin = time.monotonic()
        with log_path.open("wb") as log:
            child = subprocess.Popen(
                command,
                env={**os.environ, RESULT_VARIABLE: str(result_path)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        peak = 0
        try:
            while child.poll() is None and time.monotonic() - begin < timeout_s and not result_path.exists():
                peak = max(peak, _tree_bytes(child.pid))
                time.sleep(0.2)
            # With its result written, a child only has to leave; some engines hang there.
            patience = 20 if result_path.exists() else 0.1
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                pass
        finally:
            _end_group(child)
        if result_path.exists():
            result = json.loads(result_path.read_text())
        else:
            result = {"status": _what_happened(child.returncode, time.monotonic() - begin >= timeout_s, log_path)}
        result["wall_s"] = round(time.monotonic() - begin, 1)
        result["host_gib"] = round(max(peak, result.pop("own_peak_bytes", 0)) / 2**30, 3)
        return result


def write_result(result: dict[str, Any]) -> None:
    """Called by the child, once: hands `result` to the parent."""
    path = Path(os.environ[RESULT_VARIABLE])
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result))
    temporary.rename(path)


def _tree_bytes(pid: int) -> int:
    """Resident bytes of a process and all below it; pages that a child shares count with the process on top only."""
    import psutil

    try:
        top = psutil.Process(pid)
        total = top.memory_info().rss
        for process in top.children(recursive=True):
            memory = process.memory_info()
            total += memory.rss - memory.shared
        return total
    except psutil.Error:
        return 0


def _end_group(child: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, sign)
        except ProcessLookupError:
            break
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def _what_happened(returncode: int, timed_out: bool, log_path: Path) -> str:
    if timed_out:
        return "over its time limit"
    if returncode == -signal.SIGKILL:
        return "killed, most likely for host memory (SIGKILL)"
    lines = log_path.read_text(errors="replace").strip().splitlines()
    return f"failed with exit code {returncode}: {lines[-1][:200] if lines else 'no output'}"
