# SPDX-License-Identifier: Apache-2.0
"""What a figure was measured on: every benchmark prints the line above its table and puts the dict into its JSON."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """The CPU's name with family and model, how many a process may use, whether it has AMX (bf16 products several times
    as fast as without), the vector instructions that torch uses, torch's threads, and what the environment limits.
    """
    import torch

    fields: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model')})"
    limits = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MEFT_DS_OPS")
    return {
        "cpu": name,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "amx": "amx_tile" in fields.get("flags", "").split(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "limits": {key: os.environ[key] for key in limits if os.environ.get(key)},
    }


def machine_line(found: dict[str, Any]) -> str:
    """`found`, from `machine`, for people."""
    limits = "".join(f", {key}={value}" for key, value in found["limits"].items())
    return (
        f"{found['cpu']}, {'AMX' if found['amx'] else 'no AMX'}, torch uses {found['instructions']}{limits}; "
        f"{found['cpus']} CPUs, {found['threads']} threads"
    )
