# SPDX-License-Identifier: Apache-2.0
"""Gathers what `gpu_check.sh` left in a folder: a summary, and gpu_check.json, which is also the last line.

    python benchmarks/gpu_check_report.py FOLDER

The exit code is 0 if each step was run and succeeded.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    folder = Path(sys.argv[1])
    steps: list[dict[str, Any]] = []
    for line in (folder / "steps.tsv").read_text().splitlines():
        name, status, seconds = line.split("\t")
        step: dict[str, Any] = {"step": name, "status": status, "seconds": int(seconds)}
        log = folder / f"{name}.log"
        steps.append(step | (_counts(log.read_text(errors="replace")) if log.exists() else {}))
    report: dict[str, Any] = {"benchmark": "gpu_check", "steps": steps, "gpu_step": None}
    measured = folder / "gpu_step.json"
    if measured.exists():
        report["gpu_step"] = json.loads(measured.read_text())
    (folder / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\nstep        status                seconds")
    for step in steps:
        counts = "".join(f", {step[key]} {key}" for key in ("passed", "failed", "skipped") if key in step)
        print(f"{step['step']:12}{step['status']:20}{step['seconds']:>9}{counts}")
        for name in step.get("failures", ()):
            print(f"    failed: {name}")
        for name in step.get("never_ended", ()):
            print(f"    never ended: {name}")
    rows = report["gpu_step"]["rows"] if report["gpu_step"] else []
    print(f"{sum(row['status'] == 'ok' for row in rows)} of {len(rows)} rows measured")
    print(json.dumps(report))
    sys.exit(any(step["status"] != "0" for step in steps))


def _counts(log: str) -> dict[str, Any]:
    """Count what pytest told with -v, and name what failed, and the test that never ended; {} of another log."""
    told = re.findall(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", log, re.MULTILINE)
    begun = re.findall(r"^(tests/\S+::.+?) $", log, re.MULTILINE)  # and no more: it was ended
    if not told and not begun:
        return {}
    how_many = {word.lower(): sum(result == word for _, result in told) for word in ("PASSED", "FAILED", "SKIPPED")}
    bad = [name for name, result in told if result in ("FAILED", "ERROR")]
    return {**how_many, "failures": bad, "never_ended": begun}


if __name__ == "__main__":
    main()
