# SPDX-License-Identifier: Apache-2.0
"""The emulated device behaves as CUDA does where a program could tell, and shows what a program does wrong."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Forge

Ask = Callable[..., Any]


@pytest.fixture
def ask(emulated_forge: Forge, tmp_path: Path) -> Ask:
    """Runs a function of `backend_checks.py` in a process of its own and returns its result."""

    def run(name: str, **arguments: Any) -> Any:
        call = f"tests.emulated_accelerator.backend_checks:{name}"
        return emulated_forge.results(call, tmp_path, world=1, **arguments)[0]

    return run


def test_operators_give_the_cpus_results(ask: Ask) -> None:
    differences = ask("operators")
    assert {name: d for name, d in differences.items() if not d < 1e-6} == {}


def test_what_cuda_refuses_is_refused(ask: Ask) -> None:
    said = ask("refusals")
    assert said["host tensor"].startswith("RuntimeError: Expected all tensors to be on the same device")
    assert said["host tensor in an operator of ours"].startswith("RuntimeError")
    assert said["numpy"].startswith("TypeError")
    assert "cannot be multiplied" in said["shapes"]
    assert said["memory"].startswith("OutOfMemoryError")
    assert "page-locked" in said["pinned"]


def test_the_host_cannot_touch_device_memory(emulated_forge: Forge, tmp_path: Path) -> None:
    call = "tests.emulated_accelerator.backend_checks:read_on_the_host"
    (ended,) = emulated_forge.run(call, tmp_path, world=1)
    assert ended.code == -signal.SIGSEGV


def test_an_error_on_a_stream_is_raised_once_where_somebody_waits(ask: Ask) -> None:
    said = ask("asynchronous_error")
    assert said["at once"] == said["again"] == ""
    assert "asynchronous error of aten::index_select: index out of range" in said["later"]


@pytest.mark.parametrize("lazy", [False, True])
def test_a_copy_down_without_a_wait_reads_memory_that_nobody_has_written(ask: Ask, lazy: bool) -> None:
    read = ask("waits", lazy=lazy)
    assert read["wait"] == 1
    assert read["none"] != 1


def test_an_upload_that_nobody_waits_for_is_not_there(ask: Ask) -> None:
    assert ask("uploads_without_a_wait") == {"wait": 1, "none": 0}


def test_a_block_that_is_freed_too_early_is_overwritten(ask: Ask) -> None:
    read = ask("reuse")
    assert read["recorded"] == 14
    assert math.isnan(read["not"]) or read["not"] == 2


def test_only_an_asynchronous_copy_of_page_locked_memory_reads_it_later(ask: Ask) -> None:
    assert ask("host_memory") == {
        "pinned, asynchronous": 5,
        "pinned, blocking": 1,
        "pageable, asynchronous": 1,
        "copies through pageable memory": 1,
    }


def test_with_one_hardware_queue_streams_wait_for_one_another(ask: Ask) -> None:
    found = ask("one_queue")
    assert found["a queue each"]["reached"] == 1
    assert found["one queue"] == {"reached": 0, "unfinished": ["a peer that is late, and 2 more wait"]}


def test_waits_launches_and_bytes_are_counted(ask: Ask) -> None:
    found = ask("counters")
    assert found["counted"] == {
        "launch aten::mul": 1,
        "launch aten::sum": 1,
        "launch aten::nonzero": 1,
        "launch copy down": 1,
        "pageable copy down": 1,
        "synchronize item": 1,
        "synchronize copy down": 1,
        "synchronize aten::nonzero": 1,
        "synchronize event": 1,
    }
    assert found["mine"] == [4096, 4096]
    assert found["pinned"] == [2048, 2048]  # a power of two, as torch takes for CUDA
    assert found["is"]


def test_autocast_has_torchs_lists(ask: Ask) -> None:
    assert ask("autocast") == {"mm": "torch.bfloat16", "softmax": "torch.float32", "add": "torch.float32"}


def test_events_time_the_streams_work(ask: Ask) -> None:
    assert ask("times")["ms"] >= 45


def test_parameters_stay_the_same_objects_when_a_module_moves(ask: Ask) -> None:
    assert ask("module_to") == {"same": True, "there": True}
