# SPDX-License-Identifier: Apache-2.0
"""What a user sees of a run from outside: DeepSpeed's monitor, the trace file, a PyTorch profile."""

import csv
import inspect
import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from meft_ds.offload.schedule.trace import LANES
from tests.toy import ADAPTER, ds_config, make_engine, train

MODES = ["exact", "eager", "serial"]
STEPS = 6


def config_for(mode: str, *, monitor: Path | None = None, gas: int = 1, **schedule: Any) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if monitor is not None:
        extra["csv_monitor"] = {"enabled": True, "output_path": str(monitor), "job_name": "run"}
    block = {"sparse_adapter": dict(ADAPTER), "train": [r"layers\.0\..*norm"], "schedule": {"mode": mode, **schedule}}
    return ds_config(precision="bf16", gas=gas, block=block, **extra)


def written(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(samples, value) of every step, by the tag's last part."""
    found = {}
    for path in (folder / "run").glob("Train_Samples_*.csv"):
        with path.open() as file:
            rows = list(csv.reader(file))
        found[path.stem.removeprefix("Train_Samples_")] = [(int(step), float(value)) for step, value in rows[1:]]
    return found


def stats_of_a_serial_run(gas: int) -> list[dict[str, Any]]:
    """`meft_stats` after each step."""
    engine = make_engine(config_for("serial", gas=gas))
    stats = []
    for step in range(STEPS):
        train(engine, 1, first_seed=100 + step * gas)
        stats.append(engine.meft_stats())
    engine.destroy()
    return stats


@pytest.mark.compat
@pytest.mark.parametrize("gas", [1, 2])
@pytest.mark.parametrize("mode", ["exact", "serial"])
def test_csv_files_hold_one_line_per_step_with_the_bytes_of_the_formula(mode: str, gas: int, tmp_path: Path) -> None:
    expected = stats_of_a_serial_run(gas)
    engine = make_engine(config_for(mode, monitor=tmp_path, gas=gas))
    train(engine, STEPS)
    engine.destroy()
    found = written(tmp_path)
    samples = [samples for samples, _ in found["lr"]]  # DeepSpeed's own
    assert samples == [engine.train_batch_size() * (step + 1) for step in range(STEPS)]
    for name in ("step_s", "bound_s", "stall_s", "host_update_s", "norm_wait_s", "grad_norm", "payloads"):
        assert [samples for samples, _ in found[f"meft_{name}"]] == samples, name
    for way in ("down", "up"):
        assert found[f"meft_bytes_{way}"] == list(
            zip(samples, [stats[f"bytes_{way}_per_step"] for stats in expected], strict=True)
        )
    for stats, (_, bytes_down) in zip(expected, found["meft_bytes_down"], strict=True):
        assert (
            stats["bytes"]["rows"]["down"] == 2 * 16 * sum(stats["sparse_adapter"]["active_rows"]) * 2
        )  # 2 * d * U * bytes of bf16
        assert bytes_down == sum(channel["down"] for channel in stats["bytes"].values())


@pytest.mark.parametrize("mode", MODES)
def test_sums_are_sane_in_every_mode(mode: str, tmp_path: Path) -> None:
    engine = make_engine(config_for(mode, monitor=tmp_path))
    train(engine, STEPS)
    units = len(engine.optimizer.pipeline.units)
    engine.destroy()
    found = {name: [value for _, value in steps] for name, steps in written(tmp_path).items()}
    assert all(len(values) == STEPS for values in found.values())
    assert all(0 < value <= 1 for value in found["meft_efficiency"])
    assert all(value >= 0 for name, values in found.items() for value in values)
    assert all(math.isfinite(value) and value > 0 for value in found["meft_grad_norm"])
    assert all(value >= units for value in found["meft_payloads"])
    for step, stall, norm in zip(found["meft_step_s"], found["meft_stall_s"], found["meft_norm_wait_s"], strict=True):
        assert stall + norm < step
    if mode == "serial":
        assert set(found["meft_stall_s"]) == {0.0}


def test_the_last_step_is_written_when_its_updates_are_applied_and_not_before(tmp_path: Path) -> None:
    engine = make_engine(config_for("exact", monitor=tmp_path))
    writes = []
    engine.monitor.write_events = writes.append
    train(engine, 1)  # flushes
    assert [tag for tag, _, _ in writes[-1]][0].startswith("Train/Samples/meft_")
    ours = len(writes)
    engine.meft_flush()
    engine.destroy()
    engine.destroy()
    assert len(writes) == ours


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "serial"])
def test_a_program_that_just_ends_writes_its_last_step_too(
    mode: str, run_python: Any, request: Any, tmp_path: Path
) -> None:
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(request.config.rootpath)!r})
from tests.offload.overlap import make_late
from tests.plugin.test_monitoring import config_for
from tests.plugin.test_schedule import steps
from tests.toy import make_engine
engine = make_engine(config_for({mode!r}, monitor=Path({str(tmp_path)!r})))
if {mode!r} == "exact":
    make_late(engine.optimizer.pipeline, 0, 0.3)
