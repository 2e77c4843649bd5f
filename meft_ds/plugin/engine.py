# SPDX-License-Identifier: Apache-2.0
"""`MeftEngine`: DeepSpeed's engine with the fewest overrides that let the pipeline own gradients and updates.

Each override says in one line why it is needed. Weights of the base stay whole on every rank (ZeRO stages 0 to 2 are
the same thing here: partitioning of the little state that is left is the pipeline's own).
"""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger
from torch import nn

from meft_ds import __version__
from meft_ds.config import BLOCK, MeftConfig, parse_config
from meft_ds.monitor import WindowMonitor
from meft_ds.offload.at_exit import call_at_exit
from meft_ds.offload.bus import Bus
from meft_ds.offload.partition import Ranks
from meft_ds.offload.trace import Trace
from meft_ds.offload.window import StepResult
from meft_ds.plugin import checkpoint, checks, export, setup
from meft_ds.plugin.optimizer import MeftOptimizer, adamw_from_config, check_client_optimizer
from meft_ds.plugin.stats import Stats
from meft_ds.sparse_adapter.attach import attach, find_ffns
from meft_ds.sparse_adapter.config import ResolvedSparseAdapter
from meft_ds.sparse_adapter.module import SparseAdapter


class MeftEngine(DeepSpeedEngine):
    """What `deepspeed.initialize` returns for a config with a "meft_offload" block."""

    _meft_config: MeftConfig
    _meft_sizes: ResolvedSparseAdapter
    _meft_adapters: list[SparseAdapter]
    _meft_ranks: Ranks
    _meft_stats: Stats
    _meft_monitor: WindowMonitor
    _meft_trace: Trace | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from meft_ds.plugin import ds_config_of

        ds_config = ds_config_of(args, kwargs)
        for warning in [*checks.version_warnings(), *checks.skipped(ds_config)]:
            logger.warning(f"meft-ds: {warning}")
        self._meft_config = parse_config(ds_config[BLOCK], checks.conflicts(ds_config))
        if kwargs.get("mpu") is not None:
            raise ValueError(
                "meft_offload does not go with model parallelism (mpu); call deepspeed.initialize without it"
            )
        super().__init__(*args, **kwargs)
        if self.optimizer is None:
            raise ValueError(
                'meft_offload needs an optimizer: add {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}} to the '
                "ds_config or pass one to deepspeed.initialize"
            )

    # -- overrides ---------------------------------------------------------------------------------------------------

    def zero_optimization(self) -> bool:
        """ZeRO's own optimizer is never built: the pipeline partitions the state."""
        return False

    def zero_optimization_stage(self) -> int:
        """As above: no ZeRO path of the engine may wait for a ZeRO optimizer."""
        return 0

    def _configure_distributed_model(self, model: nn.Module) -> None:
        """Adapters must be in the model before DeepSpeed casts, moves and broadcasts it."""
        config = self._meft_config
        compute = self._compute_dtype()
        sites = find_ffns(model, config.sparse_adapter.target_modules)
        sizes = config.sparse_adapter.resolve(sites[0].d, _initializer_range(model))
        self._meft_sizes = sizes
        adapters = attach(model, sizes, sites)
        self._meft_adapters = adapters
        for adapter in adapters:
            adapter.router.requires_grad_(sizes.gate)  # without the gate the router only picks experts
        setup.freeze_base(model, config.train, {id(p) for adapter in adapters for p in adapter.parameters()})
        super()._configure_distributed_model(model)
        assert all(p.dtype == compute for adapter in adapters for p in adapter.parameters())

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: list[Any]) -> None:
        """The pipeline takes the place of the optimizer; the user's own one only holds the hyperparameters."""
        if client_optimizer is None:
            self.basic_optimizer = adamw_from_config(model_parameters, dict(self.optimizer_params() or {}))
        else:
            made = client_optimizer if hasattr(client_optimizer, "param_groups") else client_optimizer(model_parameters)
            check_client_optimizer(made)
            self.basic_optimizer = made
        ranks = setup.single_node_ranks(self.seq_data_parallel_group, self.seq_dp_world_size, self.device)
        self._meft_ranks = ranks
        bus = Bus(torch.device(self.device))
        units, plan = self._build_units(bus)
        engine = weakref.ref(self)
        pipeline = setup.pipeline(
            units,
            bus,
            ranks,
            self._meft_config.schedule,
            settings=lambda: _alive(engine).optimizer.settings(),
            closes_window=lambda: _alive(engine)._closes_window(),
        )
        setup.install_gates(self.module, pipeline)
        self.optimizer = MeftOptimizer(
            self.basic_optimizer,
            pipeline,
            clip=self.gradient_clipping(),
            mean_over=ranks.world if self.gradient_average else 1,
            compute_dtype=self._compute_dtype(),
            static_loss_scale=self.loss_scale(),
            dynamic_loss_scale=self.dynamic_loss_scale(),
            loss_scale_args=self.dynamic_loss_scale_args(),
            after_step=self._after_meft_step,
            at_end=self._at_meft_end,
        )
        if hasattr(
            DeepSpeedEngine, "_configure_compression_scheduler"
        ):  # DeepSpeed 0.18 makes these two in this method
            self.compression_scheduler = self._configure_compression_scheduler()
            self.quantizer = self._configure_quantization()
        self._meft_stats = Stats(pipeline=pipeline, adapters=self._meft_adapters, plan=plan)
        self._meft_monitor = WindowMonitor(self.monitor, bus)
        schedule = self._meft_config.schedule
        self._meft_trace = (
            None
            if schedule.trace_file is None
            else Trace(schedule.trace_file, schedule.trace_windows, rank=self.global_rank)
        )
        call_at_exit(self._at_meft_exit)
        self._set_balance_scale()
        self.module.meft_stats = lambda: e.meft_stats() if (e := engine()) is not None else {}
        export.save_adapter_with_model(self.module)
        if self.global_rank == 0:
            announce(self._first_line(plan))

    def allreduce_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Ranks reduce payloads inside the step, never dense gradients after each backward."""

    def clip_fp32_gradients(self) -> None:
        """Clipping uses the norm over all units, inside the step."""

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """DeepSpeed's checkpoint plus ours; `latest` is written when both are complete."""
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        self.meft_flush()
        super().save_checkpoint(
            save_dir,
            tag=tag,
            client_state=client_state or {},
            save_latest=False,
            exclude_frozen_parameters=exclude_frozen_parameters,
        )
        ranks = self._meft_ranks
        checkpoint.save(
            Path(save_dir) / tag / checkpoint.FOLDER,
            self.optimizer.pipeline.units,
            ranks,
            counters=self.optimizer.counters(),
            about=self._about(),
        )
        if save_latest and ranks.rank == 0:
            checkpoint.write_text(Path(save_dir) / "latest", tag)
        ranks.barrier()
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, Any]:
        """Our state is verified before DeepSpeed touches the model, and loaded after it did."""
        tag = tag if tag is not None else _latest_tag(load_dir)
        if tag is None:
            return super().load_checkpoint(load_dir)  # logs what is missing, as without us
        folder = Path(load_dir) / str(tag) / checkpoint.FOLDER
        self.meft_flush()  # what is under way must not land in the loaded state
        units = self.optimizer.pipeline.units
        manifest = checkpoint.verify(folder, units, self._meft_ranks, about=self._about())
        path, client_state = super().load_checkpoint(
            load_dir,
            tag=tag,
            load_module_strict=load_module_strict,
            load_optimizer_states=load_optimizer_states,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
            custom_load_fn=custom_load_fn,
        )
        if path is not None:
            moments = load_optimizer_states and not load_module_only
            checkpoint.load(folder, manifest, units, moments=moments)
            self.optimizer.pipeline.publish()
            if moments:
                self.optimizer.load_counters(manifest["counters"])
        return path, client_state

    # -- for users ---------------------------------------------------------------------------------------------------

    def meft_stats(self) -> dict[str, Any]:
        """Counters of the last accumulation window, and what is held where (docs/statistics.md)."""
        return self._meft_stats.report()

    def meft_flush(self) -> None:
        """Apply the updates that are still under way after a step, before a program reads weights by itself.

        Forwards, evaluation, `state_dict`, saving and `meft_stats` do it without being asked.
        """
        self.optimizer.pipeline.flush()
        self._meft_monitor.write(self.global_samples)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _build_units(self, bus: Bus) -> tuple[list[Any], setup.Plan]:
        config, sizes, ranks = self._meft_config, self._meft_sizes, self._meft_ranks
        adapters, dtype = self._meft_adapters, self._compute_dtype()
        groups = self.basic_optimizer.param_groups
        dense = setup.dense_units(self.module, groups, len(adapters), ranks, setup.DTYPES[config.moments_dtype])
        specs = setup.row_specs(len(adapters), sizes, dtype)
        row_footprints = setup.rows_plan(len(adapters), sizes, config, dtype, ranks)
        footprints = [*row_footprints, *(unit.footprint() for unit in dense)]
        host = setup.preflight(footprints, specs, config, bus, ranks)
        for unit in dense:
            unit.allocate()
        rows = setup.row_units(adapters, sizes, config, dtype, bus, ranks, specs)
        plan = setup.Plan(
            host=host,
            device=sum(f.device for f in footprints),
            down=sum(f.down for f in footprints),
            up=sum(f.up for f in footprints),
            row_parameters=len(adapters) * sizes.rows * 2 * sizes.d,
            dense_parameters=sum(unit.numel for unit in dense),
            layers=len(adapters),
        )
        return setup.in_layer_order(rows, dense), plan

    def _closes_window(self) -> bool:
        return not self.inside_no_sync_ctxt and self.is_gradient_accumulation_boundary()

    def _after_meft_step(self, result: StepResult) -> None:
        for adapter in self._meft_adapters:
            adapter.end_window()
        # the step has applied what the one before it left under way, and DeepSpeed has not counted its samples yet
        self._meft_monitor.write(self.global_samples)
        self._meft_monitor.note(self._meft_stats.close_window(result.times), result)
        if self._meft_trace is not None:
            self._meft_trace.add(result.times)
        self._set_balance_scale()

    def _at_meft_exit(self) -> None:
        self.optimizer.pipeline.finish_at_exit()
        self._at_meft_end()

    def _at_meft_end(self) -> None:
        if self._meft_trace is not None:
            self._meft_trace.close()
        try:
            self.optimizer.pipeline.flush()
        except RuntimeError:  # a lane has failed: the last window's bytes never all went up
            return
        self._meft_monitor.write(self.global_samples)

    def _set_balance_scale(self) -> None:
        # the balance loss enters as a gradient, so it needs the factors that the real loss gets on its way
        for adapter in self._meft_adapters:
            adapter.aux_scale = self.optimizer.cur_scale / self.gradient_accumulation_steps()

    def _compute_dtype(self) -> torch.dtype:
        return torch.float16 if self.fp16_enabled() else torch.bfloat16 if self.bfloat16_enabled() else torch.float32

    def _about(self) -> dict[str, Any]:
        """What a checkpoint's state belongs to: everything that shapes the function or the state's layout."""
        sizes: ResolvedSparseAdapter = self._meft_sizes
        shaping = ("d", "rows", "experts", "experts_per_token", "keys_per_token", "gate", "scope", "optimizer")
        return {
            "method": "sparse_adapter",
            "model": type(self.module).__name__,
            "layers": len(self._meft_adapters),
            "param_groups": len(self.optimizer.param_groups),
            **{key: getattr(sizes, key) for key in shaping},
        }

    def _first_line(self, plan: setup.Plan) -> str:
        sizes = self._meft_sizes
        gib = 2**30
        return (
            f"meft-ds {__version__}: sparse_adapter on {plan.layers} layers (r={sizes.rows}, N={sizes.experts}, "
            f"E={sizes.experts_per_token}, K={sizes.keys_per_token}, {sizes.selection} selection, {sizes.optimizer} "
            f"AdamW); "
            f"trains {plan.row_parameters:,} row parameters and {plan.dense_parameters:,} dense ones; "
            f"per step at most {plan.down / gib:.3f} GiB down, {plan.up / gib:.3f} GiB up; "
            f"device {plan.device / gib:.3f} GiB at most, host {plan.host / gib:.3f} GiB"
        )


