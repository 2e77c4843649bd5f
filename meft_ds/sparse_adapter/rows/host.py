# SPDX-License-Identifier: Apache-2.0
"""Where the adapter's rows live: the host store of one layer, and the window of fetched rows on the device.

The store keeps key and value of a row side by side (one 2d chunk per row): float32 masters and a transfer replica in
the compute dtype, shared by the ranks of a node. Rows fetched for a micro-batch stay on the device for the whole
accumulation window, because weights do not change inside it, and their gradients are accumulated there in float32.
When a window touches more distinct rows than the cache may hold, the accumulated gradients spill to the host and
fetching starts anew; nothing is dropped, and the spills are counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from meft_ds.offload.host.shared_memory import Specs, TensorSpec
from meft_ds.offload.host.transfer import EVALUATION, Bus

_FIRST_ROWS = 256  # first size of a window; it doubles on demand up to the capacity


def store_specs(
    name: str, r: int, d: int, dtype: torch.dtype, *, device: torch.device, selection: Literal["host", "device"]
) -> Specs:
    """Return the host tensors that one layer's rows need, shared by a node's ranks; fp32 compute needs no replica."""
    specs: Specs = {f"{name}.master": TensorSpec((r, 2 * d), torch.float32)}
    if dtype != torch.float32:
        # only keys for the device go up from it: rows are gathered into the bus's own buffer
        pinned = device.type != "cpu" and selection == "device"
        specs[f"{name}.replica"] = TensorSpec((r, 2 * d), dtype, pinned)
    return specs


def rows_buffer_bytes(r: int, d: int, capacity: int, dtype: torch.dtype, selection: Literal["host", "device"]) -> int:
    """Return the size of the bus's buffer through which fetched rows go up, one for all layers."""
    return min(capacity, r) * _fetch_width(d, selection) * dtype.itemsize


