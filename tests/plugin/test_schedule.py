# SPDX-License-Identifier: Apache-2.0
"""The schedule through the engine: `exact` equals `serial` bit for bit, and a failing worker loses nothing."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from meft_ds.config import parse_config
from meft_ds.offload.schedule.eager import MEASURED_WINDOWS
from tests.offload.overlap import make_late, run_inline
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
