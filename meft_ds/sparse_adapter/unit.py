# SPDX-License-Identifier: Apache-2.0
"""The `rows` wire format: the gradients of the rows that were active in a window go down with their ids, and the
updated rows become what the next micro-batch fetches.

Bytes per layer and window (sparse_adapter's formula): 2*d*U_win*bytes up, fetched once per window, and as many down,
2*d'*U_win*bytes with compression.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meft_ds import ops
from meft_ds.offload.host.adam import RowAdam, RowMode
from meft_ds.offload.host.page_locked import taken
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.ranks import Ranks, owned_range, reduce_rows_to_owners, sum_rows_across
from meft_ds.offload.unit import Footprint, Unit
from meft_ds.ops.adam import AdamHyper
from meft_ds.sparse_adapter.config import ResolvedCompress
from meft_ds.sparse_adapter.rows.compression import CompressedRowAdam, RowCompression, block_rows, view_bytes
from meft_ds.sparse_adapter.rows.host import HostRows


class RowsUnit(Unit):
    """One layer's adapter rows.

    Args:
        name: unit name, e.g. "layer3.rows".
        layer: position in layer order.
        rows: the layer's row source.
        group: index of the user's parameter group.
        ranks: data-parallel ranks; this one owns 1/N of the rows, among the N of its node.
        mode: "dense" or "lazy" AdamW.
        moments_dtype: float32 or bfloat16.
        grad_dtype: dtype of the gradients on the bus.
        compression: what the gradients go through before anything else sees them; None = nothing.
    """

    wire = "rows"
    weight_state = frozenset({"master"})

    def __init__(
        self,
        *,
        name: str,
        layer: int,
        rows: HostRows,
        group: int,
        ranks: Ranks,
        mode: RowMode,
        moments_dtype: torch.dtype,
        grad_dtype: torch.dtype,
        compression: RowCompression | None = None,
    ) -> None:
        self.name, self.layer, self.group = name, layer, group
        self.rows = rows
        self._ranks, self._mode, self._grad_dtype = ranks, mode, grad_dtype
        self._moments_dtype = moments_dtype
        self._compression = compression
        self._lo, self._hi = owned_range(rows.r, ranks.here)  # each node has a store
        own = slice(self._lo, self._hi)
        master, replica = rows.store
        state = master[own], None if replica is master else replica[own], moments_dtype, mode
        self.adam = RowAdam(*state) if compression is None else CompressedRowAdam(*state, compression)
        self._ids: Tensor | None = None
        self._payload: Tensor | None = None
        self._collected: Tensor | None = None  # on the device, kept until the lane has done with it
        rows.on_gradient = self._tell_gradient
        rows.on_complete = self._tell_complete
        rows.before_use = self._tell_needed

    def release(self) -> None:
        self.rows.stop_telling()  # the model may keep the rows, which must not keep this unit and its moments

    def footprint(self) -> Footprint:
        return rows_footprint(
            r=self.rows.r,
            d=self.rows.d,
            own=self._hi - self._lo,
            capacity=self.rows.capacity,
            dtype=self.rows.dtype,
            moments_dtype=self._moments_dtype,
            grad_dtype=self._grad_dtype,
            device=self.rows.device,
            selection=self.rows.selection,
            mode=self._mode,
            compress=None if self._compression is None else self._compression.settings,
        )

    def collect(self) -> None:
        self._ids, g = self.rows.close_window()
        self._payload = g if self._compression is None else self._compression.compress(g)
        self._collected = self._payload

    def reduce(self, ranks: Ranks) -> None:
        assert self._ids is not None and self._payload is not None
        if ranks.world > 1:
            contribution = self._payload.to(self._grad_dtype)  # the bytes on the bus, also between ranks
            self._ids, self._payload = reduce_rows_to_owners(self._ids, contribution, self.rows.r, ranks.here)
        if ranks.across is not None:
            self._ids, self._payload = sum_rows_across(self._ids, self._payload, ranks.across)

    def send(self, bus: Bus) -> None:
        assert self._payload is not None
        self._payload = bus.send(self._payload, self._grad_dtype, "rows", key=self.name)

    def sq_norm(self) -> float:
        assert self._payload is not None
        self._collected = None
        return ops.sq_norm(self._payload) if self.saves_state else 0.0  # all nodes have the same

    def host_step(self, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        assert self._ids is not None and self._payload is not None
        self.adam.step_rows(self._ids - self._lo, self._payload, hyper, step=step, grad_scale=grad_scale)

    def fetch(self, bus: Bus, ranks: Ranks) -> None:
        ranks.here.barrier()  # a rank may fetch what another one updated only after it did
        lazy_alone = self._mode == "lazy" and ranks.here.world == 1
        self.rows.refresh_keys(bus, self._ids if lazy_alone else None)

    def apply(self) -> None:
        self._close(changed=True)

    def forget(self) -> None:
        self.rows.open_window(changed=False)

    def discard(self) -> None:
        self._close(changed=False)

    @property
    def saves_state(self) -> bool:
        return self._ranks.across is None or self._ranks.across.rank == 0

    def state_tensors(self) -> dict[str, Tensor]:
        return self.adam.tensors()

    def state_range(self) -> tuple[int, int, int]:
        return self._lo, self._hi, self.rows.r

    def scalars(self) -> dict[str, Any]:
        return self.adam.scalars()

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        self.adam.load_scalars(scalars)

    def after_load(self) -> None:
        if self.adam.replica is not None:
            self.adam.replica.copy_(self.adam.master)

    def _tell_gradient(self) -> None:
        if self.listener is not None:
            self.listener.gradient(self)

    def _tell_complete(self) -> None:
        if self.listener is not None:
            self.listener.complete(self)

    def _tell_needed(self) -> None:
        if self.listener is not None:
            self.listener.needed(self)

    def _close(self, *, changed: bool) -> None:
        self.rows.open_window(changed=changed)
        self._ids = self._payload = None


def rows_footprint(
    *,
    r: int,
    d: int,
    own: int,
    capacity: int,
    dtype: torch.dtype,
    moments_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: torch.device,
    selection: str,
    mode: RowMode,
    compress: ResolvedCompress | None = None,
) -> Footprint:
    """Return the bytes of one layer's rows before anything is allocated; `own` rows belong to this rank."""
    width = 2 * d
    sent = width if compress is None else 2 * compress.dim  # of a row's gradient, and of its moments
    row_view, column_view = (0, 0) if compress is None else view_bytes(compress, d)
    block = 0 if compress is None else min(own, block_rows(width)) * (sent + (width if mode == "lazy" else 0)) * 4
    replica = 0 if dtype == torch.float32 else dtype.itemsize
    capacity = min(capacity, r)
    return Footprint(
        host_shared=r * width * (4 + replica),
        host_private=own * sent * 2 * moments_dtype.itemsize
        + (own * 12 if mode == "lazy" else 0)
        + r * 9  # slot of each row, and whether it was ever active
        + taken(own * sent * grad_dtype.itemsize, device)  # the payload at worst
        + row_view
        + block,
        payload=own * sent * grad_dtype.itemsize,
        device=capacity * width * (dtype.itemsize + 4)
        + (r * d * dtype.itemsize if selection == "device" else 0)
        + (0 if compress is None else capacity * sent * 4 + column_view),
        down=r * sent * grad_dtype.itemsize,
        up=r * width * dtype.itemsize,
    )
