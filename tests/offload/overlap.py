# SPDX-License-Identifier: Apache-2.0
"""Lanes that are late at random, for tests that hunt races."""

from __future__ import annotations

import random
import time
from typing import Any

from meft_ds.offload.schedule.lanes import Job, Lane, Lanes


class LateLane:
    """Sleeps a random while before each job, and at times for much longer."""

    def __init__(self, lane: Lane, rng: random.Random, most_s: float) -> None:
        self._lane, self._rng, self._most_s = lane, rng, most_s

    def submit(self, job: Job, *, urgent: bool = False) -> None:
        delay = self._rng.random() ** 3 * self._most_s

        def late() -> None:
            time.sleep(delay)
            job()

        self._lane.submit(late, urgent=urgent)

    @property
    def closed(self) -> bool:
        return getattr(self._lane, "closed", False)

    def close(self) -> None:
        self._lane.close()


def make_late(pipeline: Any, seed: int, most_s: float = 2e-3) -> None:
    """Make an overlapping pipeline's lanes late; a window then is one random schedule."""
    lanes: Lanes = pipeline._lanes
    rngs = [random.Random(f"{seed}{name}") for name in ("down", "host", "up")]
    pipeline._lanes = Lanes(
        down=LateLane(lanes.down, rngs[0], most_s),
        host=LateLane(lanes.host, rngs[1], most_s),
        up=LateLane(lanes.up, rngs[2], most_s),
    )


def run_inline(pipeline: Any) -> None:
    """Run an overlapping pipeline's stages in the caller: the serial twin of `eager`."""
    pipeline._lanes.close()
    pipeline._lanes = Lanes.inline()
