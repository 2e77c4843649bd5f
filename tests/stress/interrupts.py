# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at any function of ours: what is left is the state of some step, or everything refuses until a load.

`python -m tests.stress.interrupts --runs 200` prints what each interrupt ended in.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import itertools
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import meft_ds
from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of, tiny_llama

OURS = str(Path(meft_ds.__file__).parent)
BEFORE, AFTER = 3, 4  # steps before the interrupt, and from there on
HANGS_AFTER_S = 120
BLOCKS: dict[str, dict[str, Any]] = {
    "subspace": {"subspace": {"nonzeros": 2, "fit_steps": 5, "refit_interval": 2}},
    "sparse_adapter": {"sparse_adapter": {**ADAPTER, "optimizer": "lazy"}, "train": ["norm"]},
    "sparse_matrix": {"sparse_matrix": {"block_size": 8, "warmup_steps": 4, "density": 0.3}},  # scoring ends amid
    "both": {
        "sparse_adapter": dict(ADAPTER),
        "sparse_matrix": {"block_size": 8, "warmup_steps": 1, "density": 0.3},
    },
}
CASES = [(m, mode, gas) for gas, mode, m in itertools.product((1, 2), ("exact", "eager", "serial"), BLOCKS)]
SENTENCE = "resume from the last checkpoint"


class Hang(Exception):
    """Nothing moved."""


def engine_for(case: tuple[str, str, int], seed: int = 0) -> Any:
    method, mode, gas = case
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 0.02}}
    block = {**BLOCKS[method], "schedule": {"mode": mode}}
    return make_engine(ds_config(block=block, gas=gas, scheduler=schedule), tiny_llama(seed))


def train(engine: Any, until: int) -> Iterator[None]:
    """Steps from where the engine is; stops after each."""
    while engine.global_steps < until:
        step = engine.global_steps
        for micro in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(**batch(10 * step + micro)).loss)
            engine.step()
        yield


def seen(engine: Any) -> dict[str, Tensor]:
    """All that makes up a step."""
    counters = engine.optimizer.counters()
    numbers = [engine.global_steps, engine.skipped_steps, engine.global_samples, engine.optimizer.applied_steps]
    numbers += [*engine.get_lr(), *counters["pipeline"]["steps"].values()]
    return state_of(engine) | {"": torch.tensor(numbers, dtype=torch.float64)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


@contextlib.contextmanager
def interrupted(after: int) -> Iterator[list[int]]:
    """Ctrl-C as this thread enters a function of ours for the `after`-th time; yields how many it has entered."""
    count = [0]

    def watch(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            count[0] += 1
            if count[0] == after:
                sys.setprofile(None)
                raise KeyboardInterrupt("planted")

    sys.setprofile(watch)
    try:
        yield count
    finally:
        sys.setprofile(None)


@contextlib.contextmanager
def watchdog() -> Iterator[None]:
    """Raise where nothing moves."""

    def bark(*_: Any) -> None:
        faulthandler.dump_traceback(all_threads=True)
        raise Hang

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(HANGS_AFTER_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Case:
    """A method, a schedule and an accumulation, and an uninterrupted run of it."""

    def __init__(self, case: tuple[str, str, int]) -> None:
        self.case = case
        self.before = BEFORE
        if case[1] == "eager":  # which begins after four windows that train; until then it is exact
            self.before += 7 if case[0] == "sparse_matrix" else 3
        self.steps = self.before + AFTER
        engine = engine_for(case)
        self.states = [seen(engine)]
        for _ in train(engine, self.before):
            self.states.append(seen(engine))
        with interrupted(0) as count:
            for _ in train(engine, self.before + 2):  # not one longer than others, or most interrupts would not come
                self.states.append(seen(engine))
        self.entries = count[0]
        for _ in train(engine, self.steps):
            self.states.append(seen(engine))
        engine.destroy()

    def run(self, seed: int) -> str:
        """One interrupt: what it ended in. An AssertionError or `Hang` is a fault."""
        with watchdog(), tempfile.TemporaryDirectory() as folder:
            return self._run(random.Random(seed), Path(folder))

    def _run(self, draw: random.Random, folder: Path) -> str:
        engine = engine_for(self.case)
        for _ in train(engine, self.before):
            pass
        engine.save_checkpoint(str(folder / "before"))
        try:
            with interrupted(draw.randrange(1, self.entries)):
                for _ in train(engine, self.before + 2):
                    pass
            outcome = "not interrupted"
        except KeyboardInterrupt:
            outcome = "goes on"
        except RuntimeError as refusal:  # the interrupt came where Python swallows it and says so later
            assert SENTENCE in str(refusal), refusal
            outcome = "goes on"
        try:
            engine.save_checkpoint(str(folder / "after"))
        except RuntimeError as refusal:
            assert SENTENCE in str(refusal) or "in the middle of" in str(refusal), refusal
            outcome = "refused"
        else:
            self._is_of_a_step(folder / "after")
        if outcome != "refused" and engine.gradient_accumulation_steps() == 1 and draw.random() < 0.5:
            engine.zero_grad()
            for _ in train(engine, self.steps):
                pass
        else:
            try:
                engine.load_checkpoint(str(folder / "before"))
            except ValueError as refusal:  # tiles have been chosen, and the checkpoint is from before
                assert "load it into a new engine" in str(refusal), refusal
                engine.destroy()
                engine, outcome = engine_for(self.case, seed=9), outcome + " anew"
                engine.load_checkpoint(str(folder / "before"))
            for _ in train(engine, self.steps):
                pass
            outcome += ", loads"
        assert same(seen(engine), self.states[self.steps]), outcome
        engine.destroy()
        return outcome

    def _is_of_a_step(self, folder: Path) -> None:
        fresh = engine_for(self.case, seed=9)
        fresh.load_checkpoint(str(folder))
        assert same(seen(fresh), self.states[fresh.global_steps]), f"saved is no step ({fresh.global_steps})"
        fresh.destroy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    runs = parser.parse_args()
    cases: dict[int, Case] = {}
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in range(runs.first, runs.first + runs.runs):
        index = seed % len(CASES)
        if index not in cases:
            cases[index] = Case(CASES[index])
        try:
            outcome = cases[index].run(seed)
        except (Exception, KeyboardInterrupt) as fault:  # told, and the next one
            outcome = f"FAULT {type(fault).__name__}: {fault}"
        print(seed, *CASES[index], outcome, flush=True)
        outcomes[outcome] += 1
    print(dict(outcomes))


if __name__ == "__main__":
    main()
