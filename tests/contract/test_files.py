# SPDX-License-Identifier: Apache-2.0
"""What every method must do with its checkpoints, over the table in tests/methods.py."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.methods import GAS, Entry, differing, engine_of, every_method, everything, slow, steps
from tests.toy import batch

SCHEDULE = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": 20, "warmup_max_lr": 0.02}}


@every_method
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=slow), "bf16", pytest.param("fp16", marks=slow)])
@pytest.mark.compat
def test_resumed_training_is_bit_identical_to_uninterrupted_training(
    entry: Entry, precision: str, tmp_path: Path
) -> None:
    """In a model with other weights, in the middle of a window, after every kind of window."""
    end = max(entry.saves) + 4
    straight, losses = engine_of(entry, precision=precision, scale_window=2, scheduler=SCHEDULE), []
    for step in range(end):
        if step in entry.saves:
            straight.save_checkpoint(str(tmp_path), tag=str(step))
        losses += steps(straight, [step])
    for at in entry.saves:
        resumed = engine_of(entry, precision=precision, scale_window=2, scheduler=SCHEDULE, seed=9, scale_power=10)
        resumed.backward(resumed(**batch(77)).loss)  # a window that was begun is given up
        assert resumed.load_checkpoint(str(tmp_path), tag=str(at))[0] is not None
        assert resumed.global_steps == at
        resumed.micro_steps = GAS * at
        assert steps(resumed, range(at, end)) == losses[GAS * at :], f"saved after {at} windows"
        assert differing(everything(straight), everything(resumed)) == [], f"saved after {at} windows"
        assert resumed.get_lr() == straight.get_lr()
        assert resumed.optimizer.counters() == straight.optimizer.counters()


Saved = Callable[[Entry], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Checkpoints of an entry: folder `t` of the path that it returns, made once."""
    made: dict[str, Path] = {}

    def of(entry: Entry) -> Path:
        if entry.name not in made:
            made[entry.name] = tmp_path_factory.mktemp("saved")
            engine = engine_of(entry)
            steps(engine, range(entry.untrained + 1))
            engine.save_checkpoint(str(made[entry.name]), tag="t")
        return made[entry.name]

    return of


@every_method
@pytest.mark.parametrize("flips", [1, pytest.param(5, marks=slow)])
@pytest.mark.compat
def test_every_file_is_refused_by_name_when_it_is_missing_cut_or_has_a_bit_flipped(
    entry: Entry, flips: int, saved: Saved, tmp_path: Path
) -> None:
    shutil.copytree(saved(entry), tmp_path, dirs_exist_ok=True)
    engine, chance = engine_of(entry, seed=9), random.Random(flips)
    before = everything(engine)

    def refused() -> str:
        with pytest.raises(ValueError) as e:
            engine.load_checkpoint(str(tmp_path))
        assert differing(before, everything(engine)) == [], "a refused checkpoint must change nothing"
        return str(e.value)

    files = sorted(path for path in (tmp_path / "t").rglob("*") if path.is_file())
    assert "mp_rank_00_model_states.pt" in {path.name for path in files}
    assert {path.suffix for path in files if path.parent.name == "meft"} == {".safetensors", ".json"}
    for path in files:
        content = path.read_bytes()
        for _ in range(flips):
            flipped = bytearray(content)
            flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            if path.suffix == ".json" and b"".join(bytes(flipped).split()) == b"".join(content.split()):
                continue  # one kind of white space for another
            path.write_bytes(flipped)
            assert path.name in (message := refused()) and "damaged" in message
        path.write_bytes(content[: chance.randrange(len(content))])
        assert path.name in (message := refused()) and "earlier checkpoint" in message
        path.unlink()
        assert path.name in (message := refused()) and "missing" in message
        path.write_bytes(content)
    assert engine.load_checkpoint(str(tmp_path))[0] is not None
