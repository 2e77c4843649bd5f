# SPDX-License-Identifier: Apache-2.0
"""The machines that the clock knows: benchmarks/profiles, published peaks times stated efficiencies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

PROFILES = Path(__file__).resolve().parents[2] / "benchmarks" / "profiles"


@dataclass(frozen=True)
class Profile:
    """One machine: rates that kernels reach, in bytes, operations and seconds."""

    name: str
    memory_bytes: int
    matmul_flops: float
    half_size: float
    fp32_flops: float
    bytes_per_s: float
    cache_bytes_per_s: float
    kernel_s: float
    launch_s: float
    triton_launch_s: float
    pcie: dict[str, float]
    host_bytes_per_s: float
    host_flops: float
    python: float

    @classmethod
    def load(cls, name: str) -> Profile:
        """Return the profile of a file in benchmarks/profiles.

        Raises:
            ValueError: for a name that has no file.
        """
        path = PROFILES / f"{name}.json"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.json")))
            raise ValueError(f"there is no profile {name!r}; there are {known}")
        raw = json.loads(path.read_text())
        matmul, fp32, memory, host = (raw[key] for key in ("matmul", "fp32", "memory", "host"))
        return cls(
            name=raw["name"],
            memory_bytes=raw["memory_bytes"],
            matmul_flops=matmul["peak_flops"] * matmul["efficiency"],
            half_size=matmul["half_size"],
            fp32_flops=fp32["peak_flops"] * fp32["efficiency"],
            bytes_per_s=memory["peak_bytes_per_s"] * memory["efficiency"],
            cache_bytes_per_s=memory["cache_bytes_per_s"],
            kernel_s=raw["kernel_us"] * 1e-6,
            launch_s=raw["launch_us"] * 1e-6,
            triton_launch_s=raw["triton_launch_us"] * 1e-6,
            pcie=raw["pcie"],
            host_bytes_per_s=host["bytes_per_s"],
            host_flops=host["flops"],
            python=host["python"],
        )

    def matmul(self, m: float, n: float, k: float) -> float:
        """Return the seconds of one bf16 product, without its fixed time and its bytes."""
        shortest = min(m, n, k)
        return 2 * m * n * k / (self.matmul_flops * shortest / (shortest + self.half_size))
