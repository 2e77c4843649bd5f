# SPDX-License-Identifier: Apache-2.0
"""The sparse adapter in an engine: adapters into the model, stores into shared memory, one unit per layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from meft_ds.offload.host.page_locked import taken
from meft_ds.offload.host.shared_memory import Specs
from meft_ds.offload.host.transfer import ROWS
from meft_ds.offload.method import Method, Run
from meft_ds.offload.ranks import owned_range
from meft_ds.offload.schedule.host_threads import allowed_cpus
from meft_ds.offload.unit import Footprint, Unit
from meft_ds.sparse_adapter.attach import Site, attach, find_ffns
from meft_ds.sparse_adapter.config import ResolvedCompress, ResolvedSparseAdapter, SparseAdapterConfig
from meft_ds.sparse_adapter.extras import AdapterExtras
from meft_ds.sparse_adapter.forward.router import init_keys
from meft_ds.sparse_adapter.layer import SparseAdapter
from meft_ds.sparse_adapter.rows.compression import RowCompression
from meft_ds.sparse_adapter.rows.host import HostRows, initialise_rows, rows_buffer_bytes, store_specs
from meft_ds.sparse_adapter.takeover import fill_rows, give_rows, holds_rows, kept_store, learned_rows, take_over
from meft_ds.sparse_adapter.unit import RowsUnit, rows_footprint

_logger = logging.getLogger("meft_ds")
_SHAPING = ("d", "rows", "experts", "experts_per_token", "keys_per_token", "gate", "scope", "optimizer")


class SparseAdapterMethod(Method):
    """See `Method`.

    Attributes:
        adapters: in layer order, after `prepare`.
        sizes: the settings as numbers, after `prepare`.
    """

    name = "sparse_adapter"
    extras = AdapterExtras()
    memory_hint = 'lower "sparse_adapter.rows"'
    freezes_base = True

    def __init__(self, config: SparseAdapterConfig) -> None:
        self._config = config
        self.adapters: list[SparseAdapter] = []
        self.sizes: ResolvedSparseAdapter
        self._compress: ResolvedCompress | None = None
        self._compressions: list[RowCompression] = []
        self._rows: list[HostRows] = []

    def least_host_bytes(self, model: nn.Module) -> int:
        sites, sizes = self._planned(model)
        if holds_rows(model):
            return 0  # they are in memory already, or `prepare` names what differs
        return 4 * len(sites) * sizes.rows * 2 * sizes.d  # the fp32 rows, and routers have fewer values

    def prepare(self, model: nn.Module) -> None:
        sites, self.sizes = self._planned(model)
        if self._config.compress is not None:
            self._compress = self._config.compress.resolve(self.sizes.d)
        self.adapters = take_over(model, self.sizes, sites) or attach(model, self.sizes, sites)
        for adapter in self.adapters:
            adapter.router.requires_grad_(self.sizes.gate)  # without the gate the router only picks experts

    def _planned(self, model: nn.Module) -> tuple[list[Site], ResolvedSparseAdapter]:
        sites = find_ffns(model, self._config.target_modules)
        return sites, self._config.resolve(sites[0].d, _initializer_range(model))

    @property
    def layers(self) -> int:
        return len(self.adapters)

    def own_parameters(self) -> list[nn.Parameter]:
        return [p for adapter in self.adapters for p in adapter.parameters()]

    def footprints(self, run: Run) -> list[Footprint]:
        assert all(p.dtype == run.dtype for p in self.own_parameters())
        sizes = self.sizes
        lo, hi = owned_range(sizes.rows, run.ranks.here)
        one = rows_footprint(
            r=sizes.rows,
            d=sizes.d,
            own=hi - lo,
            capacity=sizes.cache_rows,
            dtype=run.dtype,
            moments_dtype=run.moments_dtype,
            grad_dtype=run.grad_dtype,
            device=run.bus.device,
            selection=sizes.selection,
            mode=sizes.optimizer,
            compress=self._compress,
        )
        return [one] * self.layers + [Footprint(host_private=taken(self._rows_buffer(run), run.bus.device))]

    def _rows_buffer(self, run: Run) -> int:
        """Return the size of the buffer that all layers' rows go up through; on a host they do not cross."""
        sizes = self.sizes
        if run.bus.is_host:
            return 0
        return rows_buffer_bytes(sizes.rows, sizes.d, sizes.cache_rows, run.dtype, sizes.selection)

    def shared_tensors_spec(self, run: Run) -> Specs:
        specs: Specs = {}
        for layer, adapter in enumerate(self.adapters):
            if kept_store(adapter, run.dtype) is None:
                rows, d, selection = self.sizes.rows, self.sizes.d, self.sizes.selection
                specs |= store_specs(f"layer{layer}", rows, d, run.dtype, device=run.bus.device, selection=selection)
        return specs

    def build(self, run: Run, memory: Mapping[str, Tensor]) -> list[Unit]:
        sizes, units = self.sizes, []
        run.bus.reserve({ROWS: self._rows_buffer(run)})
        if run.ranks.rank == 0 and not run.bus.is_host and sizes.selection == "host":
            _warn_of_one_thread()
        for layer, adapter in enumerate(self.adapters):
            kept = kept_store(adapter, run.dtype)
            if kept is not None:
                master, replica = kept
            else:
                master = memory[f"layer{layer}.master"]
                replica = memory.get(f"layer{layer}.replica", master)
                lo, hi = owned_range(sizes.rows, run.ranks.here)
                if (learned := learned_rows(adapter)) is not None:
                    fill_rows(master, replica, learned, lo, hi)
                else:
                    keys = init_keys(sizes.rows, sizes.d, sizes.init_std, sizes.seed, layer)
                    initialise_rows(master, replica, keys, lo, hi)
            rows = HostRows(
                master=master, replica=replica, capacity=sizes.cache_rows, bus=run.bus, selection=sizes.selection
            )
            rows.is_training = _mode_of(adapter)
            give_rows(adapter, rows)
            self._rows.append(rows)
            compression = None
            if self._compress is not None:
                compression = RowCompression.draw(self._compress, sizes.d, sizes.seed, layer, run.bus.device)
                self._compressions.append(compression)
            units.append(
                RowsUnit(
                    name=f"layer{layer}.rows",
                    layer=layer,
                    rows=rows,
                    group=run.group,
                    ranks=run.ranks,
                    mode=sizes.optimizer,
                    moments_dtype=run.moments_dtype,
                    grad_dtype=run.grad_dtype,
                    compression=compression,
                )
            )
        run.ranks.here.barrier()  # every rank wrote its slice before anybody fetches
        return list(units)

    def end_window(self, loss_factor: float) -> None:
        for adapter in self.adapters:
            adapter.end_window()
            # the balance loss enters as a gradient, so it needs the factors that the real loss gets on its way
            adapter.aux_scale = loss_factor
        for rows in self._rows:
            rows.expect_nothing()

    def fingerprint(self) -> dict[str, Any]:
        about: dict[str, Any] = {"layers": self.layers, **{key: getattr(self.sizes, key) for key in _SHAPING}}
        if self._compress is not None:  # moments mean nothing under another Q
            about |= {"compress.dim": self._compress.dim, "compress.nonzeros": self._compress.nonzeros}
            about["compress.seed"] = self.sizes.seed
        return {f"{self.name}.{key}": value for key, value in about.items()}

    def summary(self) -> str:
        sizes, compress = self.sizes, self._compress
        through = "" if compress is None else f", gradients compressed from d={sizes.d} to {compress.dim}"
        return (
            f"sparse_adapter on {self.layers} layers (r={sizes.rows}, N={sizes.experts}, E={sizes.experts_per_token}, "
            f"K={sizes.keys_per_token}, {sizes.selection} selection, {sizes.optimizer} AdamW{through}), "
            f"{self.layers * sizes.rows * 2 * sizes.d:,} row parameters"
        )

    def stats(self) -> dict[str, Any]:
        rows = self._rows
        routers = sum(p.numel() * p.element_size() for p in self.own_parameters())
        projectors = sum(compression.device_bytes() for compression in self._compressions)
        loads = [r.last_expert_load for r in rows]
        return {
            "device_bytes": sum(r.device_bytes() for r in rows) + routers + projectors,
            "rows_total": sum(r.r for r in rows),
            "active_rows": [r.window_rows for r in rows],
            "expert_load": [None if load is None else load.tolist() for load in loads],
            "dead_rows": sum(r.dead_rows() for r in rows),
            "spills": sum(r.spills for r in rows),
        }


def _warn_of_one_thread() -> None:
    cpus = len(allowed_cpus())
    if torch.get_num_threads() == 1 and cpus > 1:
        _logger.warning(
            "sparse_adapter scores keys on the host with 1 of %d CPUs, because the training thread has 1 thread, as "
            'launchers set it by OMP_NUM_THREADS; raise that, or set sparse_adapter.selection to "device"',
            cpus,
        )


def _mode_of(adapter: SparseAdapter) -> Callable[[], bool]:
    return lambda: not adapter.evaluating


def _initializer_range(model: nn.Module) -> float | None:
    value = getattr(getattr(model, "config", None), "initializer_range", None)
    return float(value) if isinstance(value, int | float) else None
