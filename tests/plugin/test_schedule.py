# SPDX-License-Identifier: Apache-2.0
"""The schedule through the engine: `exact` equals `serial` bit for bit, and a failing worker loses nothing."""

import contextlib
import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from meft_ds.config import parse_config
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.schedule.eager import MEASURED_WINDOWS
from tests.forked import Forge
from tests.offload.overlap import make_late, run_inline
from tests.plugin import adapter_ranks
from tests.ranks import left_in_shared_memory, run_ranks
from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of, tiny_llama, train

SUBSPACE = {
    "projectors": "learned",
    "nonzeros": 2,
    "fit_steps": 2,
    "refit_interval": 4,
    "refit_threshold": 0.0,
    "fit_lr": 0.5,
}
SUBSPACE["target_modules"] = r".*\.(q_proj|v_proj|up_proj)"


def engine_of(
    mode: str, *, late: int | None = None, checkpointing: str = "none", method: str = "sparse_adapter", **kwargs: Any
) -> Any:
    block: dict[str, Any] = {"schedule": {"mode": mode}}
    if method == "subspace":
        block["subspace"] = {**SUBSPACE, **kwargs.pop("subspace", {})}
    else:
        block |= {"sparse_adapter": {**ADAPTER, **kwargs.pop("adapter", {})}, "train": ["norm", "embed"]}
    model = tiny_llama()
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    engine = make_engine(ds_config(block=block, **kwargs), model)
    if late is not None:
        make_late(engine.optimizer.pipeline, late)
    return engine


def assert_same_state(one: Any, other: Any) -> None:
    a, b = state_of(one), state_of(other)
    for engine, state in ((one, a), (other, b)):
        state |= {k: t for unit in engine.optimizer.pipeline.units for k, t in unit.shared_tensors().items()}
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("fp32", {}),
    "lazy on the device": ("bf16", {"optimizer": "lazy", "selection": "device"}),
    "spilling": ("fp16", {"cache_rows": 16, "keys_per_token": 5}),
}
CHECKPOINTING = ("none", "reentrant", "nonreentrant")


@pytest.mark.parametrize(
    ("windows", "checkpointing", "settings"),
    [
        (15, "none", "dense"),
        (15, "none", "spilling"),
        *(pytest.param(50, kind, which, marks=pytest.mark.slow) for kind in CHECKPOINTING for which in ADAPTERS),
    ],
)
def test_random_schedules_of_exact_equal_serial_bit_for_bit(windows: int, checkpointing: str, settings: str) -> None:
    """Clipping is on and bites; every window of the late engine is another random schedule."""
    precision, adapter = ADAPTERS[settings]
    losses, engines, norms = [], [], []
    for mode in ("serial", "exact"):
        late = 7 if mode == "exact" else None
        engine = engine_of(
            mode, late=late, checkpointing=checkpointing, precision=precision, gas=4, micro=2, adapter=adapter
        )
        seen, clipped = [], []
        for step in range(windows):
            seen += steps(engine, 1, first=4 * step)
            clipped.append(float(engine.get_global_grad_norm()))
        losses.append(seen)
        engines.append(engine)
        norms.append(clipped)
    assert losses[0] == losses[1] and norms[0] == norms[1]
    assert sum(norm > 0.5 for norm in norms[0]) > windows // 5
    assert_same_state(*engines)
    sent_early = engines[1].optimizer.pipeline
    assert all(entry.reliable for entry in sent_early._entries), "every payload left during backward"
    if "cache_rows" in adapter:
        assert engines[1].meft_stats()["sparse_adapter"]["spills"] > 0


@pytest.mark.parametrize(
    ("windows", "checkpointing", "projectors"),
    [
        (10, "none", "learned"),
        (10, "nonreentrant", "random"),
        pytest.param(30, "none", "learned", marks=pytest.mark.slow),
        pytest.param(30, "reentrant", "learned", marks=pytest.mark.slow),
        pytest.param(30, "nonreentrant", "random", marks=pytest.mark.slow),
    ],
)
def test_random_schedules_with_checks_of_projectors_equal_serial_bit_for_bit(
    windows: int, checkpointing: str, projectors: str
) -> None:
    """A check in every fourth window: what is under way lands before it, and what it switches to holds after it."""
    losses, engines, norms = [], [], []
    for mode in ("serial", "exact"):
        late = 7 if mode == "exact" else None
        settings = {"method": "subspace", "subspace": {"projectors": projectors}}
        engine = engine_of(mode, late=late, checkpointing=checkpointing, precision="bf16", gas=2, micro=2, **settings)
        seen, clipped = [], []
        for step in range(windows):
            seen += steps(engine, 1, first=2 * step)
            clipped.append(float(engine.get_global_grad_norm()))
        losses.append(seen)
        engines.append(engine)
        norms.append(clipped)
    assert losses[0] == losses[1] and norms[0] == norms[1]
    assert sum(norm > 0.5 for norm in norms[0]) > windows // 3
    assert_same_state(*engines)
    assert all(entry.reliable for entry in engines[1].optimizer.pipeline._entries)
    later = (windows - 1) // 4
    assert engines[1].meft_stats()["subspace"]["checks"] == later + (
        projectors == "learned"
    )  # random ones need no first fit
    biases = [engine.meft_stats()["subspace"]["bias"] for engine in engines]
    assert biases[0] == biases[1] and {b["step"] for b in biases[0].values()} == {4 * later}


