# SPDX-License-Identifier: Apache-2.0
"""What ranks do in test_faults.py and test_kill_points.py: functions that a forge runs on every rank."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist

from tests.plugin.tiles import digest, everything
from tests.toy import ADAPTER, batch, ds_config, make_engine, tiny_llama

TILES = {"density": 0.1, "block_size": 8, "warmup_steps": 2}


def engine_for(seed: int = 0, mode: str = "exact", **settings: Any) -> Any:
    """Rows, tiles and a whole norm on a tiny Llama; tiles are scored in the first two steps."""
    block = {
        "schedule": {"mode": mode},
        "sparse_adapter": {**ADAPTER, "optimizer": "lazy"},
        "sparse_matrix": {**TILES, **settings},
        "train": [r"layers\.0\..*norm"],
    }
    schedule = {
        "type": "WarmupDecayLR",
        "params": {"warmup_num_steps": 2, "total_num_steps": 1000, "warmup_max_lr": 0.02},
    }
    return make_engine(ds_config(block=block, scheduler=schedule), tiny_llama(seed))


def steps(engine: Any, seeds: Any, factor: float = 1.0) -> None:
    for seed in seeds:
        engine.backward(engine(**batch(2 * seed + dist.get_rank())).loss * factor)
        engine.step()


def state(engine: Any) -> str:
    """One digest of this rank's weights, moments and counters."""
    counters = repr((engine.global_steps, engine.get_lr(), engine.optimizer.counters()["applied_steps"]))
    return digest(everything(engine)) + hashlib.sha256(counters.encode()).hexdigest()


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def room(nbytes: int) -> Iterator[None]:
    """No file may grow beyond this; a write beyond it fails as one on a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def saved_or_error(engine: Any, folder: Path, tag: str | None = None) -> str:
    try:
        engine.save_checkpoint(str(folder), tag=tag)
    except RuntimeError as e:
        return str(e)
    return ""


def full_disk(folder: Path, limits: list[tuple[int, int]]) -> dict[str, Any]:
    """Saves that fail at many bytes on one rank, on a new tag and on the last good one, each followed by a good one."""
    rank = dist_rank()
    where = folder / "ckpt"
    engine = engine_for()
    steps(engine, range(3))
    engine.save_checkpoint(str(where))
    good, good_state = files(where), state(engine)
    steps(engine, [3])
    found = []
    for victim, limit in limits:
        for tag in (None, "global_step3"):
            with room(limit) if rank == victim else contextlib.nullcontext():
                found.append((limit, victim, saved_or_error(engine, where, tag)))
            dist.barrier()
            assert files(where) == good and not (where / "global_step4").exists(), files(where).keys() ^ good.keys()
            dist.barrier()
    for name in ("meft_state.json", "latest"):
        with fails_to_write(name):
            found.append((name, 0, saved_or_error(engine, where)))
        assert (where / "latest").read_text() == "global_step3"
    other = engine_for(seed=9)
    other.load_checkpoint(str(where))
    assert state(other) == good_state
    engine.save_checkpoint(str(where))
    assert (where / "latest").read_text() == "global_step4"
    assert not [name for name in files(where) if Path(name).name.startswith(".")]
    other.load_checkpoint(str(where))
    assert state(other) == state(engine)
    return {"found": found}


@contextlib.contextmanager
def fails_to_write(name: str) -> Iterator[None]:
    from meft_ds import files

    write = files.write_text

    def fail(path: Path, content: str, **options: Any) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device")
        write(path, content, **options)

    with patch.object(files, "write_text", fail):
        yield


def unpicklable(folder: Path) -> str:
    """A client state that only the first rank could fail on."""
    engine = engine_for()
    try:
        engine.save_checkpoint(str(folder), client_state={"hook": lambda: None})
    except RuntimeError as e:
        return str(e)
    return ""


def flipped(folder: Path, pattern: str) -> dict[str, str]:
    """A file with one bit flipped is refused on every rank, and nothing changes."""
    engine = engine_for()
    steps(engine, range(3))
    engine.save_checkpoint(str(folder), tag="t")
    if dist.get_rank() == 0:
        (victim,) = folder.glob(f"t/{pattern}")
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    dist.barrier()
    steps(engine, [3])
    before = state(engine)
    try:
        engine.load_checkpoint(str(folder))
        message = ""
    except ValueError as e:
        message = str(e)
    return {"before": before, "after": state(engine), "message": message}


def not_a_number(folder: Path, mode: str) -> dict[str, str]:
    """A loss that is NaN on the second rank for a step, among steps without it."""
    engine, plain = engine_for(mode=mode), engine_for(mode=mode)
    steps(engine, range(4))
    weights = digest(everything(engine))
    steps(engine, [99], factor=math.nan if dist.get_rank() == 1 else 1.0)
    skipped = digest(everything(engine))
    steps(engine, range(4, 7))
    steps(plain, range(7))
    return {
        "weights": weights,
        "skipped": skipped,
        "overflowed": digest(everything(engine)),
        "plain": digest(everything(plain)),
    }


def slow(folder: Path) -> dict[str, str]:
    """The second rank sleeps in its forwards."""
    engine, plain = engine_for(), engine_for()
    steps(plain, range(6))
    if dist.get_rank() == 1:
        chance = random.Random(0)
        for layer in engine.module.model.layers:
            layer.register_forward_hook(lambda *_: time.sleep(chance.random() / 20))
    steps(engine, range(6))
    return {"slow": state(engine), "plain": state(plain)}


def raises(folder: Path) -> None:
    """The second rank raises in its forward."""
    engine = engine_for()
    steps(engine, range(3))
    if dist.get_rank() == 1:

        def fail(*_: Any) -> None:
            raise ValueError("planted")

        engine.module.model.layers[1].register_forward_hook(fail)
    steps(engine, range(3, 6))


def told_to_end(folder: Path, how: str) -> None:
    """SIGTERM comes to both ranks, not at once; what they save is then gone on with."""
    rank = dist_rank()
    engine = engine_for()
    asked = []

    def save_and_go(*_: Any) -> None:
        engine.save_checkpoint(str(folder / "ckpt"))
        sys.exit(0)

    signal.signal(signal.SIGTERM, save_and_go if how == "handler" else lambda *_: asked.append(1))
    alarm = threading.Timer(0.05 + 0.1 * rank, lambda: os.kill(os.getpid(), signal.SIGTERM))
    for seed in range(1000):
        steps(engine, [seed])
        if how == "handler":
            if seed == 4:
                time.sleep(0.1 * rank)
                os.kill(os.getpid(), signal.SIGTERM)
            continue
        if seed == 3:
            alarm.start()
        flag = torch.tensor([len(asked)])
        dist.all_reduce(flag)  # ranks must leave after the same step
        if flag:
            save_and_go()


def goes_on(folder: Path) -> dict[str, Any]:
    """Against a run that nobody ended."""
    resumed, plain = engine_for(seed=9), engine_for()
    resumed.load_checkpoint(str(folder / "ckpt"))
    at = resumed.global_steps
    steps(plain, range(at + 4))
    steps(resumed, range(at, at + 4))
    return {"at": at, "resumed": state(resumed), "plain": state(plain)}


def little_shared_memory(folder: Path, what: str) -> str:
    """What `deepspeed.initialize` says when the second rank sees little, or when the first cannot take it."""
    from meft_ds.offload.host import shared_memory
    from meft_ds.plugin import build

    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    plants: dict[str, Any] = {
        "seen by one rank": patch.object(build, "free_shared_bytes", lambda: 5000),
        "full after the check": patch.object(shared_memory.os, "posix_fallocate", full),
        "a limit after the check": room(4096),
        "no mapping": patch.object(shared_memory.mmap, "mmap", side_effect=OSError(12, "Cannot allocate memory")),
    }
    at = {"seen by one rank": 1, "no mapping": 1}.get(what, 0)
    try:
        with plants[what] if dist_rank() == at else contextlib.nullcontext():
            engine_for()
    except ValueError as e:
        return str(e)
    return ""


def settings_without_effect(folder: Path) -> None:
    """An engine whose config has settings that are skipped, on ranks whose log is looked at."""
    config = ds_config(prescale_gradients=True)
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    config["optimizer"]["params"]["nesterov"] = True
    make_engine(config)


def killed_at_every_step_of_a_save(folder: Path, mode: str) -> dict[str, int]:
    """One rank dies at the n-th thing that a save does to files, for all n, and what is there is loaded."""
    engine, other = engine_for(mode="serial"), engine_for(seed=9, mode="serial")
    tags = ["last", "last"] if mode == "same tag" else ["one", "two"]
    steps(engine, range(3))
    engine.save_checkpoint(str(folder), tag=tags[0])
    old = state(engine)
    steps(engine, [3])
    new = state(engine)
    kept = {name: (folder / name).read_bytes() for name in files(folder)}
    outcomes = {"old": 0, "new": 0}
    for nth in range(1, 1000):
        code = in_a_fork(lambda: die_at(nth, engine, folder, tags[1]))  # noqa: B023
        other.load_checkpoint(str(folder))
        found = state(other)
        assert found in (old, new), (nth, code)
        outcomes["new" if found == new else "old"] += 1
        if code == 0:
            assert found == new
            return outcomes
        if nth % 2:  # what another save makes of what was left
            engine.save_checkpoint(str(folder), tag=tags[1])
            other.load_checkpoint(str(folder))
            assert state(other) == new
            assert not [name for name in files(folder) if Path(name).name.startswith(".")]
        restore(folder, kept)
    raise AssertionError("a save has no end")


def in_a_fork(job: Any) -> int:
    if (pid := os.fork()) == 0:
        try:
            job()
            os._exit(0)
        except BaseException as e:
            print(repr(e), flush=True)
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9), code
    return code


def die_at(nth: int, engine: Any, folder: Path, tag: str) -> None:
    seen = [0]

    def count(event: str, args: Any) -> None:
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
            event == "open" and str(folder) in str(args[0])
        ):
            seen[0] += 1
            if seen[0] == nth:
                os._exit(9)

    engine._checkpoint_tag_validation = lambda tag: None  # the threads of collectives are not in a fork
    deepspeed.runtime.engine.dist.barrier = lambda: None
    sys.addaudithook(count)
    engine.save_checkpoint(str(folder), tag=tag)


def restore(folder: Path, kept: dict[str, bytes]) -> None:
    for name in files(folder):
        if name not in kept:
            (folder / name).unlink()
    for name, content in kept.items():
        (folder / name).write_bytes(content)


def dist_rank() -> int:
    """Before there is a process group, too."""
    return int(os.environ["RANK"])


def saves_inside_a_step(folder: Path) -> dict[str, str]:
    """From inside a step, and after a backward that has begun to update."""
    engine, found = engine_for(), {}
    steps(engine, range(3))
    ours = engine.optimizer.pipeline.step

    def step() -> Any:
        found["exact"] = saved_or_error(engine, folder)
        return ours()

    with patch.object(engine.optimizer.pipeline, "step", step):
        steps(engine, [3])
    assert saved_or_error(engine, folder) == ""
    eager = engine_for(mode="eager")
    steps(eager, range(16))
    eager.backward(eager(**batch(7)).loss)
    found["eager"] = saved_or_error(eager, folder)
    eager.step()
    assert saved_or_error(eager, folder) == ""
    return found