class HostRows:
    """Row source of one layer during training (see `RowSource`).

    Args:
        master: float32 [r, 2d], host.
        replica: compute dtype [r, 2d], host; the same tensor as `master` in fp32.
        capacity: most distinct rows that the device holds at once.
        bus: transfers.
        selection: "host" (device memory does not grow with r) or "device" (a replica of all keys stays there).
    """

    def __init__(
        self, *, master: Tensor, replica: Tensor, capacity: int, bus: Bus, selection: Literal["host", "device"]
    ) -> None:
        self.store = master, replica  # as they are now: an update of them may be under way
        self.r, self.d = master.shape[0], master.shape[1] // 2
        self.dtype, self.device = replica.dtype, bus.device
        self.capacity, self.selection = min(capacity, self.r), selection
        self.version = 0
        self.spills = 0  # windows' overflows of the cache since the start
        self._bus = bus
        self._fetch_width = _fetch_width(self.d, selection)
        self._slot_of_row = torch.zeros(
            self.r, dtype=torch.int64, device="cpu"
        )  # 0 = not on the device; slot 0 is a row of zeros
        self._used = 0
        self._row_of_slot = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._has_grad = torch.zeros(1, dtype=torch.bool, device="cpu")
        self._cache = torch.zeros(1, self._fetch_width, dtype=self.dtype, device=self.device)
        self._grads = torch.zeros(1, 2 * self.d, dtype=torch.float32, device=self.device)
        self._spilled: list[tuple[Tensor, Tensor]] = []
        self._keys: Tensor | None = None
        self.window_rows = 0  # U of the last closed window
        self.window_tokens = 0
        self.expert_load: Tensor | None = None  # tokens per expert in the open window; int64 [N]
        self.last_expert_load: Tensor | None = None  # the same of the last closed window
        self._ever_active = torch.zeros(self.r, dtype=torch.bool, device="cpu")
        self.is_training: Callable[[], bool] = lambda: True  # the traffic of evaluation is counted apart
        self.trains = True
        # forwards whose backward may still come; those whose graph dies without one leave by themselves
        self._open: weakref.WeakSet[Hashable] = weakref.WeakSet()
        self.before_use: Callable[[], None] = _nothing  # called before rows are read
        self.on_gradient: Callable[[], None] = _nothing  # called before gradients are added
        self.on_complete: Callable[[], None] = _nothing  # called when backward seems to be done with this layer

    @property
    def master(self) -> Tensor:
        """float32 [r, 2d], host; up to date."""
        self.before_use()
        return self.store[0]

    @property
    def replica(self) -> Tensor:
        """Compute dtype [r, 2d], host; up to date."""
        self.before_use()
        return self.store[1]

    # -- what the adapter module asks for (RowSource) --------------------------------------------------------------

    def keys_for_selection(self) -> Tensor:
        """Return all keys [r, d] in the compute dtype, where selection runs."""
        self.before_use()
        if self.selection == "host":
            return self.replica[:, : self.d]
        if self._keys is None:
            with torch.inference_mode(False):
                self._keys = torch.empty(self.r, self.d, dtype=self.dtype, device=self.device)
            self._bus.up_into(self._keys, self.replica[:, : self.d], self._channel("keys"))
        return self._keys

    def to_host(self, t: Tensor, what: str) -> Tensor:
        """Small tensor device -> host; valid until the next call with the same `what`."""
        return self._bus.down(t, self._channel(what), key=("select", what))

    def to_device(self, t: Tensor, what: str) -> Tensor:
        """Small tensor host -> device."""
        return self._bus.up(t, self._channel(what))

    def gather(self, table: Tensor) -> Tensor:
        """Fetch the rows in `table` (int64 host [n], -1 = empty) as [n, 2d] on the device, zero rows for -1."""
        slots = self._bus.up(self._resident(table), self._channel("ids"))
        cached = self._cache.index_select(0, slots)
        if self.selection == "host":
            return cached
        rows = self._bus.up(table.clamp(min=0), self._channel("ids"))
        keys = self.keys_for_selection().index_select(0, rows)
        keys.masked_fill_((slots == 0).unsqueeze(1), 0)
        return torch.cat([keys, cached], dim=1)

    def in_place(self, table: Tensor, *, grads: bool) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Do `gather` and `add_grad` without copies, for kernels on the host; None if whole rows do not lie there.

        Returns (rows [n, 2d], slots int64 like `table` (no -1 in it), gradients fp32 [n, 2d] to add to or None): row
        table[i] is rows[slots[i]], and its gradient likewise. Valid until the next request.
        """
        if not self._bus.is_host or self.selection != "host":
            return None
        slots = self._bus.up(self._resident(table), self._channel("ids"))
        return self._cache, slots, self._grads_for(slots) if grads else None

    def add_grad(self, table: Tensor, grad: Tensor) -> None:
        """Accumulate `grad` [n, 2d] for the rows of `table`; -1 entries are ignored, the others are unique."""
        host_slots = self._resident(table)
        slots = self._bus.up(host_slots, self._channel("ids"))
        grads = self._grads_for(host_slots)
        # Unique rows make this deterministic; the empty entries collide in slot 0, which nobody reads as a gradient.
        grads.index_add_(0, slots, grad.to(torch.float32))

    def foretell(self, forward: Hashable) -> None:
        """Note that a backward of `forward` may come as long as that object is alive."""
        self._open.add(forward)

    def expect(self, forward: Hashable, node: torch.autograd.graph.Node) -> None:
        """Note that `node`'s backward will add the gradients of `forward`."""
        if self.trains:
            node.register_hook(partial(self._backward_done, forward))

    def record(self, union_rows: int, tokens: int, expert_load: Tensor | None) -> None:
        """Note the metrics of one training micro-batch."""
        self.window_tokens += tokens
        if expert_load is not None:
            self.expert_load = expert_load if self.expert_load is None else self.expert_load + expert_load

    def expect_nothing(self) -> None:
        """Note that no backward is to come for the forwards so far."""
        self._open.clear()

    def stop_telling(self) -> None:
        """Nobody is told any more of what happens to these rows."""
        self.before_use = self.on_gradient = self.on_complete = _nothing

    # -- what the wire unit asks for -------------------------------------------------------------------------------

    def close_window(self) -> tuple[Tensor, Tensor]:
        """Return (ids, gradients) of the window: int64 [U] sorted, on the host; float32 [U, 2d] on the device.

        The gradients may be the window's own buffer: they are valid until `open_window`. When more gradients come, call
        it again.
        """
        if self._spilled:
            ids, rows = self._merge_spilled()
        else:
            ids, slots = self._rows_with_grad()
            up = self._bus.up(slots, "ids")
            # Rows that came in one sorted fetch lie in that order already.
            rows = self._grads[1 : 1 + ids.numel()] if _is_range(slots) else self._grads.index_select(0, up)
        self.window_rows, self.last_expert_load = ids.numel(), self.expert_load
        self._ever_active[ids] = True
        return ids, rows

    def open_window(self, *, changed: bool) -> None:
        """Forget the fetched rows and their gradients; `changed` says that the store was updated meanwhile."""
        self._forget()
        self._open.clear()
        self._spilled = []
        self.expert_load, self.window_tokens = None, 0
        if changed:
            self.version += 1

    def refresh_keys(self, bus: Bus, ids: Tensor | None) -> None:
        """Bring the device's key replica up to date after an update of rows `ids` (all of them for None).

        `bus` is the one of the window that was updated.
        """
        if self._keys is None:
            return
        if ids is None:
            bus.up_into(self._keys, self.store[1][:, : self.d], "keys")
        elif ids.numel():
            fresh = bus.up(self.store[1][:, : self.d].index_select(0, ids), "keys")
            self._keys.index_copy_(0, bus.up(ids, "ids"), fresh)

    def device_bytes(self) -> int:
        """Return the bytes held on the device: row cache, gradients, and the key replica with device selection."""
        held = [self._cache, self._grads] + ([] if self._keys is None else [self._keys])
        return sum(t.numel() * t.element_size() for t in held)

    def dead_rows(self) -> int:
        """Count the rows that no token selected since the start."""
        return self.r - int(self._ever_active.sum())

    # -- copies of the model ---------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> HostRows:
        """Make the rows of a copied model: its own, with what is under way applied, and trained by nobody."""
        master = self.master.clone()
        replica = master if self.store[1] is self.store[0] else self.store[1].clone()
        bus = memo.get(id(self._bus))
        if bus is None:
            bus = memo[id(self._bus)] = Bus(self.device)
        twin = HostRows(master=master, replica=replica, capacity=self.capacity, bus=bus, selection=self.selection)
        twin.trains = False
        return twin

    def __reduce__(self) -> Any:
        raise TypeError(
            "a model with a sparse adapter that an engine trains cannot be pickled: its rows are in memory that ranks "
            "share. Use meft_ds.save_adapter and load_adapter, or copy.deepcopy inside this process"
        )

    # -- window internals ------------------------------------------------------------------------------------------

    def _channel(self, what: str) -> str:
        return what if self.is_training() else EVALUATION + what

    def _grads_for(self, host_slots: Tensor) -> Tensor:
        """Return the gradients of the whole window, after which those of `host_slots` count as given."""
        self.on_gradient()
        self._has_grad[host_slots] = True
        if self._grads.shape[0] < self._cache.shape[0]:
            self._grads = _grown(self._grads, self._cache.shape[0])
        return self._grads

    def _resident(self, table: Tensor) -> Tensor:
        """Return slots [n] of the rows in `table`, and fetch what is missing; 0 for -1."""
        self.before_use()
        empty = table < 0
        slots = self._slot_of_row[table.clamp(min=0)]
        slots[empty] = 0
        missing = table[(slots == 0) & ~empty]
        if missing.numel() == 0:
            return slots
        missing = torch.unique(missing)
        if self._used + missing.numel() > self.capacity:
            self._spill()
            missing = torch.unique(table[~empty])
            assert missing.numel() <= self.capacity, "a request names more rows than the row source's capacity"
        self._fetch(missing)
        slots = self._slot_of_row[table.clamp(min=0)]
        slots[empty] = 0
        return slots

    def _fetch(self, rows: Tensor) -> None:
        first, last = self._used + 1, self._used + 1 + rows.numel()
        if last > self._cache.shape[0]:
            room = max(last, min(2 * self._cache.shape[0], self.capacity + 1), min(_FIRST_ROWS, self.capacity + 1))
            self._cache = _grown(self._cache, room)
            self._row_of_slot = _grown(self._row_of_slot, room)
            self._has_grad = _grown(self._has_grad, room)
        source = self.replica if self.selection == "host" else self.replica[:, self.d :]
        self._bus.fetch_rows(source, rows, self._cache[first:last], self._channel("rows"))
        self._row_of_slot[first - 1 : last - 1] = rows
        self._used = last - 1
        self._slot_of_row[rows] = torch.arange(
            first, last, device="cpu"
        )  # last, or an interrupt would leave rows in others' slots

    def _spill(self) -> None:
        self.spills += self.is_training()
        self._move_grads_to_host()

    def _move_grads_to_host(self) -> None:
        ids, slots = self._rows_with_grad()
        grads = self._bus.down(self._grads.index_select(0, self._bus.up(slots, "ids")), "spill")
        self._forget()  # before they count there, or an interrupt in between would let them count twice
        if ids.numel():
            self._spilled.append((ids, grads))

    def _rows_with_grad(self) -> tuple[Tensor, Tensor]:
        """Return (ids, slots) of the rows that got a gradient, sorted by id, without those that only eval fetched."""
        slots = 1 + torch.nonzero(self._has_grad[1 : self._used + 1]).squeeze(1)
        ids, order = torch.sort(self._row_of_slot[slots - 1])
        return ids, slots[order]

    def _forget(self) -> None:
        self._slot_of_row[self._row_of_slot[: self._used]] = 0
        self._grads[: self._used + 1].zero_()
        self._has_grad[: self._used + 1] = False
        self._used = 0

    def _backward_done(self, forward: Hashable, *_: object) -> None:
        self._open.discard(forward)
        if not self._open:
            self.on_complete()

    def _merge_spilled(self) -> tuple[Tensor, Tensor]:
        self._move_grads_to_host()  # what comes later starts from zero, or it would be merged twice
        ids = torch.cat([ids for ids, _ in self._spilled])
        union, where = torch.unique(ids, sorted=True, return_inverse=True)
        total = torch.zeros(union.numel(), 2 * self.d, device="cpu")
        start = 0
        for part, rows in self._spilled:
            total.index_add_(0, where[start : start + part.numel()], rows)
            start += part.numel()
        return union, self._bus.up(total, "spill")


def _fetch_width(d: int, selection: Literal["host", "device"]) -> int:
    return 2 * d if selection == "host" else d  # keys that select on the device are there


def _nothing() -> None:
    pass


def _is_range(slots: Tensor) -> bool:
    """Are they 1, 2, 3 ...?"""
    return torch.equal(slots, torch.arange(1, 1 + slots.numel(), device="cpu"))


def _grown(t: Tensor, rows: int) -> Tensor:
    if t.shape[0] >= rows:
        return t
    with torch.inference_mode(False):  # or training could not write to what an evaluation made
        grown = torch.zeros(rows, *t.shape[1:], dtype=t.dtype, device=t.device)
        grown[: t.shape[0]] = t
    return grown


def initialise_rows(master: Tensor, replica: Tensor, keys: Tensor, lo: int, hi: int) -> None:
    """Write rows [lo, hi) at the start: the given keys [r, d] and zero values, so that step 0 equals the base."""
    d = keys.shape[1]
    master[lo:hi, :d] = keys[lo:hi]
    master[lo:hi, d:] = 0
    if replica is not master:
        replica[lo:hi] = master[lo:hi]