steps(engine, 3, first=0)
if {mode!r} == "exact":
    assert any(entry.pending for entry in engine.optimizer.pipeline._entries)
"""
    run_python(code)
    found = written(tmp_path)
    assert [samples for samples, _ in found["meft_bytes_up"]] == [samples for samples, _ in found["lr"]] == [4, 8, 12]
    assert found["meft_bytes_up"][-1][1] > 0


@pytest.mark.compat
def test_a_resumed_run_goes_on_with_deepspeeds_sample_numbers(tmp_path: Path) -> None:
    engine = make_engine(config_for("exact", monitor=tmp_path))
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path / "saved"))
    train(engine, 1)
    engine.load_checkpoint(str(tmp_path / "saved"))
    train(engine, 1)
    engine.destroy()
    found = written(tmp_path)
    assert [samples for samples, _ in found["meft_bytes_up"]] == [4, 8, 12, 12]
    assert [samples for samples, _ in found["lr"]] == [4, 8, 12, 12]


def test_a_monitor_that_is_off_gets_no_call() -> None:
    engine = make_engine(config_for("exact"))
    assert not engine.monitor.enabled
    calls: list[Any] = []
    engine.monitor.write_events = calls.append
    train(engine, 3)
    engine.destroy()
    assert calls == []


def trace_of(mode: str, path: Path, **schedule: Any) -> tuple[Any, list[dict[str, Any]]]:
    engine = make_engine(config_for(mode, trace_file=str(path), **schedule))
    train(engine, STEPS)
    engine.destroy()
    return engine, json.loads(path.read_text())["traceEvents"]


@pytest.mark.parametrize("mode", MODES)
def test_the_trace_names_every_unit_and_spans_of_a_lane_do_not_overlap(mode: str, tmp_path: Path) -> None:
    engine, events = trace_of(mode, tmp_path / "t.json", trace_windows=3)
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
    lanes = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["args"]["window"] in (3, 4, 5)
            lanes[LANES[event["tid"]]].append(event)
    assert set(lanes) == set(LANES)
    names = {unit.name for unit in engine.optimizer.pipeline.units}
    for lane in ("main", "down", "host", "up"):
        assert {event["args"]["unit"] for event in lanes[lane] if "unit" in event["args"]} == names, lane
    for lane, spans in lanes.items():
        spans.sort(key=lambda event: (event["ts"], event["dur"]))
        for one, other in itertools.pairwise(spans):
            assert one["ts"] + one["dur"] <= other["ts"], (lane, one, other)
    assert [event["name"] for event in lanes["compute"]] == ["forward", "backward"] * 3


def test_a_bad_trace_file_stops_the_engine_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"meft_offload\.schedule\.trace_file: .*create the folder"):
        make_engine(config_for("exact", trace_file=str(tmp_path / "none" / "t.json")))


def test_no_spans_are_kept_after_a_window_was_reported(tmp_path: Path) -> None:
    engine = make_engine(config_for("exact", trace_file=str(tmp_path / "t.json"), trace_windows=1))
    train(engine, STEPS)
    assert len(engine._meft.telemetry._times.spans) == len(engine._meft.telemetry._times.marks) == 0
    assert engine._meft.telemetry.trace._events == []
    engine.destroy()


def test_a_pytorch_profile_shows_the_lanes_of_the_workers() -> None:
    option = "profile_all_threads"
    experimental = torch._C._profiler._ExperimentalConfig
    if option not in (inspect.getdoc(experimental.__init__) or ""):
        pytest.skip("this torch cannot profile the lanes' threads: its profiler has no profile_all_threads option")
    engine = make_engine(config_for("exact"))
    train(engine, 2)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], experimental_config=experimental(**{option: True})
    ) as profile:
        train(engine, 2)
    names = {unit.name for unit in engine.optimizer.pipeline.units}
    engine.destroy()
    threads = defaultdict(set)
    for event in profile.events():
        if event.name.startswith("meft."):
            threads[event.name].add(event.thread)
    main = set().union(*(threads[f"meft.main.apply {name}"] for name in names))
    for stage in ("down.send", "host.norm", "host.update", "up.fetch"):
        for name in names:
            assert threads[f"meft.{stage} {name}"].isdisjoint(main), (stage, name)
            assert threads[f"meft.{stage} {name}"], (stage, name)
