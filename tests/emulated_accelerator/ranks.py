# SPDX-License-Identifier: Apache-2.0
"""Process groups of the emulated device, which behave as NCCL's do.

A collective waits for the caller's current stream, then runs on the group's own stream, and the caller goes on at once.
`work.wait()` makes the current stream wait for it; the thread waits for a barrier only. Between processes gloo carries
the bytes, in a function that is queued on the group's stream and may touch device memory. Host tensors are refused.

With one hardware queue for all streams (`device.set_one_queue`), a collective keeps everything behind it from running.
Ranks that queue two groups' collectives in different orders then wait for each other for ever. `patience` turns that
into an error, which the next synchronization of the stream raises.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.emulated_accelerator import device

BACKEND = "emulatedccl"
patience = timedelta(minutes=5)
"""How long a collective waits for the other ranks."""


_numbers = itertools.count()  # of the groups that this process has made


class HeldUp(RuntimeError):
    """A collective found no peer in time: another rank is waiting in another one, or has gone."""


class Work(dist._Work):
    """A collective under way.

    Args:
        done: event after it on the group's stream.
        result: its output tensors.
    """

    def __init__(self, done: Any, result: Any, *, blocks: bool = False) -> None:
        super().__init__()
        self._done, self._result, self._blocks = done, result, blocks

    def wait(self, timeout: timedelta | None = None) -> bool:
        device.module.current_stream().wait_event(self._done)
        if self._blocks:
            self._done.synchronize()
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._done.query()

    def is_success(self) -> bool:
        return True

    def result(self) -> Any:
        return self._result


class EmulatedGroup(dist.ProcessGroup):
    """The ranks of one group; see the module."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        backend = dist.ProcessGroupGloo(store, rank, size, timeout=min(timeout, patience))
        self._gloo = dist.ProcessGroup(store, rank, size)
        self._gloo._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self._gloo._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        self._number = next(_numbers)
        self._stream: Any = None  # made in the process that uses it

    def getBackendName(self) -> str:
        return BACKEND

    @property
    def _device_types(self) -> list[torch.device]:  # objects travel on the device, as NCCL's do
        return [torch.device(device.NAME)]

    def barrier(self, opts: Any = None) -> Work:
        return self._queue("barrier", [], blocks=True)

    def _queue(self, name: str, args: list[Any], *, blocks: bool = False) -> Work:
        if self._stream is None:
            self._stream = device.module.Stream()
        for t in _tensors(args):
            if t.device.type != device.NAME:
                raise RuntimeError(f"No backend type associated with device type {t.device.type} ({name})")
            if not t.is_contiguous():
                raise ValueError(f"Tensors must be contiguous ({name})")
            t.record_stream(self._stream)  # it may be freed before its turn comes
        self._stream.wait_stream(device.module.current_stream())
        call, who = getattr(self._gloo, name), f"{name} of group {self._number} on rank {self.rank()}"
        views = [
            _mapped(device.backend.host_view, arg) for arg in args
        ]  # on the caller's thread, where autograd is as it was

        def run() -> None:
            try:
                call(*views).wait()
            except RuntimeError as error:
                raise HeldUp(f"{who} found no peer: {error}") from error

        device.backend.enqueue(self._stream.stream_id, run, name)
        done = device.module.Event()
        done.record(self._stream)
        return Work(done, args[0] if args else None, blocks=blocks)


def _as_gloo_does(name: str) -> Callable[..., Work]:
    def collective(self: EmulatedGroup, *args: Any) -> Work:
        return self._queue(name, list(args))

    return collective


for _name in (
    "allgather all_gather_single allgather_coalesced all_gather_single_coalesced allreduce allreduce_coalesced "
    "all_to_all_single alltoall broadcast gather reduce reduce_scatter reduce_scatter_single "
    "reduce_scatter_single_coalesced scatter send recv"
).split():
    setattr(EmulatedGroup, _name, _as_gloo_does(_name))


def register() -> None:
    """Make `init_process_group(BACKEND)` known to torch. Once per process."""
    dist.Backend.register_backend(BACKEND, EmulatedGroup, devices=[device.NAME])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return [_mapped(change, part) for part in value]
    return value
