# SPDX-License-Identifier: Apache-2.0
"""What the method tells of an engine that it cannot help."""

from __future__ import annotations

import pytest
import torch

from meft_ds.sparse_adapter import method


@pytest.mark.parametrize(("threads", "cpus", "told"), [(1, 8, True), (2, 8, False), (1, 1, False)])
def test_scoring_with_one_thread_of_several_cpus_is_warned_of(
    threads: int, cpus: int, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Asked where an accelerator's keys are scored on the host."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(method, "allowed_cpus", lambda: tuple(range(cpus)))
    method._warn_of_one_thread()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == told
    assert all("1 of 8 CPUs" in line and "OMP_NUM_THREADS" in line and '"device"' in line for line in lines)
