# SPDX-License-Identifier: Apache-2.0
"""Where an adapter's rows live: the ``RowSource`` contract, and ``DeviceRows``, which holds them all on one device."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

__all__ = ["DeviceRows", "RowSource"]


class RowSource(Protocol):
    """Rows of one layer. A row is key || value, 2 d wide. The adapter asks for rows; it never moves bytes itself."""

    @property
    def r(self) -> int:
        """Number of rows."""

    @property
    def d(self) -> int:
        """Width of a key."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of gathered rows, the compute dtype."""

    @property
    def device(self) -> torch.device:
        """Where gathered rows are put."""

    @property
    def capacity(self) -> int:
        """Most distinct rows that one ``gather`` or ``add_grad`` may name."""

    @property
    def version(self) -> int:
        """Goes up whenever rows change, that is after an optimizer update."""

    @property
    def selection(self) -> Literal["host", "device"]:
        """Where keys are scored."""

    @property
    def master(self) -> Tensor:
        """All rows [r, 2 d] as they are saved: fp32 where there is an fp32 copy."""

    def keys_for_selection(self) -> Tensor:
        """Return all keys [r, d], maybe strided, in ``dtype``: on the host for "host", on ``device`` for "device"."""

    def to_host(self, t: Tensor, what: str) -> Tensor:
        """Move a small tensor from device to host, counted under ``what``."""

    def to_device(self, t: Tensor, what: str) -> Tensor:
        """Move a small tensor from host to device, counted under ``what``."""

    def gather(self, table: Tensor) -> Tensor:
        """Fetch rows [n, 2 d] on ``device`` for ``table``, int64 [n] on the host; -1 asks for a row of zeros."""

    def add_grad(self, table: Tensor, grad: Tensor) -> None:
        """Add ``grad`` [n, 2 d] in fp32 to the gradients of rows ``table`` (distinct, or -1: ignored)."""

    @property
    def trains(self) -> bool:
        """Whether rows take gradients."""

    def foretell(self, forward: Hashable) -> None:
        """Note that a backward of ``forward`` may come as long as that object is alive."""

    def expect(self, forward: Hashable, node: torch.autograd.graph.Node) -> None:
        """Note that ``node``'s backward will add the gradients of ``forward``."""

    def record(self, union_rows: int, tokens: int, expert_load: Tensor | None) -> None:
        """Note U of a training forward, tokens that selected, and host int64 [N] token counts per expert."""


class DeviceRows(nn.Module):
    """All rows as one buffer beside the model: for inference, and the plainest source to test against.

    An ``nn.Module`` with a non-persistent buffer, so ``model.to(...)`` moves it and ``state_dict()`` leaves it out.
    ``trainable=True`` accumulates gradients in ``grad``, fp32 [r, 2 d].
    """

    def __init__(
        self,
        rows: Tensor,
        *,
        selection: Literal["host", "device"] = "device",
        capacity: int | None = None,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", rows, persistent=False)
        self.r, self.d = rows.shape[0], rows.shape[1] // 2
        self.capacity = capacity or self.r
        self.selection: Literal["host", "device"] = selection
        self.version = 0
        self.trainable = trainable
        self.grad: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def master(self) -> Tensor:
        return self.weight

    def keys_for_selection(self) -> Tensor:
        keys = self.weight[:, : self.d]
        return keys.cpu() if self.selection == "host" else keys

    def to_host(self, t: Tensor, what: str) -> Tensor:
        return t.cpu()

    def to_device(self, t: Tensor, what: str) -> Tensor:
        return t.to(self.device)

    def gather(self, table: Tensor) -> Tensor:
        ids = table.to(self.device)
        rows = self.weight.index_select(0, ids.clamp(min=0))
        empty = ids < 0
        return rows.masked_fill_(empty[:, None], 0) if empty.any() else rows

    def add_grad(self, table: Tensor, grad: Tensor) -> None:
        if not self.trainable:
            return
        if self.grad is None:
            self.grad = torch.zeros_like(self.weight, dtype=torch.float32)
        kept = table >= 0
        if not kept.all():
            table, grad = table[kept], grad[kept.to(grad.device)]
        self.grad.index_add_(0, table.to(self.device), grad.float())

    @property
    def trains(self) -> bool:
        return self.trainable

    def foretell(self, forward: Hashable) -> None:
        pass

    def expect(self, forward: Hashable, node: torch.autograd.graph.Node) -> None:
        pass

    def record(self, union_rows: int, tokens: int, expert_load: Tensor | None) -> None:
        pass
