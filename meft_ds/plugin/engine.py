# SPDX-License-Identifier: Apache-2.0
"""`MeftEngine`: DeepSpeed's engine with the fewest overrides that let the pipeline own gradients and updates.

Each override says why DeepSpeed's own method would not do. ZeRO stages 0 to 2 are the same thing here: the base is
whole on every rank, and the pipeline partitions the little state that is left. The overrides for stage 3 and for files
are in `meft_ds.plugin.checkpoint.overrides`.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from typing import Any

import torch
from deepspeed.runtime.activation_checkpointing.checkpointing import CheckpointFunction
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from meft_ds import __version__
from meft_ds.config import BLOCK, MeftConfig
from meft_ds.offload.host.memory import in_units
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.method import Method, Run
from meft_ds.offload.model.gradient_checkpointing import feed_checkpoints, feed_too
from meft_ds.offload.model.hooks import ModelHook
from meft_ds.offload.model.weights import WHOLE, Weights
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.lanes import call_at_exit
from meft_ds.offload.schedule.window import StepResult
from meft_ds.plugin import build, registry, successor, trainable
from meft_ds.plugin import ds_config as checks
from meft_ds.plugin.checkpoint import export
from meft_ds.plugin.checkpoint.overrides import CheckpointOverrides
from meft_ds.plugin.console import show_log
from meft_ds.plugin.decision import ds_config_of
from meft_ds.plugin.optimizer import MeftOptimizer, holder_of_groups
from meft_ds.plugin.zero3 import PartitionedWeights
from meft_ds.plugin.zero_grad import Call, ModuleZeroGrad, forgets

_log = logging.getLogger("meft_ds")


class MeftEngine(CheckpointOverrides):
    """What `deepspeed.initialize` returns for a config with a "meft_offload" block."""

    _meft_config: MeftConfig
    _meft_methods: list[Method]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ds_config = ds_config_of(args, kwargs)
        show_log()
        if Ranks.everyone().rank == 0:
            checks.tell(ds_config)
        self._meft_config = registry.parsed(ds_config)
        if kwargs.get("mpu") is not None:
            raise ValueError(
                "meft_offload does not go with model parallelism (mpu); call deepspeed.initialize without it"
            )
        self._meft_asked_stage = checks.zero_settings(ds_config).get("stage") or 0
        self._meft_stage3 = self._meft_asked_stage == 3
        # What gives the model back as the program left it, but for what was learned. Another engine may take it then.
        self._meft_undo = contextlib.ExitStack()
        self._meft_undo.callback(self._remove_hooks_of_deepspeed)
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            self._meft_undo.close()
            raise
        assert self.optimizer is not None, "an engine without one only evaluates, and is DeepSpeed's own"
        if self.global_rank == 0 and (idle := build.standing_still(self._meft.run, self.lr_scheduler)):
            _log.warning(idle)

    # -- overrides ---------------------------------------------------------------------------------------------------

    def _configure_distributed_model(self, model: nn.Module) -> None:
        """Let methods change the model first: DeepSpeed casts, moves and broadcasts it, adapters included."""
        successor.make_way(model)
        for p in model.parameters():
            # a gradient from before the engine: hooks would take it for the first batch's, and a frozen tensor keep it
            p.grad = None
        # frozen embeddings would keep a reentrant checkpoint out of backward, with all that trains inside
        feed_too(CheckpointFunction)
        self._meft_undo.callback(feed_checkpoints(model).remove)
        self._meft_undo.callback(trainable.thaw, model)
        self._meft_methods = registry.chosen(self._meft_config)
        build.refuse_what_cannot_fit(model, self._meft_methods, self._meft_config)
        for method in self._meft_methods:
            self._meft_undo.callback(method.release)
            method.prepare(model)
        trainable.freeze(model, self._meft_config.train, self._meft_methods, tells=self.global_rank == 0)
        super()._configure_distributed_model(model)
        checks.refuse_expert_parallelism(self.module, self.expert_parallel_group)
        checks.tell_of_broken_weights(self.module)

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: list[Any]) -> None:
        """Put the pipeline in the place of the optimizer; the user's own one only holds the hyperparameters."""
        self.basic_optimizer = holder_of_groups(client_optimizer, model_parameters, self.optimizer_params() or {})
        self._meft = build.build(
            self._settled(), self._meft_methods, self._meft_config, writer=self.monitor, rank=self.global_rank
        )
        self._meft_undo.callback(self._meft.release)
        self.optimizer = self._make_optimizer()
        self._enter_model()

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Forget the window of a backward that an exception ended: no step may train on half of it."""
        self._meft.pipeline.backward_begins()
        try:
            return super().backward(*args, **kwargs)
        except BaseException as error:
            self._meft.backward_failed(error)
            self._meft.open_window(self._loss_factor())
            raise

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Refuse a model in which the program has replaced a parameter that trains."""
        self._meft.check_places()
        return super().forward(*inputs, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Refuse saves from a signal handler while this runs, and state that an exception leaves half changed."""
        pipeline = self._meft.pipeline
        with self._meft.busy("a step"):
            pipeline.handed_over = False
            try:
                super().step(*args, **kwargs)
            except BaseException as error:
                if pipeline.handed_over:
                    pipeline.fail(error)
                raise
            pipeline.handed_over = False

    def allreduce_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Reduce nothing here: ranks reduce payloads inside the step, never dense gradients after each backward."""
        self._meft.closing = self.is_gradient_accumulation_boundary()
        self.optimizer.backward_epilogue()  # DeepSpeed 0.18 calls only this after a backward in fp32

    def zero_grad(self) -> None:
        """Forget the gradients, which are in the pipeline."""
        super().zero_grad()
        self._forget_window("engine")

    def clip_fp32_gradients(self) -> None:
        """Do nothing: clipping uses the norm over all units, inside the step."""

    # -- for users ---------------------------------------------------------------------------------------------------

    def meft_stats(self) -> dict[str, Any]:
        """Return plain numbers of the last accumulation window, and what is held where (docs/reference/statistics.md).

        Example:
            stats = engine.meft_stats()
            print(stats["bytes_down_per_step"], stats["device_bytes"], stats["host_bytes"])
        """
        return self._meft.telemetry.report()

    def meft_flush(self) -> None:
        """Apply the updates that are still pending after a step, before your program reads weights by itself.

        Forwards, evaluation, `state_dict`, saving and `meft_stats` do it without being asked.

        Example:
            kept = model.lm_head.weight.data  # shares the weight's memory
            engine.step()
            engine.meft_flush()
            print(kept.norm())
        """
        self._meft.flush(self.global_samples)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _settled(self) -> Run:
        """Return what is known once the model is on its device. Collective."""
        dtype = self._compute_dtype()
        weights: Weights = WHOLE
        if self._meft_stage3:
            weights = self._partitioned_weights()
            self._meft_undo.callback(weights.hooks.destroy)
        return Run(
            model=self.module,
            groups=self.basic_optimizer.param_groups,
            bus=Bus(torch.device(self.device)),
            ranks=build.find_ranks(self.seq_data_parallel_group, self.seq_dp_world_size, self.device),
            dtype=dtype,
            moments_dtype=build.DTYPES[self._meft_config.moments_dtype],
            grad_dtype=build.grad_dtype(self._meft_config, dtype),
            weights=weights,
        )

    def _make_optimizer(self) -> MeftOptimizer:
        """Make what DeepSpeed takes for its optimizer, and let it drive the pipeline."""
        run, pipeline = self._meft.run, self._meft.pipeline
        optimizer = MeftOptimizer(
            self.basic_optimizer,
            pipeline,
            clip=self.gradient_clipping(),
            mean_over=run.ranks.world if self.gradient_average else 1,
            compute_dtype=run.dtype,
            static_loss_scale=self.loss_scale(),
            dynamic_loss_scale=self.dynamic_loss_scale(),
            loss_scale_args=self.dynamic_loss_scale_args(),
            observed=self._meft.begin_step,
            after_step=self._after_meft_step,
            zero_grad=lambda: self._forget_window("optimizer"),
            at_end=self._at_meft_end,
        )
        pipeline.settings, pipeline.closes_window = optimizer.settings, self._closes_window
        if isinstance(run.weights, PartitionedWeights):
            optimizer.lend(run.weights.hooks)
        if hasattr(DeepSpeedEngine, "_configure_compression_scheduler"):
            # DeepSpeed 0.18 makes these two in `_configure_optimizer`
            self.compression_scheduler = self._configure_compression_scheduler()
            self.quantizer = self._configure_quantization()
        return optimizer

    def _enter_model(self) -> None:
        """Give the model the methods and hooks that ask its engine, open the first window, and say what is active."""
        model, runtime = self.module, self._meft
        call_at_exit(self._at_meft_exit)
        runtime.open_window(self._loss_factor())
        # every way of saving a model takes a state dict first, in stage 3 too
        self._meft_undo.callback(model.register_state_dict_pre_hook(successor.BeforeExport(self)).remove)
        model.zero_grad = ModuleZeroGrad(model, self)
        model.meft_stats = _ModelStats(self)
        export.begin(model, runtime.plan.dense_names, self._meft_methods)
        if self.global_rank == 0:
            plan = runtime.plan
            _log.info(
                f"version {__version__}: {' and '.join(method.summary() for method in self._meft_methods)}, and "
                f"{plan.dense_parameters:,} dense ones train; "
                f"per step at most {in_units(plan.down)} down, {in_units(plan.up)} up; "
                f"device {in_units(plan.device)} at most, host {in_units(plan.host)}"
            )

    def _forget_window(self, call: Call) -> None:
        """Forget the open window if plain DeepSpeed would forget gradients at `call`.

        Inside a step DeepSpeed itself calls, when the next window has collected nothing.
        """
        # with one backward in a window, another rank's may have come before this rank's
        only = self.gradient_accumulation_steps() == 1 and self.is_gradient_accumulation_boundary()
        if self._meft.busy_with is None and (
            self._meft.pipeline.is_broken or forgets(call, self._meft_asked_stage, closing=self._meft.closing or only)
        ):
            self._meft.forget_window()

    def _closes_window(self) -> bool:
        if any(method.observing for method in self._meft_methods):
            return False  # nothing of a watched window is sent
        return not self.inside_no_sync_ctxt and self.is_gradient_accumulation_boundary()

    def _after_meft_step(self, result: StepResult) -> None:
        # DeepSpeed adds the step's samples only after this
        self._meft.end_step(result, samples=self.global_samples, loss_factor=self._loss_factor())

    def _at_meft_exit(self) -> None:
        self._meft.pipeline.finish_at_exit()
        self._at_meft_end()

    def _at_meft_end(self) -> None:
        self._warn_untrained(at_end=True)
        self._meft_undo.close()
        self._meft.telemetry.close()
        # when a lane has failed, the last window's bytes never all went up
        with contextlib.suppress(RuntimeError):
            self.meft_flush()

    def _remove_hooks_of_deepspeed(self) -> None:
        """Remove DeepSpeed's own hooks: they would call this engine in the next one's forwards, and keep it."""
        for name in ("module_forward_pre_hook", "module_forward_post_hook", "first_dataloader_check"):
            # where the engine lacks an attribute, DeepSpeed asks the model for it
            if (handle := self.__dict__.get(name)) is not None:
                handle.remove()

    def _compute_dtype(self) -> torch.dtype:
        return torch.float16 if self.fp16_enabled() else torch.bfloat16 if self.bfloat16_enabled() else torch.float32


class _ModelStats(ModelHook):
    """A model's `meft_stats`, which gives {} once its engine is gone."""

    def __init__(self, engine: MeftEngine | None = None) -> None:
        self._find = None if engine is None else weakref.ref(engine)

    def __call__(self) -> dict[str, Any]:
        engine = None if self._find is None else self._find()
        return {} if engine is None else engine.meft_stats()


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
