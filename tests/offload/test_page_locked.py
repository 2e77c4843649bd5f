# SPDX-License-Identifier: Apache-2.0
"""Page-locked memory: what is taken, and when it is let go. CUDA's calls are stood in for: here is nothing to lock."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import weakref

import pytest
import torch

from meft_ds.offload.host import page_locked as module
from meft_ds.offload.host.page_locked import page_locked, taken

CPU, CUDA, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("xpu")
PAGE = mmap.PAGESIZE


class Driver:
    """Stands in for CUDA's two calls, and knows what is locked now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, error: int = 0) -> None:
        self.locked: dict[int, int] = {}
        self.seen: list[int] = []
        self._error = error
        monkeypatch.setattr(module, "_register", self._register)
        monkeypatch.setattr(module, "_unregister", self._unregister)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def _register(self, address: int, nbytes: int) -> int:
        assert address % PAGE == 0
        if self._error == 0:
            self.locked[address] = nbytes
        return self._error

    def _unregister(self, address: int) -> None:
        self.seen.append(self.locked.pop(address))


@pytest.mark.parametrize(
    ("device", "nbytes", "expected"),
    [
        (CPU, 5000, 5000),
        (CUDA, 0, 0),
        (CUDA, 1, PAGE),
        (CUDA, PAGE, PAGE),
        (CUDA, 5 * 2**30 + 1, 5 * 2**30 + PAGE),
        (OTHER, 0, 0),
        (OTHER, 4096, 4096),
        (OTHER, 5 * 2**30, 8 * 2**30),
    ],
)
def test_whole_pages_are_taken_where_they_can_be_locked_and_powers_of_two_elsewhere(
    device: torch.device, nbytes: int, expected: int
) -> None:
    assert taken(nbytes, device) == expected


def test_pages_are_locked_once_and_let_go_with_the_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    block = page_locked(5000, CUDA)
    assert block.dtype == torch.uint8 and block.device == CPU and not block.any()
    assert driver.locked == {block.data_ptr(): 5000}
    part = block[4000:].view(torch.float32)
    part.fill_(3.0)
    del block
    gc.collect()
    assert driver.locked and part.sum() == 750
    del part
    gc.collect()
    assert not driver.locked and driver.seen == [5000]


def test_nothing_is_locked_for_a_host_or_for_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    assert page_locked(5000, CPU).shape == (5000,) and page_locked(0, CUDA).shape == (0,)
    assert not driver.locked


def test_what_an_evaluation_takes_can_be_written_to_by_training(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch)
    with torch.inference_mode():
        block = page_locked(8, CUDA)
    assert not block.is_inference()


def test_a_driver_that_refuses_is_reported_and_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch, error=2)
    views: list[weakref.ref[memoryview]] = []
    lock = module.lock

    def watched(view: memoryview, *rest: object) -> object:
        views.append(weakref.ref(view))
        return lock(view, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "lock", watched)
    with pytest.raises(ValueError, match=r"could not page-lock 4.9 KiB .*error 2\); lift"):
        page_locked(5000, CUDA)
    gc.collect()
    assert [view() for view in views] == [None]


def test_a_forked_process_lets_go_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    block = page_locked(100, CUDA)
    me = os.getpid()
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: me + 1)
        del block
        gc.collect()
    assert driver.locked and not driver.seen


_EXITS = """
import torch
from meft_ds.offload.host import page_locked
page_locked._register = lambda address, nbytes: 0
page_locked._unregister = lambda address: print("let go")
torch.cuda.current_device, torch.cuda.synchronize = lambda: 0, lambda device: None
kept = page_locked.page_locked(100, torch.device("cuda"))
page_locked.page_locked(100, torch.device("cuda"))
print("exits", flush=True)
"""


def test_pages_stay_locked_when_the_interpreter_exits() -> None:
    """The driver may be gone by then, and tensors may still be used."""
    ended = subprocess.run([sys.executable, "-c", _EXITS], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and ended.stdout.split("\n") == ["let go", "exits", ""] and not ended.stderr