def announce(line: str) -> None:
    """Log a line that users must see; DeepSpeed's own logger hides everything below warnings by default."""
    log = logging.getLogger("meft_ds")
    log.setLevel(logging.INFO)
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
    log.info(line)


def refuse_engine(cls: type) -> None:
    """Raise for engines that meft_offload cannot take the place of.

    Raises:
        ValueError: naming the engine and the fix.
    """
    fixes = {
        "PipelineEngine": "pass a plain nn.Module instead of a PipelineModule",
        "DualPipeVEngine": "pass a plain nn.Module instead of a pipeline module",
        "DeepSpeedHybridEngine": 'remove "hybrid_engine" from the ds_config',
    }
    fix = fixes.get(cls.__name__, "use deepspeed.initialize with a plain nn.Module")
    raise ValueError(f'the "{BLOCK}" block does not go with {cls.__name__}: {fix}, or remove the block')


def _alive(engine: weakref.ref[MeftEngine]) -> MeftEngine:
    found = engine()
    assert found is not None, "the pipeline outlived its engine"
    return found


def _initializer_range(model: nn.Module) -> float | None:
    config = getattr(model, "config", None)
    return getattr(config, "initializer_range", None)


def _latest_tag(load_dir: str) -> str | None:
    latest = Path(load_dir) / "latest"
    return latest.read_text().strip() if latest.is_file() else None
