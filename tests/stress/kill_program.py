# SPDX-License-Identifier: Apache-2.0
"""Trains and saves on two ranks, kills them at random times, and resumes, again and again; every state that is resumed
from and every state that is saved must be, bit for bit, that of a run that nobody killed.

Usage: python -m tests.stress.kill_program [--kills 100] [--seed 0] [--folder FOLDER]

It ends with one line of JSON; its exit code is 0 if nothing went wrong. A course is STEPS steps; when one has been
trained to its end the next begins from nothing. Courses save under a tag per step or all under one tag, by turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.forked import fork_ranks, preload

STEPS = 40
WORLD = 2
PATIENCE_S = 60.0  # how long a rank may live on after the other was killed, and a life that nobody ends
LAUNCHER_S = 5.0  # the same before all have an engine: one that waits for a rank to join is ended by a launcher
AFTER_ENGINE_S = 1.5  # kills come at most so long after the engine is there
SHM = Path("/dev/shm")


def life(folder: Path, kind: str, reference: dict[int, list[str]] | None, rank: int) -> Any:
    """One rank's life: resume, then train and save to the end of the course. Without a reference it makes one."""
    from tests.plugin.fault_ranks import engine_for, state, steps

    found = {}
    engine = engine_for(seed=rank if reference is None else 9)
    if reference is None or not (folder / "latest").exists():
        engine = engine_for()
    say(folder, rank, "ready", engine.global_steps)
    if reference is not None and (folder / "latest").exists():
        assert engine.load_checkpoint(str(folder))[0] is not None
        expect(folder, rank, "loaded", engine.global_steps, state(engine), reference)
    for step in range(engine.global_steps, STEPS):
        steps(engine, [step])
        if reference is None:
            found[step + 1] = state(engine)
        elif chosen(step + 1):
            say(folder, rank, "saving", step + 1)
            engine.save_checkpoint(str(folder), tag="last" if kind == "one tag" else None)
            expect(folder, rank, "saved", step + 1, state(engine), reference)
    return found


def chosen(step: int) -> bool:
    """Whether a checkpoint is saved after a step: two of three times, and at the end."""
    return step % 3 != 1 or step == STEPS


def expect(folder: Path, rank: int, what: str, step: int, found: str, reference: dict[int, list[str]]) -> None:
    right = step == 0 or found == reference[step][rank]
    say(folder, rank, what if right else "WRONG", step)
    if not right:
        raise AssertionError(f"{what}: rank {rank} has another state at step {step} than a run that nobody killed")


