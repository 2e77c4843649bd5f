# SPDX-License-Identifier: Apache-2.0
"""Ranks forked from one process that has imported everything, which makes a run of a few ranks cost a second or two.

`python -m tests.forked` is that process, after a call of the function that its argument names. It reads one JSON
request per line. It answers with the process ids of the ranks on one line and, when they have all ended, with how they
ended on another. `Forge` talks to it; the fixture `forge` in `conftest.py` is the one of the whole test run.

What a rank does is a function `name(folder, **arguments)` whose result JSON can write. It finds its rank in the
environment, as under a launcher.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.ranks import REPO, free_port, left_in_shared_memory


@dataclass
class Ended:
    """How a rank ended: its exit code (negative: the signal), after how long, what it returned, and what it logged."""

    pid: int
    code: int
    seconds: float
    result: Any
    log: str


class Forge:
    """The process that forks ranks, for the time of a `with` block.

    `preload` is "package.module:function", what it calls before its first fork.

    Example: `one, other = forge.results("tests.plugin.fault_ranks:slow", tmp_path)`
    """

    def __init__(self, preload: str = "tests.forked:preload") -> None:
        self._preload = preload

    def __enter__(self) -> Forge:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", self._preload],
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
            | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    @contextlib.contextmanager
    def running(
        self, call: str | Callable[..., Any], folder: Path, *, world: int = 2, timeout: float = 400, **arguments: Any
    ) -> Iterator[Running]:
        """Call a function on every rank with `folder` and the arguments, while the `with` block runs.

        `call` is the function, or "package.module:function" of a module that this process must not import. The block
        ends when all ranks have ended. None may leave anything in shared memory, whatever ended it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        call = call if isinstance(call, str) else f"{call.__module__}:{call.__qualname__}"
        request = {"call": call, "folder": str(folder), "world": world, "timeout": timeout, "arguments": arguments}
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        ranks = Running(self._answer())
        try:
            yield ranks
        except BaseException:
            for pid in ranks.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise
        finally:
            ranks.ended = [Ended(**entry) for entry in self._answer()]
        assert not (left := left_in_shared_memory(ranks.pids)), left

    def run(self, call: str | Callable[..., Any], folder: Path, **options: Any) -> list[Ended]:
        """As `running`; return how each rank ended."""
        with self.running(call, folder, **options) as ranks:
            pass
        return ranks.ended

    def results(self, call: str | Callable[..., Any], folder: Path, **options: Any) -> list[Any]:
        """As `run`; return what each rank returned. All must end well."""
        ended = self.run(call, folder, **options)
        assert [rank.code for rank in ended] == [0] * len(ended), "\n\n".join(rank.log[-5000:] for rank in ended)
        return [rank.result for rank in ended]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks ranks has died"
        return json.loads(line)


@dataclass
class Running:
    """Ranks that run or, once they have `ended`, have run. Each logs to `<folder>/rank<k>.log`."""

    pids: list[int]
    ended: list[Ended] = field(default_factory=list)


def preload() -> None:
    """Import and build what ranks need, so that they only have to fork."""
    import torch

    import meft_ds.ops
    from tests.toy import tiny_llama

    importlib.import_module("meft_ds.plugin.engine")
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    tiny_llama()
    meft_ds.ops.backend()
    build = getattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", None)
    if build is not None:
        build()


def fork_ranks(world: int, body: Callable[[int], Any], folder: Path) -> list[int]:
    """Process ids of ranks that run `body(rank)` with a launcher's environment; each logs to `<folder>/rank<k>.log`."""
    port = free_port()
    pids = []
    for rank in range(world):
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            _be_rank(rank, world, port, body, folder)
        pids.append(pid)
    return pids


def _be_rank(rank: int, world: int, port: int, body: Callable[[int], Any], folder: Path) -> None:
    code = 1
    try:
        log = os.open(folder / f"rank{rank}.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        _renew_threads()
        result = body(rank)
        (folder / f"rank{rank}.json").write_text(json.dumps(result))
        _part()
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # what an interpreter that ends runs first
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _renew_threads() -> None:
    """Let torch make its pool of threads anew now: autograd's threads, which start at once, would race for it."""
    import torch

    torch.set_num_threads(1)


def _part() -> None:
    """Wait for the others: a rank that ends tears a collective away from one that is still in it."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    _named(sys.argv[1])()
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        function = _named(request["call"])
        for path in folder.glob("rank*.json"):
            path.unlink()
        began = time.monotonic()
        pids = fork_ranks(request["world"], lambda rank: function(folder, **request["arguments"]), folder)  # noqa: B023
        print(json.dumps(pids), file=answers, flush=True)
        stop = threading.Timer(request["timeout"], lambda: [os.kill(pid, signal.SIGKILL) for pid in pids])  # noqa: B023
        stop.start()
        ended = {}
        for _ in pids:
            pid, status = os.wait()
            ended[pid] = (pid, os.waitstatus_to_exitcode(status), time.monotonic() - began)
        stop.cancel()
        stop.join()  # no thread may run when the next ranks are forked
        print(
            json.dumps([_ended(folder, rank, *ended[pid]) for rank, pid in enumerate(pids)]), file=answers, flush=True
        )


def _named(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _ended(folder: Path, rank: int, pid: int, code: int, seconds: float) -> dict[str, Any]:
    result, log = folder / f"rank{rank}.json", folder / f"rank{rank}.log"
    return {
        "pid": pid,
        "code": code,
        "seconds": seconds,
        "result": json.loads(result.read_text()) if result.exists() else None,
        "log": log.read_text(errors="replace") if log.exists() else "",  # not yet, if it was killed at once
    }


if __name__ == "__main__":
    _serve()
