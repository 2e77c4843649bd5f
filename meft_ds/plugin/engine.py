# SPDX-License-Identifier: Apache-2.0
"""`MeftEngine`: DeepSpeed's engine with the fewest overrides that let the pipeline own gradients and updates.

Each override says in one line why it is needed. ZeRO stages 0 to 2 are the same thing here: the base is whole on every
rank, and partitioning of the little state that is left is the pipeline's own. Stage 3 and files:
`meft_ds.plugin.checkpoint.overrides`.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from deepspeed.runtime.activation_checkpointing.checkpointing import CheckpointFunction
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from meft_ds import __version__
from meft_ds.config import BLOCK, MeftConfig, parse_config
from meft_ds.offload.host.memory import in_units
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.method import Method, Run
from meft_ds.offload.model.gradient_checkpointing import feed_checkpoints, feed_too
from meft_ds.offload.model.weights import WHOLE
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.lanes import call_at_exit
from meft_ds.offload.schedule.trace import Trace
from meft_ds.offload.schedule.window import StepResult
from meft_ds.offload.unit import Unit
from meft_ds.plugin import build, full_params, registry, successor, trainable
from meft_ds.plugin import ds_config as checks
from meft_ds.plugin.checkpoint import export
from meft_ds.plugin.checkpoint.overrides import SavingEngine
from meft_ds.plugin.console import show_log
from meft_ds.plugin.optimizer import MeftOptimizer, adamw_from_config, check_client_optimizer
from meft_ds.plugin.replaced import Places
from meft_ds.plugin.telemetry import Stats, WindowMonitor
from meft_ds.plugin.zero_grad import Call, ModuleZeroGrad, forgets

_log = logging.getLogger("meft_ds")


class MeftEngine(SavingEngine):
    """What `deepspeed.initialize` returns for a config with a "meft_offload" block."""

    _meft_config: MeftConfig
    _meft_stats: Stats
    _meft_monitor: WindowMonitor
    _meft_trace: Trace | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from meft_ds.plugin import ds_config_of

        ds_config = ds_config_of(args, kwargs)
        show_log()
        if Ranks.everyone().rank == 0:
            checks.tell(ds_config)
        self._meft_config = parse_config(
            ds_config[BLOCK],
            checks.conflicts(ds_config),
            lambda config: [fault for method in registry.chosen(config) for fault in method.conflicts(ds_config)],
        )
        if kwargs.get("mpu") is not None:
            raise ValueError(
                "meft_offload does not go with model parallelism (mpu); call deepspeed.initialize without it"
            )
        self._meft_asked_stage = checks.zero_settings(ds_config).get("stage") or 0
        self._meft_stage3 = self._meft_asked_stage == 3
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            self._leave_model()
            raise
        assert self.optimizer is not None, "an engine without one only evaluates, and is DeepSpeed's own"
        if self.global_rank == 0 and (idle := build.standing_still(self._meft_run, self.lr_scheduler)):
            _log.warning(idle)

    # -- overrides ---------------------------------------------------------------------------------------------------

    def _configure_distributed_model(self, model: nn.Module) -> None:
        """Adapters must be in the model before DeepSpeed casts, moves and broadcasts it."""
        successor.make_way(model)
        for p in model.parameters():
            # of a backward before the engine: hooks would take it for the first batch's, and what gets frozen keeps it
            p.grad = None
        # frozen embeddings would keep a reentrant checkpoint out of backward, with all that trains inside
        feed_too(CheckpointFunction)
        self._meft_fed = feed_checkpoints(model)
        self._meft_methods = registry.chosen(self._meft_config)
        build.refuse_what_cannot_fit(model, self._meft_methods, self._meft_config)
        for method in self._meft_methods:
            method.prepare(model)
        trainable.settle(model, self._meft_config.train, self._meft_methods, tells=self.global_rank == 0)
        super()._configure_distributed_model(model)
        checks.refuse_expert_parallelism(self.module, self.expert_parallel_group)
        checks.tell_of_broken_weights(self.module)

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: list[Any]) -> None:
        """The pipeline takes the place of the optimizer; the user's own one only holds the hyperparameters."""
        if client_optimizer is None:
            self.basic_optimizer = adamw_from_config(model_parameters, dict(self.optimizer_params() or {}))
        else:
            made = client_optimizer if hasattr(client_optimizer, "param_groups") else client_optimizer(model_parameters)
            check_client_optimizer(made)
            self.basic_optimizer = made
        weights = WHOLE
        if self._meft_stage3:
            weights = self._partition(self.device)
        ranks = build.find_ranks(self.seq_data_parallel_group, self.seq_dp_world_size, self.device)
        bus = Bus(torch.device(self.device))
        config = self._meft_config
        run = self._meft_run = Run(
            model=self.module,
            groups=self.basic_optimizer.param_groups,
            bus=bus,
            ranks=ranks,
            dtype=self._compute_dtype(),
            moments_dtype=build.DTYPES[config.moments_dtype],
            grad_dtype=build.grad_dtype(config, self._compute_dtype()),
            weights=weights,
        )
        claimed = {p for method in self._meft_methods for p in method.claim(run)}
        units, plan = build.build_units(run, self._meft_methods, config, claimed)
        engine = weakref.ref(self)
        pipeline = build.pipeline(
            units,
            bus,
            ranks,
            self._meft_config.schedule,
            settings=lambda: _alive(engine).optimizer.settings(),
            closes_window=lambda: _alive(engine)._closes_window(),
        )
        self._meft_gates = build.install_gates(self.module, pipeline, weights)
        self._meft_places = Places(self.module, units)
        full_params.attach(self.module, pipeline)
        self.optimizer = MeftOptimizer(
            self.basic_optimizer,
            pipeline,
            clip=self.gradient_clipping(),
            mean_over=ranks.world if self.gradient_average else 1,
            compute_dtype=self._compute_dtype(),
            static_loss_scale=self.loss_scale(),
            dynamic_loss_scale=self.dynamic_loss_scale(),
            loss_scale_args=self.dynamic_loss_scale_args(),
            observed=self._observed_window,
            after_step=self._after_meft_step,
            zero_grad=lambda: self._forget_window("optimizer"),
            at_end=self._at_meft_end,
        )
        if self._meft_stage3:
            self.optimizer.lend(self._meft_zero3)
        if hasattr(
            DeepSpeedEngine, "_configure_compression_scheduler"
        ):  # DeepSpeed 0.18 makes these two in this method
            self.compression_scheduler = self._configure_compression_scheduler()
            self.quantizer = self._configure_quantization()
        self._meft_stats = Stats(pipeline=pipeline, methods=self._meft_methods, plan=plan)
        self._meft_monitor = WindowMonitor(self.monitor, bus)
        schedule = self._meft_config.schedule
        self._meft_trace = (
            None
            if schedule.trace_file is None
            else Trace(schedule.trace_file, schedule.trace_windows, rank=self.global_rank)
        )
        call_at_exit(self._at_meft_exit)
        self._open_meft_window()
        self._watch_exports()
        self.module.zero_grad = ModuleZeroGrad(self.module, self)
        self.module.meft_stats = lambda: e.meft_stats() if (e := engine()) is not None else {}
        export.remember_trained(self.module, units, self._meft_methods)
        if self._meft_config.sparse_adapter is not None or self._meft_config.sparse_matrix is not None:
            export.save_plain_weights(self.module)
        if self.global_rank == 0:
            _log.info(self._first_line(plan))

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Nobody is to train on half a backward, which an exception leaves."""
        self.optimizer.pipeline.backward_begins()
        try:
            return super().backward(*args, **kwargs)
        except BaseException as error:
            self._backward_failed(error)
            raise

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """What trains must still be in the model."""
        self._meft_places.check()
        return super().forward(*inputs, **kwargs)

    def allreduce_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Ranks reduce payloads inside the step, never dense gradients after each backward."""
        self._meft_closing = self.is_gradient_accumulation_boundary()
        self.optimizer.backward_epilogue()  # DeepSpeed 0.18 calls only this after a backward in fp32

    def zero_grad(self) -> None:
        """Gradients are in the pipeline."""
        super().zero_grad()
        self._forget_window("engine")

    def clip_fp32_gradients(self) -> None:
        """Clipping uses the norm over all units, inside the step."""

    # -- for users ---------------------------------------------------------------------------------------------------

    def meft_stats(self) -> dict[str, Any]:
        """Return plain numbers of the last accumulation window, and what is held where (docs/reference/statistics.md).

        Example:
            stats = engine.meft_stats()
            print(stats["bytes_down_per_step"], stats["device_bytes"], stats["host_bytes"])
        """
        return self._meft_stats.report()

    def meft_flush(self) -> None:
        """Apply the updates that are still pending after a step, before your program reads weights by itself.

        Forwards, evaluation, `state_dict`, saving and `meft_stats` do it without being asked.

        Example:
            kept = model.lm_head.weight.data  # shares the weight's memory
            engine.step()
            engine.meft_flush()
            print(kept.norm())
        """
        self.optimizer.pipeline.flush()
        self._meft_monitor.write(self.global_samples)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _forget_window(self, call: Call) -> None:
        """`call` was to forget gradients; inside a step it is DeepSpeed itself, when nothing has been collected yet."""
        pipeline = self.optimizer.pipeline
        # this rank's backward may be the one that has not come
        only = self.gradient_accumulation_steps() == 1 and self.is_gradient_accumulation_boundary()
        if self._meft_amid is None and (
            pipeline.is_broken or forgets(call, self._meft_asked_stage, closing=self._meft_closing or only)
        ):
            pipeline.drop()
            for method in self._meft_methods:
                method.forget_window()
            self._meft_closing = False

    def _backward_failed(self, error: BaseException) -> None:
        forgot = self.optimizer.pipeline.backward_failed(error)
        for p in self.module.parameters():
            p.grad = None  # of hooks that never ran
        for method in self._meft_methods:
            method.forget_window()
        if self._meft_stage3:
            self._meft_zero3.partition_all_parameters()
        self._open_meft_window()
        if forgot:
            _log.warning(
                "a backward ended half way (%s: %s); what its accumulation window had collected is forgotten",
                type(error).__name__,
                error,
            )

    def _closes_window(self) -> bool:
        if any(method.observing for method in self._meft_methods):
            return False  # nothing of a watched window is sent
        return not self.inside_no_sync_ctxt and self.is_gradient_accumulation_boundary()

    def _observed_window(self) -> bool | None:
        """None when no method watches; else whether the window that ends counts. The first thing in a step."""
        self._meft_places.check()
        if self._meft_stage3:
            # modules whose backward did not end in a hook still hold theirs, and slices are about to change
            self._meft_zero3.partition_all_parameters()
        watching = [method for method in self._meft_methods if method.observing]
        # what they have seen is about to change in a step that trains nothing
        self.optimizer.pipeline.handed_over = bool(watching)
        return None if not watching else all([method.end_observed_window() for method in watching])

    def _end_observing(self) -> None:
        """Let methods that have seen enough begin to train."""
        for method in self._meft_methods:
            if method.observing and (units := method.observed(self._meft_run)) is not None:
                self._admit(units)
                self._announce(method)

    def _admit(self, units: list[Unit]) -> None:
        pipeline = self.optimizer.pipeline
        pipeline.give_up_window()
        pipeline.admit(units)
        for handle in self._meft_gates:
            handle.remove()
        self._meft_gates = build.install_gates(self.module, pipeline, self._meft_run.weights)
        self._meft_places = Places(self.module, pipeline.units)

    def _announce(self, method: Method) -> None:
        if self.global_rank == 0:
            _log.info("%s; training begins", method.summary())

    def _after_meft_step(self, result: StepResult) -> None:
        # the step has applied what the one before it left under way, and DeepSpeed has not counted its samples yet
        self._meft_monitor.write(self.global_samples)
        self._meft_monitor.note(self._meft_stats.close_window(result.times), result)
        if self._meft_trace is not None:
            self._meft_trace.add(result.times)
        self._end_observing()
        self._open_meft_window()

    def _at_meft_exit(self) -> None:
        self.optimizer.pipeline.finish_at_exit()
        self._at_meft_end()

    def _at_meft_end(self) -> None:
        self._say_untrained(at_end=True)
        while self._meft_gates:  # a model outlives an engine that refuses
            self._meft_gates.pop().remove()
        full_params.detach(self.module)
        self._leave_model()
        if self._meft_trace is not None:
            self._meft_trace.close()
        try:
            self.optimizer.pipeline.flush()
        except RuntimeError:  # a lane has failed: the last window's bytes never all went up
            return
        self._meft_monitor.write(self.global_samples)

    def _leave_model(self) -> None:
        """The model may get another engine, and is as the program left it, but for what was learned. DeepSpeed's own
        hooks would call this engine in the forwards of the next one, and keep it."""
        here = self.__dict__  # where it lacks something, DeepSpeed asks the model
        if here.get("_meft_left"):
            return  # another engine may be there by now
        self._meft_left = True
        for name in (
            "module_forward_pre_hook",
            "module_forward_post_hook",
            "first_dataloader_check",
            "_meft_export_hook",
            "_meft_fed",
        ):
            if (handle := here.get(name)) is not None:
                handle.remove()
        for handle in here.get("_meft_gates", ()):
            handle.remove()
        self._meft_gates = []
        for method in here.get("_meft_methods", ()):
            method.release()
        if "_meft_zero3" in here:
            self._meft_zero3.destroy()
        if (model := here.get("_modules", {}).get("module")) is not None:
            trainable.thaw(model)

    def _open_meft_window(self) -> None:
        self._meft_closing = False
        for method in self._meft_methods:
            method.end_window(self.optimizer.cur_scale / self.gradient_accumulation_steps())

    def _compute_dtype(self) -> torch.dtype:
        return torch.float16 if self.fp16_enabled() else torch.bfloat16 if self.bfloat16_enabled() else torch.float32

    def _first_line(self, plan: build.Plan) -> str:
        return (
            f"version {__version__}: {' and '.join(method.summary() for method in self._meft_methods)}, and "
            f"{plan.dense_parameters:,} dense ones train; "
            f"per step at most {in_units(plan.down)} down, {in_units(plan.up)} up; "
            f"device {in_units(plan.device)} at most, host {in_units(plan.host)}"
        )


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