def test_nothing_is_under_way_when_a_check_begins() -> None:
    engine = engine_of("exact", late=7, method="subspace")
    pipeline = engine.optimizer.pipeline
    began: list[bool] = []
    (method,) = pipeline.methods
    begin = method.begin_calibration
    method.begin_calibration = lambda steps: (began.append(any_pending(pipeline)), begin(steps))
    pending = []
    for step in range(9):
        pending.append(any_pending(pipeline))
        steps(engine, 1, first=step)
    assert began == [False] * 3 and all(pending[1:])


def any_pending(pipeline: Any) -> bool:
    return any(entry.pending for entry in pipeline._entries)


def steps(engine: Any, count: int, *, first: int) -> list[float]:
    """Without `train`'s final flush: updates stay under way from step to step."""
    losses = []
    for micro in range(count * engine.gradient_accumulation_steps()):
        loss = engine(**batch((first + micro) % 12, rows=2)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def test_payloads_leave_during_backward_and_updates_run_beside_the_next_forward() -> None:
    engine = engine_of("exact")
    engine.backward(engine(**batch(0)).loss)
    pipeline = engine.optimizer.pipeline
    assert all(entry.sent for entry in pipeline._entries), "before step"
    held = threading.Event()
    pipeline._lanes.host.submit(held.wait)
    # the norms of the next step would wait behind it too, so let it go once the step has handed over
    threading.Timer(0.5, held.set).start()
    engine.step()
    assert any(entry.pending for entry in pipeline._entries)
    engine(**batch(1))
    assert not any(entry.pending for entry in pipeline._entries)


def test_nothing_leaves_before_the_windows_last_backward() -> None:
    engine = engine_of("exact", gas=3)
    pipeline = engine.optimizer.pipeline
    for micro in range(3):
        engine.backward(engine(**batch(micro)).loss)
        assert all(entry.sent == (micro == 2) for entry in pipeline._entries)
        engine.step()


@pytest.mark.parametrize(
    ("what", "method"),
    [
        *((w, "sparse_adapter") for w in ("no_sync", "boundary", "two_losses", "eval", "save", "generate")),
        *((w, "subspace") for w in ("two_losses", "eval", "generate")),
        ("state_dict", "sparse_adapter"),
    ],
)
def test_exact_equals_serial_with(what: str, method: str, tmp_path: Path) -> None:
    engines = []
    for mode in ("serial", "exact"):
        engine = engine_of(mode, late=3 if mode == "exact" else None, gas=2, method=method)
        for step in range(6):
            for micro in range(2):
                last = micro == 1
                if what == "boundary":
                    engine.set_gradient_accumulation_boundary(last)
                quiet = what == "no_sync" and not last
                output = engine(**batch(10 * step + micro))
                with engine.no_sync() if quiet else contextlib.nullcontext():
                    if what == "two_losses":  # gradients come after the payloads have left
                        engine.backward(output.loss, retain_graph=True)
                        engine.backward(output.logits.square().mean())
                    else:
                        engine.backward(output.loss)
                if what != "boundary" or last:
                    engine.step()
            if what == "eval":
                engine.eval()
                with torch.no_grad():
                    engine(**batch(99))
                assert not any(entry.pending for entry in engine.optimizer.pipeline._entries)
                engine.train()
            elif what == "save":
                engine.save_checkpoint(str(tmp_path / mode), tag=str(step))
            elif what == "generate":
                engine.module.generate(batch(1)["input_ids"][:1], max_new_tokens=2, do_sample=False)
            elif what == "state_dict":
                found = engine.module.state_dict()["model.norm.weight"].clone()
                engine.meft_flush()
                assert torch.equal(found, engine.module.model.norm.weight)
        engines.append(engine)
    assert_same_state(*engines)


def test_a_checkpoint_taken_between_steps_resumes_bit_identically_in_any_exact_mode(tmp_path: Path) -> None:
    saved = engine_of("exact", late=1, gas=2)
    steps(saved, 3, first=0)
    saved.save_checkpoint(str(tmp_path))
    steps(saved, 3, first=50)
    for mode in ("exact", "serial"):
        resumed = engine_of(mode, gas=2)
        assert resumed.load_checkpoint(str(tmp_path))[0] is not None
        steps(resumed, 3, first=50)
        assert_same_state(saved, resumed)


def test_eager_resumes_bit_identically_with_the_norm_it_clips_by(tmp_path: Path) -> None:
    saved = engine_of("eager", late=1)
    steps(saved, MEASURED_WINDOWS + 4, first=0)
    saved.save_checkpoint(str(tmp_path))
    steps(saved, 4, first=50)
    resumed = engine_of("eager")
    assert resumed.load_checkpoint(str(tmp_path))[0] is not None
    assert resumed.optimizer.pipeline.tuner.eager_now
    steps(resumed, 4, first=50)
    assert_same_state(saved, resumed)


@pytest.mark.parametrize(
    ("precision", "method"), [("fp32", "sparse_adapter"), ("fp16", "sparse_adapter"), ("bf16", "subspace")]
)
def test_eager_through_the_engine_equals_its_stages_run_in_line(precision: str, method: str) -> None:
    engines, losses = [], []
    for inline in (True, False):
        engine = engine_of("eager", gas=2, precision=precision, method=method)
        if inline:
            run_inline(engine.optimizer.pipeline)
        else:
            make_late(engine.optimizer.pipeline, 5)
        losses.append(steps(engine, 20, first=0))
        engines.append(engine)
    assert engines[0].optimizer.pipeline.tuner.eager_now
    assert losses[0] == losses[1]
    assert_same_state(*engines)


def test_eager_with_single_units_that_overflow_and_checks_that_drift_apart_equals_its_stages_run_in_line() -> None:
    """A unit that skipped an update is checked a window later than the others, with those under way landed."""
    engines, losses = [], []
    for inline in (True, False):
        engine = engine_of("eager", precision="bf16", method="subspace", subspace={"refit_interval": 3})
        pipeline = engine.optimizer.pipeline
        if inline:
            run_inline(pipeline)
        else:
            make_late(pipeline, 5)
        seen = steps(engine, MEASURED_WINDOWS + 2, first=0)
        assert pipeline.tuner.eager_now
        (unit,) = [u for u in pipeline.units if u.wire == "subspace" and u.layer == 1]
        collect = unit.collect
        unit.collect = lambda unit=unit, collect=collect: (collect(), unit._acc.fill_(float("inf")))
        while pipeline._of[id(unit)].steps == pipeline._entries[0].steps:
            seen += steps(engine, 1, first=5)
            engine.meft_flush()
        del unit.collect
        seen += steps(engine, 10, first=6)
        engine.meft_flush()
        counts = {u.name: pipeline._of[id(u)].steps for u in pipeline.units}
        assert len(set(counts.values())) == 2, counts
        engines.append(engine)
        losses.append(seen)
    assert losses[0] == losses[1]
    assert_same_state(*engines)


def test_a_planted_inf_in_fp16_leaves_exact_and_serial_in_the_same_state() -> None:
    engines = []
    for mode in ("serial", "exact"):
        engine = engine_of(mode, late=2 if mode == "exact" else None, precision="fp16")
        steps(engine, 3, first=0)
        unit = engine.optimizer.pipeline.units[0]
        collect = unit.collect
        unit.collect = lambda unit=unit, collect=collect: (collect(), unit._acc.fill_(float("inf")))
        scale = engine.optimizer.cur_scale
        steps(engine, 1, first=20)
        assert engine.optimizer.overflow and engine.optimizer.cur_scale < scale
        del unit.collect
        steps(engine, 3, first=30)
        engines.append(engine)
    assert_same_state(*engines)


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


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"mode": "fast"}, "meft_offload.schedule.mode"),
        ({"host_threads": 0}, "meft_offload.schedule.host_threads.*whole number"),
        ({"host_thread": 2}, "did you mean 'host_threads'"),
    ],
)
def test_a_wrong_schedule_setting_is_named(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({"schedule": schedule})


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "meft_ds")
    engine = engine_of("auto")
    train(engine, MEASURED_WINDOWS + 30)
    assert sum("schedule mode auto chose" in record.getMessage() for record in caplog.records) == 1
    assert engine.meft_stats()["schedule_mode"] in ("exact", "eager")
