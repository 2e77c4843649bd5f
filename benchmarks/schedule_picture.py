# SPDX-License-Identifier: Apache-2.0
"""Draws what every lane did over some steps, one panel per order of the same emulated model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.schedule_orders import Run

ROWS = ("compute", "down", "host", "up")
# (lane, what) -> (row, colour map, words of the legend)
_KINDS = {
    ("compute", "forward"): ("compute", "Blues", "forward (emulated)"),
    ("compute", "backward"): ("compute", "Purples", "backward (emulated)"),
    ("down", "send"): ("down", "Oranges", "payload down (emulated link)"),
    ("host", "update"): ("host", "Greens", "AdamW on the host (real)"),
    ("host", "norm"): ("host", "Greys", "norm (real)"),
    ("up", "fetch"): ("up", "Reds", "reply up (emulated link)"),
}


def draw(runs: Mapping[str, Run], path: Path, title: str) -> None:
    """Write the picture.

    Args:
        runs: title of the panel -> measured run; the last one's step sets the length of the time axis.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    length = 1.02 * list(runs.values())[-1].step_s
    figure, axes = pyplot.subplots(len(runs), 1, sharex=True, figsize=(15, 2.3 * len(runs) + 1.6), squeeze=False)
    for panel, (name, run) in zip(axes[:, 0], runs.items(), strict=True):
        _lanes(panel, run, length, pyplot.get_cmap)
        panel.set_title(f"{name}: {run.step_s:.2f} s per step", loc="left", fontsize=12)
    axes[-1, 0].set_xlabel("seconds; white: the lane has nothing to do", fontsize=11)
    legend: list[Patch | Line2D] = [
        Patch(color=pyplot.get_cmap(colours)(0.65), label=words) for _, colours, words in _KINDS.values()
    ]
    legend.append(Line2D([], [], color="black", linestyle="--", label="a step begins"))
    figure.suptitle(title, fontsize=14)
    figure.legend(
        handles=legend,
        loc="lower center",
        ncol=4,
        fontsize=11,
        frameon=False,
        title="pale: shallow layer, deep colour: deep layer",
    )
    figure.tight_layout(rect=(0, 0.09, 1, 0.99))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _lanes(panel, run: Run, length: float, colour_map) -> None:  # type: ignore[no-untyped-def]
    zero = run.begins[0]
    until = min(length, run.begins[-1] - zero)
    layer_of = {span.unit: int(found[0]) for span in run.spans if (found := re.findall(r"\d+", span.unit))}
    deepest = max(max(layer_of.values()), 1)
    for (lane, what), (row, colours, _) in _KINDS.items():
        shown = [
            span
            for span in run.spans
            if (span.lane, span.what) == (lane, what) and span.end > zero and span.start < zero + until
        ]
        bars = [(max(s.start - zero, 0.0), min(s.end - zero, until) - max(s.start - zero, 0.0)) for s in shown]
        shades = [colour_map(colours)(0.25 + 0.7 * layer_of[s.unit] / deepest) for s in shown]
        panel.broken_barh(bars, (len(ROWS) - ROWS.index(row) - 1.4, 0.8), facecolors=shades, linewidth=0)
    for begin in run.begins:
        if begin - zero <= until:
            panel.axvline(begin - zero, color="black", linestyle="--", linewidth=1)
    panel.set_yticks([len(ROWS) - 1 - i for i in range(len(ROWS))], ROWS, fontsize=11)
    panel.set_xlim(0, length)
    panel.set_ylim(-0.6, len(ROWS) - 0.4)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.tick_params(axis="y", length=0)
