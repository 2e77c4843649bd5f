# SPDX-License-Identifier: Apache-2.0
"""What this package adds to every `import torch`: python benchmarks/import_time.py [--rounds 15]

Each round starts four fresh interpreters, in turns so that a busy moment hits all of them alike:
  on      `import torch` as installed; our share is the time inside the entry point's load (imports meft_ds and
          meft_ds.autoload) and its call of arm()
  off     the same with TORCH_DEVICE_BACKEND_AUTOLOAD=0; on - off also holds PyTorch's own discovery of entry points
  scan    that discovery alone, `importlib.metadata.entry_points`, which torch does whether or not we are installed
  alone   `import meft_ds` without torch
Bytecode is cached, as in an installed wheel: PYTHONDONTWRITEBYTECODE is taken out of the environment. Goal:
`arm_ms_median` < 1. The last line is JSON; all times are milliseconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import machine, machine_line  # noqa: E402

# Times EntryPoint.load plus the call of what it returns, for our entry point only.
ON = """
import time, importlib.metadata as metadata
spent = [0.0]
load = metadata.EntryPoint.load
def timed_load(self):
    if self.value != "meft_ds.autoload:arm":
        return load(self)
    # What torch itself has imported by now is not our cost.
    begin = time.perf_counter()
    loaded = load(self)
    spent[0] += time.perf_counter() - begin
    def call():
        begin = time.perf_counter()
        loaded()
        spent[0] += time.perf_counter() - begin
    return call
metadata.EntryPoint.load = timed_load
begin = time.perf_counter()
import torch
total = time.perf_counter() - begin
print(spent[0] * 1e3, total * 1e3)
"""
OFF = "import time; b = time.perf_counter(); import torch; print((time.perf_counter() - b) * 1e3)"
SCAN = """
import time, importlib.metadata as metadata
b = time.perf_counter(); list(metadata.entry_points(group="torch.backends")); print((time.perf_counter() - b) * 1e3)
"""
ALONE = "import time; b = time.perf_counter(); import meft_ds; print((time.perf_counter() - b) * 1e3)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds, after one that warms the file cache")
    rounds = parser.parse_args().rounds
    arm, total_on, total_off, scan, alone = [], [], [], [], []
    for round_number in range(rounds + 1):
        on = _python(ON)
        off, scanned, imported = (
            _python(OFF, TORCH_DEVICE_BACKEND_AUTOLOAD="0"),
            _python(SCAN),
            _python(ALONE, TORCH_DEVICE_BACKEND_AUTOLOAD="0"),
        )
        if round_number == 0:
            continue
        if on[0] == 0.0:
            raise SystemExit("The entry point did not run: install the package first (pip install -e .)")
        arm.append(on[0])
        total_on.append(on[1])
        total_off.append(off[0])
        scan.append(scanned[0])
        alone.append(imported[0])

    rows = [
        ("our entry point (load + arm)", arm),
        ("import torch, autoload on", total_on),
        ("import torch, autoload off", total_off),
        ("entry point discovery (torch's own)", scan),
        ("import meft_ds without torch", alone),
    ]
    print(machine_line(machine()))
    print(f"{'':38}{'median ms':>12}{'min ms':>12}{'max ms':>12}   ({rounds} rounds)")
    for name, values in rows:
        print(f"{name:38}{statistics.median(values):12.3f}{min(values):12.3f}{max(values):12.3f}")
    result = {
        "arm_ms_median": statistics.median(arm),
        "arm_ms_max": max(arm),
        "torch_on_ms_median": statistics.median(total_on),
        "torch_off_ms_median": statistics.median(total_off),
        "discovery_ms_median": statistics.median(scan),
        "import_alone_ms_median": statistics.median(alone),
        "rounds": rounds,
        "python": sys.version.split()[0],
        "machine": machine(),
    }
    print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in result.items()}))


def _python(code: str, **env: str) -> list[float]:
    """Runs `code` in a fresh interpreter and returns the numbers on its last line."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


if __name__ == "__main__":
    main()