def say(folder: Path, rank: int, what: str, step: int) -> None:
    """One write per line, so that a kill leaves whole lines."""
    fd = os.open(folder / f"said{rank}", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    os.write(fd, f"{what} {step}\n".encode())
    os.close(fd)


def said(folder: Path, rank: int = 0) -> list[tuple[str, int]]:
    path = folder / f"said{rank}"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


class Course:
    """The folder of one course, and what is known to be safe in it."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.kind = folder, ("one tag", "a tag per step")[number % 2]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.safe = 0  # the last step whose save has returned on a rank, or that was resumed from

    def take_in(self) -> dict[str, Any]:
        """What ranks said in the life that has ended."""
        lines = [said(self.folder, rank) for rank in range(WORLD)]
        for listed in lines:
            for what, step in listed:
                self.safe = max(self.safe, step) if what in ("saved", "loaded") else self.safe
        flat = [entry for listed in lines for entry in listed]
        return {
            "lines": lines,
            "loaded": [step for what, step in flat if what == "loaded"],
            "wrong": [step for what, step in flat if what == "WRONG"],
            "doing": max((listed[-1] for listed in lines if listed), key=lambda said: said[1], default=("starting", 0)),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    top = args.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    began = time.monotonic()
    preload()
    reference = make_reference(top / "reference")
    result = kill_many(top, args.kills, random.Random(args.seed), reference)
    result |= {"folder": str(top), "seconds": round(time.monotonic() - began, 1), "seed": args.seed}
    print(json.dumps(result), flush=True)
    if args.folder is None and not result["faults"]:
        shutil.rmtree(top)
    sys.exit(bool(result["faults"]))


def make_reference(folder: Path) -> dict[int, list[str]]:
    """{step: each rank's digest} of a run that nobody kills."""
    folder.mkdir(parents=True)
    pids = fork_ranks(WORLD, lambda rank: life(folder, "", None, rank), folder)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * WORLD, (folder / "rank0.log").read_text()[-3000:]
    told = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(WORLD)]
    return {step: [each[str(step)] for each in told] for step in range(1, STEPS + 1)}


def kill_many(top: Path, kills: int, chance: random.Random, reference: dict[int, list[str]]) -> dict[str, Any]:
    """Lives until so many were killed and so many were resumed, the last one without being killed."""
    count = dict.fromkeys(["kills", "in_saving", "in_training", "in_starting", "resumes", "steps", "saves"], 0)
    victims = {"one rank": 0, "all ranks": 0}
    faults: list[str] = []
    slowest, courses, before = 0.0, 0, shared_files()
    course = Course(top / "course", courses)
    while not faults:
        last = count["kills"] >= kills and count["resumes"] >= kills - 1
        for path in course.folder.glob("said*"):
            path.unlink()
        safe = course.safe
        pids = fork_ranks(WORLD, lambda rank: life(course.folder, course.kind, reference, rank), course.folder)  # noqa: B023
        who = [] if last else kill_at_a_random_time(course.folder, pids, chance)
        together = not who or all(said(course.folder, rank) for rank in range(WORLD))
        codes, seconds = wait_for(pids, PATIENCE_S if together else LAUNCHER_S)
        who = [rank for rank in who if codes[rank] == -signal.SIGKILL]  # others had ended just before
        slowest = max(slowest, seconds) if who and together else slowest
        told = course.take_in()
        name = f"life {count['kills'] + 1}, {course.kind}"
        faults += [f"{name}: {step} differs" for step in told["wrong"]]
        faults += [f"{name}: shared memory is left: {left}" for left in shared_files() - before]
        faults += [f"{name}: loaded {step}, but {safe} was complete" for step in told["loaded"] if step < safe]
        if safe and not told["loaded"] and not who:
            faults.append(f"{name}: a checkpoint was there, and was not resumed from")
        if together and seconds > PATIENCE_S:
            faults.append(f"{name}: a rank was still there after {PATIENCE_S} s")
        if not who and any(codes):
            faults.append(f"{name}: ended with {codes} by itself: {(course.folder / 'rank0.log').read_text()[-2000:]}")
        count["resumes"] += len(told["loaded"]) == WORLD
        trained = [step for listed in told["lines"][:1] for what, step in listed if what == "saved"]
        count["saves"] += len(trained)
        count["steps"] += max(0, max(trained, default=0) - (told["loaded"] or [0])[0])
        if who:
            count["kills"] += 1
            doing = {"saving": "in_saving", "starting": "in_starting", "ready": "in_starting"}
            count[doing.get(told["doing"][0], "in_training")] += 1
            victims["all ranks" if len(who) == WORLD else "one rank"] += 1
            print(
                f"kill {count['kills']}: ranks {who} while {told['doing']}, codes {codes}, {seconds:.1f} s", flush=True
            )
        if last and count["resumes"] >= kills:
            break
        if any(listed and listed[-1] == ("saved", STEPS) for listed in told["lines"]) or course.safe == STEPS:
            courses += 1
            course = Course(top / "course", courses)
    return {**count, **victims, "courses": courses + 1, "slowest_end_s": round(slowest, 1), "faults": faults}


def kill_at_a_random_time(folder: Path, pids: list[int], chance: random.Random) -> list[int]:
    """Mostly after the engine is there, sometimes before; returns the ranks that were killed."""
    if chance.random() < 0.9:
        deadline = time.monotonic() + PATIENCE_S
        while not said(folder) and time.monotonic() < deadline and not ended(pids):
            time.sleep(0.005)
    time.sleep(chance.uniform(0, AFTER_ENGINE_S))
    who = chance.choice([[0], [1], [0, 1]])
    if ended(pids):
        return []
    for rank in who:
        os.kill(pids[rank], signal.SIGKILL)
    return who


def ended(pids: list[int]) -> bool:
    """Whether a rank is gone; it is not reaped, so its number is still its own."""
    return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None for pid in pids)


def wait_for(pids: list[int], patience: float) -> tuple[list[int], float]:
    """Exit codes, and after how long the last one was there; ranks that do not end in time are killed."""
    began, codes = time.monotonic(), {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(status[1])
        if time.monotonic() - began > patience:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids], time.monotonic() - began


def shared_files() -> set[str]:
    """Ours in shared memory; runs of others may come and go, so only those of processes that are gone count."""
    found = set()
    for path in SHM.glob(f"meft-ds-{os.getuid()}-*"):
        if not Path("/proc", path.name.split("-")[3]).exists():
            found.add(path.name)
    return found


if __name__ == "__main__":
    main()
