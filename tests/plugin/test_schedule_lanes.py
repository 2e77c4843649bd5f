# SPDX-License-Identifier: Apache-2.0
"""Lanes in engines: on two ranks, when a worker fails, and what they take in memory and threads."""

import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from meft_ds.offload.host.transfer import Bus
from tests.forked import Forge
from tests.plugin import adapter_ranks
from tests.plugin.test_schedule import engine_of, steps
from tests.ranks import left_in_shared_memory, run_ranks
from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of


@pytest.mark.parametrize(
    "settings", [{"checkpointing": "reentrant", "gas": 4}, {"optimizer": "lazy", "selection": "device"}]
)
@pytest.mark.slow
def test_two_ranks_in_exact_mode_equal_two_ranks_in_serial_mode_bit_for_bit(
    forge: Forge, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Fifty windows; each rank's lanes are late in their own way, so that layers finish in different orders."""
    serial = forge.results(adapter_ranks.train, tmp_path / "serial", mode="serial", steps=50, **settings)
    exact = forge.results(adapter_ranks.train, tmp_path / "exact", mode="exact", late=1, steps=50, **settings)
    assert [r["digest"] for r in serial] == [r["digest"] for r in exact]
    assert serial[0]["norm"] == exact[0]["norm"]
    for rank in range(2):
        a, b = (torch.load(tmp_path / mode / f"state{rank}.pt")["state"] for mode in ("serial", "exact"))
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.slow
def test_two_ranks_in_eager_mode_agree_and_repeat(forge: Forge, tmp_path: Path) -> None:
    one, two = (
        forge.results(adapter_ranks.train, tmp_path / str(late), mode="eager", late=late, steps=20) for late in (1, 2)
    )
    assert one[0]["digest"] == one[1]["digest"] == two[0]["digest"]


@pytest.mark.slow
def test_two_ranks_that_destroy_their_process_groups_with_updates_under_way_end_cleanly(
    forge: Forge, tmp_path: Path
) -> None:
    """And the updates land: what is left at the very end is what a program leaves that waits for them."""
    waited = forge.results(adapter_ranks.train, tmp_path / "waited", steps=3)
    (tmp_path / "left").mkdir()
    outputs = run_ranks(Path(adapter_ranks.__file__), 2, "leave", str(tmp_path / "left"))
    left = [json.loads(out.strip().splitlines()[-1]) for out in outputs]
    for rank in range(2):
        assert json.loads((tmp_path / "left" / f"pending{rank}.json").read_text()), "nothing was under way"
    assert [r["digest"] for r in left] == [r["digest"] for r in waited]


@pytest.mark.parametrize("trials", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_workers_that_fail_at_a_random_unit_surface_at_once_and_the_last_checkpoint_resumes(
    tmp_path: Path, trials: int
) -> None:
    before = left_in_shared_memory([os.getpid()])
    reference = engine_of("exact")
    steps(reference, 2, first=0)
    reference.save_checkpoint(str(tmp_path))
    steps(reference, 2, first=50)
    wanted = state_of(reference)
    threads = {t for t in threading.enumerate() if t.name.startswith("meft-")}
    engine = engine_of("exact")
    rng = random.Random(0)
    for trial in range(trials):
        assert engine.load_checkpoint(str(tmp_path))[0] is not None
        steps(engine, 2, first=50)
        got = state_of(engine)
        assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == [], f"resume {trial}"
        unit = rng.choice(engine.optimizer.pipeline.units)
        stage = rng.choice(["reduce", "send", "sq_norm", "host_step", "fetch"])
        fail_in(unit, stage, trial, after=rng.randrange(2))
        with pytest.raises(RuntimeError, match=f"planted {trial} in {stage}"):
            for step in range(4):
                steps(engine, 1, first=step)
        # a failed engine is taken down, and the next one has no memory of it
        engine.destroy()
        engine = engine_of("exact")
    engine.destroy()
    assert {t for t in threading.enumerate() if t.name.startswith("meft-")} <= threads
    assert left_in_shared_memory([os.getpid()]) <= before


def fail_in(unit: Any, stage: str, trial: int, *, after: int) -> None:
    original, calls = getattr(unit, stage), [0]

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(f"planted {trial} in {stage}")
        return original(*args, **kwargs)

    setattr(unit, stage, fails)


def test_no_page_locked_or_device_buffer_is_allocated_after_the_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    pinned = Bus._pinned
    monkeypatch.setattr(Bus, "_pinned", lambda self, nbytes: (taken.append(nbytes), pinned(self, nbytes))[-1])
    engine = engine_of("exact", precision="bf16", adapter={"rows": 300, "experts": 20})
    for step in range(50):
        engine.backward(engine(**batch(step)).loss)
        engine.step()
        if step == 1:
            engine.meft_flush()
            before = len(taken), engine.optimizer.pipeline.bus.allocations, held(engine)
    engine.meft_flush()
    assert before[0] > 0
    assert (len(taken), engine.optimizer.pipeline.bus.allocations, held(engine)) == before


def held(engine: Any) -> set[tuple[int, int]]:
    """(address, bytes) of every lasting buffer of the units and their row sources."""
    found = set()
    for unit in engine.optimizer.pipeline.units:
        for owner in (unit, getattr(unit, "rows", None)):
            for name, value in vars(owner).items() if owner is not None else ():
                if isinstance(value, torch.Tensor) and name not in ("_payload", "_host_payload", "_ids"):
                    if "load" not in name:  # metrics of the last window, a few numbers on the host
                        found.add((value.data_ptr(), value.numel() * value.element_size()))
    return found


def test_serial_mode_starts_no_thread_and_overlapping_ones_three_that_end_with_the_engine() -> None:
    def lanes() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name.startswith("meft-")}

    before = lanes()  # engines of other tests may be freed, and their threads end, at any time
    serial = engine_of("serial")
    assert lanes() <= before
    exact = engine_of("exact")
    assert sorted(t.name for t in lanes() - before) == ["meft-down", "meft-host", "meft-up"]
    steps(exact, 1, first=0)
    exact.destroy()
    assert lanes() <= before
    serial.destroy()


def test_the_number_of_host_threads_can_be_set() -> None:
    block = {"schedule": {"host_threads": 1}, "sparse_adapter": ADAPTER}
    engine = make_engine(ds_config(block=block))
    seen: list[int] = []
    done = threading.Event()
    engine.optimizer.pipeline._lanes.host.submit(lambda: (seen.append(torch.get_num_threads()), done.set())[-1])
    assert done.wait(5) and seen == [1]
