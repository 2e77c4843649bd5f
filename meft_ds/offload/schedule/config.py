# SPDX-License-Identifier: Apache-2.0
"""The `"schedule"` key of the block: how a step's stages overlap with the model's compute."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from meft_ds.offload.schedule.eager import Mode
from meft_ds.offload.schedule.trace import writable
from meft_ds.options import Settings, count, file_name, number

_threads = number("a whole number of threads, at least 1", 1, 1024, whole=True, words=("auto",))


class ScheduleConfig(Settings):
    """How a step's stages overlap with the model's compute."""

    mode: Mode = Field(
        "exact",
        description="exact: updates and transfers overlap, results are bit for bit those of serial. eager: updates "
        "start before the gradient norm is known, for machines where they take longer than a forward (what that means "
        "for clipping and overflow: docs/explanation/schedule.md). auto: exact or eager, by measured times, logged "
        "once. serial: nothing overlaps. Default: exact.",
    )
    host_threads: Annotated[int | Literal["auto"], BeforeValidator(_threads)] = Field(
        "auto",
        description="Threads of the host update on each rank. auto = the rank's share of the CPUs that its process may "
        "use, on an accelerator all but 2 of them, at most OMP_NUM_THREADS.",
    )
    trace_file: Annotated[str | None, BeforeValidator(file_name), AfterValidator(writable)] = Field(
        None,
        description="Write a Chrome trace (JSON, opens in Perfetto) of the lanes to this file, with .rankN before its "
        "ending on ranks above 0. Default: none.",
    )
    trace_windows: Annotated[int, BeforeValidator(count)] = Field(
        20, description="The trace holds this many accumulation windows, from the third on. Default: 20."
    )
