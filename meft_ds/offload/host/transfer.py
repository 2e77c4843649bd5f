# SPDX-License-Identifier: Apache-2.0
"""The bus between accelerator and host: every byte that crosses goes through here and is counted by channel.

The two directions are independent. A lane's copies run on that direction's own stream and the lane's thread sleeps
until they are done, so the thread that trains never waits. Page-locked buffers that the plan knows are taken once;
those of small transfers grow to the largest one seen and are then reused.

On a CPU device there are no streams, and a lane's copy is a copy in memory. What crosses on the training thread's
demand (`down`, `up`) lies in place already and is not copied, but its bytes are counted as if.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from meft_ds import ops
from meft_ds.offload.host.page_locked import page_locked, taken

Counts = dict[str, dict[str, int]]
EVALUATION = "eval_"
"""What the names of channels begin with that an evaluation uses."""
ROWS = "fetched rows"
"""Key of the buffer through which `Bus.fetch_rows` goes."""


def training_bytes(counts: Counts) -> tuple[int, int]:
    """Return the bytes down and up over all channels but those of evaluations."""
    entries = [entry for name, entry in counts.items() if not name.startswith(EVALUATION)]
    return sum(entry["down"] for entry in entries), sum(entry["up"] for entry in entries)


class WindowBytes:
    """What crossed for one accumulation window. Lanes still add to it when the next one is open."""

    def __init__(self) -> None:
        self._adding = threading.Lock()
        self._of: dict[str, tuple[int, int]] = {}

    def add(self, channel: str, down: int, up: int) -> None:
        """Add bytes to a channel."""
        with self._adding:
            before = self._of.get(channel, (0, 0))
            self._of[channel] = before[0] + down, before[1] + up

    def by_channel(self) -> Counts:
        """Return {channel: {"down": bytes, "up": bytes}}."""
        with self._adding:
            return {name: {"down": down, "up": up} for name, (down, up) in sorted(self._of.items())}


@dataclass
class DeviceTime:
    """How long a lane's work took on its stream; None until it is done, and where there are no streams."""

    seconds: float | None = None


