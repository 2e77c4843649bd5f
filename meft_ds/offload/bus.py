# SPDX-License-Identifier: Apache-2.0
"""The bus between accelerator and host: every byte that crosses goes through here and is counted by channel.

Serial: each call returns when its copy is done. The copies use pinned staging buffers that grow to the largest transfer
seen and are then reused. On a CPU device there is nothing to cross, so no copy is made, but the bytes are counted as
if.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from meft_ds import ops


class Bus:
    """Counts and performs transfers between `device` and the host.

    Args:
        device: where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_host = device.type == "cpu"
        self._counts: dict[str, list[int]] = {}
        self._staging: dict[Hashable, Tensor] = {}

    def count(self, channel: str, *, down: int = 0, up: int = 0) -> None:
        """Add bytes to a channel's counters."""
        entry = self._counts.setdefault(channel, [0, 0])
        entry[0] += down
        entry[1] += up

    def take_counts(self) -> dict[str, dict[str, int]]:
        """The counters since the last call, as {channel: {"down": bytes, "up": bytes}}; starts them anew."""
        taken = {name: {"down": down, "up": up} for name, (down, up) in sorted(self._counts.items())}
        self._counts = {}
        return taken

    def staging_bytes(self) -> int:
        """Host bytes held by the staging buffers."""
        return sum(buffer.numel() for buffer in self._staging.values())

    def down(self, t: Tensor, channel: str, key: Hashable | None = None) -> Tensor:
        """Device -> host. With `key`, the result lies in that key's pinned buffer and is valid until its next use."""
        self.count(channel, down=t.numel() * t.element_size())
        if self.is_host:
            return t
        if key is None:
            return t.cpu()
        host = self._stage(key, t.shape, t.dtype)
        host.copy_(t)
        return host

    def up(self, t: Tensor, channel: str) -> Tensor:
        """Host -> device, as a new tensor (the same tensor on a CPU device)."""
        self.count(channel, up=t.numel() * t.element_size())
        return t if self.is_host else t.to(self.device)

    def up_into(self, dst: Tensor, src: Tensor, channel: str) -> None:
        """Host `src` -> device `dst`, same shape; casts when the dtypes differ."""
        self.count(channel, up=src.numel() * src.element_size())
        dst.copy_(src)

    def fetch_rows(self, src: Tensor, ids: Tensor, dst: Tensor, channel: str) -> None:
        """Rows `ids` (int64 [k]) of host `src` [n, w] -> device `dst` [k, w] of the same dtype."""
        self.count(channel, up=dst.numel() * dst.element_size())
        if self.is_host:
            ops.gather_rows(src, ids, dst)
            return
        rows = self._stage(channel, dst.shape, dst.dtype)
        ops.gather_rows(src, ids, rows)
        dst.copy_(rows)

    def _stage(self, key: Hashable, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        nbytes = shape.numel() * dtype.itemsize
        buffer = self._staging.get(key)
        if buffer is None or buffer.numel() < nbytes:
            buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            self._staging[key] = buffer
        return buffer[:nbytes].view(dtype).view(shape)
