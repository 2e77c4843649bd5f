# SPDX-License-Identifier: Apache-2.0
"""The Chrome trace: which windows it holds, when it is written, and what a viewer reads in it."""

import json
from pathlib import Path
from typing import Any

import pytest

from meft_ds.config import parse_config
from meft_ds.offload.schedule.timing import Span, WindowTimes
from meft_ds.offload.schedule.trace import LANES, Trace, path_of_rank
from tests.offload.times import window_times


def two_micro_batches(start: float = 0.0) -> WindowTimes:
    """Two micro-batches; the update of the unit runs beside the second forward."""
    marks = ["forward", "forward_end", "backward_end", "forward", "forward_end", "backward_end", "backward_end"]
    spans = [Span("host", "update", "layer0.rows", start + 3.25, start + 3.5), Span("main", "norm", "", 7.0, 7.5)]
    return window_times(spans=spans, marks=[(what, start + at) for at, what in enumerate([*marks, "step", "end"])])


def events(path: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]


def test_it_holds_the_windows_from_the_third_on_and_is_written_when_the_last_one_closes(tmp_path: Path) -> None:
    trace = Trace(str(tmp_path / "t.json"), windows=2)
    for _ in range(3):
        trace.add(two_micro_batches())
    assert list(tmp_path.iterdir()) == []
    trace.add(two_micro_batches())
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
    written = (tmp_path / "t.json").read_bytes()
    trace.add(two_micro_batches())
    trace.close()
    assert (tmp_path / "t.json").read_bytes() == written
    assert {event["args"]["window"] for event in events(tmp_path / "t.json")} == {3, 4}
    assert trace._events == []


def test_a_shorter_run_is_written_at_the_end(tmp_path: Path) -> None:
    trace = Trace(str(tmp_path / "t.json"), windows=20)
    for _ in range(4):
        trace.add(two_micro_batches())
    trace.close()
    assert {event["args"]["window"] for event in events(tmp_path / "t.json")} == {3, 4}


def test_a_run_without_a_third_window_leaves_no_file(tmp_path: Path) -> None:
    trace = Trace(str(tmp_path / "t.json"), windows=20)
    trace.add(two_micro_batches())
    trace.close()
    assert list(tmp_path.iterdir()) == []


def test_the_interpreters_exit_writes_what_was_collected(run_python: Any, request: Any, tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(request.config.rootpath)!r})
from meft_ds.offload.schedule.trace import Trace
from tests.offload.test_trace import two_micro_batches
trace = Trace("t.json", windows=20)
os.chdir("/")
for _ in range(3):
    trace.add(two_micro_batches())
"""
    run_python(code)
    assert {event["args"]["window"] for event in events(tmp_path / "t.json")} == {3}


def test_rows_and_processes_carry_names_and_times_are_microseconds(tmp_path: Path) -> None:
    trace = Trace(str(tmp_path / "t.json"), windows=1, rank=1)
    for _ in range(3):
        trace.add(two_micro_batches(start=100.0))
    assert [p.name for p in tmp_path.iterdir()] == ["t.rank1.json"]
    everything = json.loads((tmp_path / "t.rank1.json").read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in everything if e["name"] == "thread_name"}
    assert tuple(rows[tid] for tid in sorted(rows)) == LANES
    assert {e["pid"] for e in everything} == {1}
    (update,) = [e for e in everything if e.get("cat") == "host"]
    assert rows[update["tid"]] == "host" and update["name"] == "update layer0.rows"
    assert (update["ts"], update["dur"]) == (103_250_000, 250_000)
    assert update["args"] == {"unit": "layer0.rows", "window": 3}


def test_a_backward_lasts_from_the_forwards_end_to_its_last_gradient(tmp_path: Path) -> None:
    trace = Trace(str(tmp_path / "t.json"), windows=1)
    for _ in range(3):
        trace.add(two_micro_batches())
    compute = [(e["name"], e["ts"] // 10**6, e["dur"] // 10**6) for e in events(tmp_path / "t.json") if e["tid"] == 0]
    assert compute == [("forward", 0, 1), ("backward", 1, 1), ("forward", 3, 1), ("backward", 4, 2)]


def test_a_disk_that_fails_later_warns_and_does_not_stop_the_training(tmp_path: Path, caplog: Any) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    trace = Trace(str(folder / "t.json"), windows=1)
    folder.rmdir()
    for _ in range(3):
        trace.add(two_micro_batches())
    assert "could not be written" in caplog.text


def test_a_path_that_cannot_be_written_is_refused_at_the_start_with_its_key_and_the_fix(tmp_path: Path) -> None:
    def fault(path: Path | str) -> str:
        with pytest.raises(ValueError) as e:
            parse_config({"schedule": {"trace_file": str(path)}})
        return str(e.value)

    missing = fault(tmp_path / "none" / "t.json")
    assert "meft_offload.schedule.trace_file: expected a file in an existing, writable folder" in missing
    assert f"create the folder {str(tmp_path / 'none')!r}" in missing
    assert "is a folder, expected a regular file; move it away, or choose another path" in fault(tmp_path)
    assert "make the folder '/proc' writable" in fault("/proc/t.json")
    assert "meft_offload.schedule.trace_file" in fault("")
    assert parse_config({"schedule": {"trace_file": str(tmp_path / "t.json")}}).schedule.trace_windows == 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("path", "expected"), [("/a/t.json", "/a/t.rank2.json"), ("/a/t", "/a/t.rank2")])
def test_ranks_above_0_write_beside_it(path: str, expected: str) -> None:
    assert path_of_rank(path, 2) == Path(expected) and path_of_rank(path, 0) == Path(path)
