# SPDX-License-Identifier: Apache-2.0
"""A Chrome trace of the lanes, for Perfetto (ui.perfetto.dev) or chrome://tracing.

Each lane is a row, each rank a process. Times are `time.perf_counter`'s, which all ranks of a machine share, so the
files of several ranks fit together.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from meft_ds.files import check_writable, write_text
from meft_ds.offload.schedule.timing import LaneName, WindowTimes, phases

LANES: tuple[LaneName, ...] = get_args(LaneName)
"""Rows from top to bottom; "compute" holds the model's forwards and backwards."""

_logger = logging.getLogger("meft_ds")
_WARM_UP = 2  # windows left out: they pay for compilation and cold caches


class Trace:
    """Collects windows from the third on and writes them once: after the last one, at `close`, or at the exit.

    Args:
        path: of rank 0's file; see `path_of_rank` for the others.
        windows: how many to collect.
        rank: of this process.
    """

    def __init__(self, path: str, windows: int, rank: int = 0) -> None:
        self.path = path_of_rank(path, rank)
        self._rank, self._seen, self._last = rank, 0, _WARM_UP + windows
        self._events: list[dict[str, Any]] = []
        self._write_once = weakref.finalize(self, _write, self.path, self._events, rank)

    def add(self, times: WindowTimes) -> None:
        """Take the next window. Only what the file needs of it is kept."""
        self._seen += 1
        if not self._write_once.alive or self._seen <= _WARM_UP:
            return
        self._events += _events(times, self._seen, self._rank)
        if self._seen == self._last:
            self.close()

    def close(self) -> None:
        """Write what was collected, if nothing was written yet."""
        self._write_once()


def path_of_rank(path: str, rank: int) -> Path:
    """Return `name.json` for rank 0, `name.rank1.json` for rank 1."""
    whole = Path(path).absolute()  # the program may change its folder before the file is written
    return whole if rank == 0 else whole.with_name(f"{whole.stem}.rank{rank}{whole.suffix}")


def writable(path: str | None) -> str | None:
    """Return `path` if it is None or a file can be written there; otherwise raise as `check_writable`."""
    if path is not None:
        check_writable(path)
    return path


def _events(times: WindowTimes, window: int, rank: int) -> Iterator[dict[str, Any]]:
    for what, (_, start), (_, end) in phases(times.marks):
        yield _event("compute", what, start, end, rank, {"window": window})
    for span in times.spans:
        about = {"unit": span.unit} if span.unit else {}
        name = f"{span.what} {span.unit}" if span.unit else span.what
        yield _event(span.lane, name, span.start, span.end, rank, {**about, "window": window})


def _event(lane: LaneName, name: str, start: float, end: float, rank: int, args: dict[str, Any]) -> dict[str, Any]:
    # whole numbers, and both ends rounded, not the duration: viewers drop neighbours that overlap by a rounding error
    ts, until = round(start * 1e6), round(end * 1e6)
    place = {"pid": rank, "tid": LANES.index(lane)}
    return {"ph": "X", "name": name, "cat": lane, "ts": ts, "dur": until - ts, **place, "args": args}


def _write(path: Path, events: list[dict[str, Any]], rank: int) -> None:
    if not events:
        return
    named = [{"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"meft-ds rank {rank}"}}]
    for tid, lane in enumerate(LANES):
        row = {"ph": "M", "pid": rank, "tid": tid}
        named.append({**row, "name": "thread_name", "args": {"name": lane}})
        named.append({**row, "name": "thread_sort_index", "args": {"sort_index": tid}})
    text = json.dumps({"traceEvents": [*named, *events], "displayTimeUnit": "ms"})
    events.clear()
    try:
        write_text(path, text, sync=False)
    except (OSError, ValueError) as e:  # a full disk must not end the training
        _logger.warning("the trace %s could not be written: %s", path, e)