class Bus:
    """Counts and performs transfers between `device` and the host.

    Args:
        device: where the model computes.

    Attributes:
        window: bytes of the open accumulation window.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_host = device.type == "cpu"
        self.window = WindowBytes()
        self._blocks: list[int] = []
        self._staging: dict[Hashable, Tensor] = {}
        self._runtime: Any = None if self.is_host else torch.get_device_module(device)
        self._streams: dict[str, Any] = {}
        self._training: Any = None
        if self._runtime is not None:
            self._streams = {name: self._runtime.Stream(device) for name in ("down", "up")}

    # -- counters ------------------------------------------------------------------------------------------------------

    def count(self, channel: str, *, down: int = 0, up: int = 0) -> None:
        """Add bytes to a channel's counters."""
        self.window.add(channel, down, up)

    def of_window(self) -> Bus:
        """Return this bus for a job of the open window, which is counted there even if it runs in the next one."""
        return copy.copy(self)  # the same buffers and streams; `close_window` gives only the original new counters

    def close_window(self) -> WindowBytes:
        """Open the next window's counters; return those of the one closed."""
        closed, self.window = self.window, WindowBytes()
        return closed

    @property
    def allocations(self) -> int:
        """How many page-locked blocks have been taken so far."""
        return len(self._blocks)

    # -- buffers -------------------------------------------------------------------------------------------------------

    def reserve(self, sizes: Mapping[Hashable, int]) -> None:
        """Take a page-locked buffer for every key (bytes) that has none; for buffers that the plan knows."""
        for key, size in sizes.items():
            if size and key not in self._staging:
                self._staging[key] = self._pinned(size)

    # -- on the thread that trains -------------------------------------------------------------------------------------

    def down(self, t: Tensor, channel: str, key: Hashable | None = None) -> Tensor:
        """Copy from the device to the host, done on return. With `key` it is valid until the key's next use."""
        self.count(channel, down=t.numel() * t.element_size())
        if self.is_host:
            return t
        if key is None:
            return t.cpu()
        host = self._stage(key, t.shape, t.dtype)
        host.copy_(t)
        return host

    def up(self, t: Tensor, channel: str) -> Tensor:
        """Copy from the host to the device, into a new tensor (on a CPU device return the tensor itself)."""
        self.count(channel, up=t.numel() * t.element_size())
        return t if self.is_host else t.to(self.device)

    def fetch_rows(self, src: Tensor, ids: Tensor, dst: Tensor, channel: str) -> None:
        """Copy rows `ids` (int64 [k]) of host `src` [n, w] to device `dst` [k, w], of the same dtype."""
        self.count(channel, up=dst.numel() * dst.element_size())
        if self.is_host:
            ops.gather_rows(src, ids, dst)
            return
        rows = self._stage(ROWS, dst.shape, dst.dtype)
        ops.gather_rows(src, ids, rows)
        dst.copy_(rows)

    # -- on a lane, or in line -----------------------------------------------------------------------------------------

    def send(self, t: Tensor, dtype: torch.dtype, channel: str, key: Hashable) -> Tensor:
        """Cast to `dtype`, and copy from the device to the key's page-locked buffer; it is there when the lane ends.

        Whoever holds `t` keeps it until then: the stream on which it was made does not wait for the copy.
        """
        host = self._stage(key, t.shape, dtype)
        self.count(channel, down=host.numel() * host.element_size())
        self._copy_down(host, t)
        return host

    def up_into(self, dst: Tensor, src: Tensor, channel: str) -> None:
        """Copy host `src` to device `dst`, of the same shape and dtype; the current stream waits for it."""
        self.count(channel, up=src.numel() * src.element_size())
        self._copy_up(dst, src)

    def _copy_down(self, host: Tensor, t: Tensor) -> None:
        host.copy_(t if self.is_host else t.to(host.dtype), non_blocking=True)

    def _copy_up(self, dst: Tensor, src: Tensor) -> None:
        dst.copy_(src, non_blocking=True)

    # -- streams and events --------------------------------------------------------------------------------------------

    def mark(self, *, timed: bool = False) -> Any:
        """Mark a point in the current stream's work, to wait for elsewhere; None where there are no streams."""
        if self.is_host:
            return None
        event = self._runtime.Event(enable_timing=timed)
        event.record(self._runtime.current_stream(self.device))
        return event

    def wait(self, mark: Any) -> None:
        """Let the current stream go on only after `mark`; the calling thread does not wait."""
        if mark is not None:
            self._runtime.current_stream(self.device).wait_event(mark)

    @contextlib.contextmanager
    def lane(self, direction: Literal["down", "up"], after: Any = None) -> Iterator[DeviceTime]:
        """Work inside runs on that direction's stream, after `after`, and is done on exit (the thread waits).

        What is yielded says then how long it took, from when it could begin.
        """
        took = DeviceTime()
        if self.is_host:
            yield took
            return
        stream = self._streams[direction]
        with self._runtime.stream(stream):
            if after is not None:
                stream.wait_event(after)
            begun, done = self._timer(), self._timer()
            begun.record(stream)
            yield took
            done.record(stream)
        done.synchronize()
        took.seconds = begun.elapsed_time(done) / 1e3

    def enter(self) -> None:
        """Note that the current stream is the one that trains."""
        if self._runtime is not None:
            self._training = self._runtime.current_stream(self.device)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Work inside runs on the stream that trains, and the current stream goes on after it."""
        current = None if self._runtime is None else self._runtime.current_stream(self.device)
        if self._training is None or current == self._training:
            yield
            return
        with self._runtime.stream(self._training):
            yield
            done = self.mark()
        self.wait(done)

    def use_device(self) -> None:
        """Make `device` the calling thread's current one."""
        if not self.is_host and self.device.index is not None:
            self._runtime.set_device(self.device)

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _timer(self) -> Any:
        try:
            return self._runtime.Event(enable_timing=True, blocking=True)  # a thread that waits for it does not spin
        except TypeError:  # not every device lets threads choose
            return self._runtime.Event(enable_timing=True)

    def _stage(self, key: Hashable, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        nbytes = shape.numel() * dtype.itemsize
        buffer = self._staging.get(key)
        if buffer is None or buffer.numel() < nbytes:
            # with room to spare once it proves too small: lengths that vary a little must not take a block each time
            room = nbytes if buffer is None else nbytes + nbytes // 4
            buffer = self._staging[key] = self._pinned(taken(room, self.device))
        return buffer[:nbytes].view(dtype).view(shape)

    def _pinned(self, nbytes: int) -> Tensor:
        self._blocks.append(nbytes)
        return page_locked(nbytes, self.device)
