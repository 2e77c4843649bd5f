# SPDX-License-Identifier: Apache-2.0
"""Programs in interpreters of their own, as a launcher starts them; `forked.py` starts ranks ten times as fast."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
SHM = Path("/dev/shm")


def run_ranks(
    script: Path, world: int, *args: str, timeout: float = 240, env: dict[str, str] | None = None
) -> list[str]:
    """Run `script` on `world` ranks to the end; return what each printed. Fail with both streams when a rank fails."""
    port = free_port()
    processes = []
    for rank in range(world):
        ours = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), *args],
                env={**os.environ, **ours, **(env or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs, failed = [], []
    try:
        for rank, process in enumerate(processes):
            out, err = process.communicate(timeout=timeout)
            outputs.append(out)
            if process.returncode != 0:
                failed.append(f"rank {rank} ended with {process.returncode}\n{out}\n{err[-6000:]}")
    finally:
        for process in processes:
            process.kill()
    assert not failed, "\n\n".join(failed)
    return outputs


def left_in_shared_memory(pids: Iterable[int]) -> set[str]:
    """Our files that these processes made. Those of other runs on this machine come and go."""
    mine = set(map(str, pids))
    return {path.name for path in SHM.glob(f"meft-ds-{os.getuid()}-*") if path.name.split("-")[3] in mine}


def free_port() -> int:
    """A TCP port nobody listens on now.

    It lies below those that the system gives to connections, so nobody takes it before the ranks have started; each
    worker of pytest-xdist has a range of its own.
    """
    first = 20_000 + 1_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 12)
    while True:
        port = first + secrets.randbelow(1_000)  # not random's, which tests seed
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
