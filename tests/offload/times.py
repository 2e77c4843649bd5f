# SPDX-License-Identifier: Apache-2.0
"""Made-up measurements of a window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from meft_ds.offload.schedule.timing import Span, WindowTimes


def window_times(
    *, spans: Sequence[Span] = (), marks: Sequence[tuple[str, float]] = (), payloads: int = 1, **seconds: float
) -> WindowTimes:
    """Seconds are 0 where nothing is given."""
    zero = {field.name: 0.0 for field in fields(WindowTimes) if field.name.endswith("_s")}
    return WindowTimes(**{**zero, **seconds}, payloads=payloads, spans=spans, marks=marks)
