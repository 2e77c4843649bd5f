# SPDX-License-Identifier: Apache-2.0
"""Gathers what `gpu_check.sh` left in a folder: a summary, and gpu_check.json, which is also the last line.

    python benchmarks/gpu_check_report.py FOLDER

The exit code is 0 if each step was run and succeeded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


def main() -> None:
    folder = Path(sys.argv[1])
    steps: list[dict[str, Any]] = []
    for line in (folder / "steps.tsv").read_text().splitlines():
        name, status, seconds = line.split("\t")
        step: dict[str, Any] = {"step": name, "status": status, "seconds": int(seconds)}
        if (folder / f"{name}.xml").exists():
            step |= _counts(folder / f"{name}.xml")
        steps.append(step)
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
    rows = report["gpu_step"]["rows"] if report["gpu_step"] else []
    print(f"{sum(row['status'] == 'ok' for row in rows)} of {len(rows)} rows measured")
    print(json.dumps(report))
    sys.exit(any(step["status"] != "0" for step in steps))


def _counts(path: Path) -> dict[str, Any]:
    """Count what pytest wrote, and name what failed."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failures = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}.{case.get('name')}" for case in failures]
    counts = {"passed": len(cases) - len(failures) - skipped, "failed": len(failures), "skipped": skipped}
    return {**counts, "failures": names}


if __name__ == "__main__":
    main()
