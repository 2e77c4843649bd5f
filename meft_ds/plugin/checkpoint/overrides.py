# SPDX-License-Identifier: Apache-2.0
"""What `MeftEngine` overrides for ZeRO-3 and for files, each with the reason in a line.

Stage 3 is DeepSpeed's own partitioning and gathering without its optimizer. Files are the same in every stage: whole
weights, so a checkpoint loads in any stage with any number of ranks.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from meft_ds.offload import update_gates
from meft_ds.offload.flat_unit import FlatUnit
from meft_ds.offload.method import Method, Run
from meft_ds.offload.model.gradient_checkpointing import inside_backward
from meft_ds.offload.model.hooks import ModelHook
from meft_ds.offload.model.weights import Weights
from meft_ds.plugin import zero3
from meft_ds.plugin.checkpoint import ds_files, export, state
from meft_ds.plugin.checkpoint.transaction import Saving
from meft_ds.plugin.optimizer import MeftOptimizer

logger = logging.getLogger("meft_ds")

F = TypeVar("F", bound=Callable[..., Any])


def _at_once(what: str, *, refuses: bool = False) -> Callable[[F], F]:
    """For a method of the engine that a signal handler may come into the middle of, while state is that of no step:
    nothing that `refuses` begins there."""

    def of(method: F) -> F:
        @wraps(method)
        def done(self: SavingEngine, *args: Any, **kwargs: Any) -> Any:
            if refuses:
                self._refuse_inside_step(method.__name__)
            before, self._meft_amid = self._meft_amid, what
            try:
                return method(self, *args, **kwargs)
            finally:
                self._meft_amid = before

        return done  # type: ignore[return-value]

    return of


class SavingEngine(DeepSpeedEngine):
    """The overrides; `MeftEngine` makes what they work with."""

    _meft_methods: list[Method]
    _meft_run: Run
    _meft_stage3: bool
    optimizer: MeftOptimizer

    _meft_stage = 0
    _meft_closing = False  # the accumulation window's last backward has come
    _meft_whole: dict[str, torch.Tensor] | None = None  # while files are written or read: what the first rank gathered
    _meft_plain = False  # while plain weights are written
    _meft_amid: str | None = None  # what has begun and not ended
    _meft_told = ""  # the last warning that nothing was trained

    # -- ZeRO ----------------------------------------------------------------------------------------------------------

    def zero_optimization(self) -> bool:
        """ZeRO's own optimizer is never built: the pipeline partitions the state."""
        return False

    def zero_optimization_stage(self) -> int:
        """As above: no ZeRO path of the engine may wait for a ZeRO optimizer."""
        return self._meft_stage

    def zero_optimization_partition_weights(self) -> bool:
        """Stage 3 partitions parameters as ever. Only checkpoints are as in the other stages: whole, and so of any."""
        return self._meft_stage3 and self._meft_whole is None

    def _partition(self, device: Any) -> Weights:
        """DeepSpeed's own hooks that gather and partition parameters, without its optimizer."""
        self._meft_stage = 3
        try:
            self._meft_zero3 = super()._configure_zero_optimizer(optimizer=None)
        finally:
            self._meft_stage = 0
        return zero3.PartitionedWeights(torch.device(device), self.seq_data_parallel_group)

    @contextlib.contextmanager
    def _as_whole(self, *, read: bool = False) -> Iterator[None]:
        """Inside, stage 3 passes for one with whole weights; `read`: gather them, on the first rank. Collective."""
        before = self._meft_whole
        self._meft_whole = (self._consolidated() or {}) if self._meft_stage3 and read else {}
        try:
            yield
        finally:
            self._meft_whole = before

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @_at_once("a step")
    def step(self, *args: Any, **kwargs: Any) -> None:
        """A signal handler may run in the middle, and what it would save there is the state of no step at all; nor may
        what an exception leaves behind be saved."""
        pipeline = self.optimizer.pipeline
        pipeline.handed_over = False
        try:
            super().step(*args, **kwargs)
        except BaseException as error:
            if pipeline.handed_over:
                pipeline.fail(error)
            raise
        pipeline.handed_over = False

    @_at_once("a save", refuses=True)
    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """DeepSpeed's checkpoint plus ours, under one manifest; `latest` is written when both are complete."""
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        self.meft_flush()
        saving = Saving(Path(save_dir), tag, self._meft_run.ranks)
        with self._as_whole(read=True), ds_files.through(self, saving):
            super().save_checkpoint(
                save_dir,
                tag=tag,
                client_state=client_state or {},
                save_latest=False,
                exclude_frozen_parameters=exclude_frozen_parameters,
            )
        if saving.ranks.rank == 0:
            rows = any(method.name == "sparse_adapter" for method in self._meft_methods)
            ds_files.write_optimizer_file(saving, rows=rows)
        state.save(
            saving,
            self.optimizer.pipeline.units,
            counters=self.optimizer.counters(),
            about=self._about(),
            methods={method.name: method.state(self._meft_run) for method in self._meft_methods},
        )
        if save_latest and saving.ranks.rank == 0:
            saving.latest()
        saving.agree()
        return True

    @_at_once("a load")
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
        tag = tag if tag is not None else state.latest_tag(Path(load_dir))
        if tag is None:
            return super().load_checkpoint(load_dir)  # logs what is missing, as without us
        folder = Path(load_dir) / str(tag) / state.FOLDER
        pipeline = self.optimizer.pipeline
        pipeline.rest()  # what is under way must not land in the loaded state
        if self._meft_stage3:
            self._meft_zero3.partition_all_parameters()  # what an evaluation left gathered would be old
        manifest = state.verify(
            folder,
            self.optimizer.pipeline.units,
            self._meft_run.ranks,
            about=self._about(),
            accepts=lambda key, saved: any(method.accepts_fingerprint(key, saved) for method in self._meft_methods),
        )
        moments = load_optimizer_states and not load_module_only
        with pipeline.replaced(whole=moments):
            self._load_methods(folder, manifest, moments=moments)
            with self._as_whole(), ds_files.through(self):
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
                state.load(folder, manifest, pipeline.units, moments=moments)
                pipeline.publish()
                if moments:
                    self.optimizer.load_counters(manifest["counters"])
                self._open_meft_window()  # the loss scale may be another one now
                # as in a new engine, whatever was interrupted
                self.micro_steps, self._running_engine_step, self._unmanaged_backward_count = 0, False, 0
        return path, client_state

    def _configure_checkpointing(self) -> None:
        """Who writes is decided as in the other stages."""
        with self._as_whole():
            super()._configure_checkpointing()

    def module_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """In files: whole weights, on the first rank."""
        if not (self._meft_plain or self._meft_whole is not None):
            return super().module_state_dict(*args, **kwargs)
        if self.global_rank > 0:
            return {}
        if self._meft_stage3:
            state = self._of_whole(self._meft_whole or {}, kwargs.get("exclude_frozen_parameters", False))
        else:
            state = super().module_state_dict(*args, **kwargs)
        return export.plain_weights(state) if self._meft_plain else state

    def load_module_state_dict(self, checkpoint: Any, strict: bool = True, *args: Any, **kwargs: Any) -> None:
        """In stage 3 every rank takes its slices from the whole weights of the file, and nothing is gathered."""
        if not self._meft_stage3 or kwargs.get("custom_load_fn") is not None:
            super().load_module_state_dict(checkpoint, strict, *args, **kwargs)
            return
        alone = self._meft_whole is None  # load_checkpoint brings the masters itself
        if alone:
            self.meft_flush()
        zero3.load_consolidated(self.module, checkpoint["module"], self._meft_run.weights, strict=strict)
        for unit in self.optimizer.pipeline.units if alone else ():
            unit.adopt()  # as the other stages do when weights have changed

    # -- plain weights -------------------------------------------------------------------------------------------------

    @_at_once("a save", refuses=True)
    def save_16bit_model(
        self, save_dir: str, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """Writes what `save_pretrained` would: plain weights of the base, and an adapter beside them."""
        self.meft_flush()
        ranks = self._meft_run.ranks
        self._meft_plain = True
        try:
            with export.first_writes(Path(save_dir) / save_filename, ranks):
                saved = super().save_16bit_model(save_dir, save_filename, exclude_frozen_parameters)
        finally:
            self._meft_plain = False
        if saved and export.find_adapters(self.module):
            export.write_adapter_together(save_dir, self.module, ranks, beside_base=True)
        return saved

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> Any:
        """Nothing may be under way, and tapped weights train although they do not require grad."""
        if not self._meft_stage3:
            raise ValueError("this function requires ZeRO-3 mode")
        self.meft_flush()
        whole = self._consolidated()
        if whole is None:
            return None
        state = self._of_whole(whole, exclude_frozen_parameters)
        return export.plain_weights(state) if self._meft_plain else state

    def _consolidated(self) -> dict[str, torch.Tensor] | None:
        """Gather whole weights on the first rank. Collective."""
        self._meft_zero3.partition_all_parameters()  # a forward or backward that an exception ended holds its own
        return zero3.consolidated(self.module)

    def _of_whole(self, whole: Mapping[str, torch.Tensor], exclude_frozen: bool) -> dict[str, torch.Tensor]:
        left_out: set[str] = set()
        if exclude_frozen:
            named = self.module.named_parameters(remove_duplicate=False)
            left_out = {name for name, p in named if not self._trains(p)}
        return {name: t for name, t in whole.items() if name not in left_out}

    def _trains(self, p: nn.Parameter) -> bool:
        return p.requires_grad or any(
            p is q for unit in self.optimizer.pipeline.units if isinstance(unit, FlatUnit) for _, q in unit.params
        )

    # -- nothing to save ---------------------------------------------------------------------------------------------

    def _watch_exports(self) -> None:
        """All ways out of a model take a state dict, the whole weights of stage 3 included."""
        self._meft_export_hook = self.module.register_state_dict_pre_hook(_BeforeExport(self))

    def _say_untrained(self, *, at_end: bool = False) -> None:
        """Warn who saves a model, or ends, while methods have only watched: once at a save, and once at the end."""
        if self.global_rank > 0 or self.global_steps == 0 or (self._meft_told and not at_end):
            return
        for method in self._meft_methods:
            why = method.untrained(self.optimizer.applied_steps)
            if why and why != self._meft_told:
                logger.warning(why)
                self._meft_told = why

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _refuse_inside_step(self, what: str) -> None:
        pipeline, amid = self.optimizer.pipeline, self._meft_amid
        if amid is None and (
            pipeline.has_begun or pipeline.applying or inside_backward() or update_gates.inside_forward(self.module)
        ):
            amid = "a step"
        if amid is not None:
            raise RuntimeError(
                f"meft-ds: {what} was called in the middle of {amid}, from a signal handler perhaps. Let the handler "
                "set a flag, and save after engine.step() has returned"
            )

    def _load_methods(self, folder: Path, manifest: dict[str, Any], *, moments: bool) -> None:
        for method in self._meft_methods:
            saved = state.method_state(folder, manifest, method.name)
            if saved is None:
                continue
            if units := method.load_state(self._meft_run, *saved, moments=moments):
                self._admit(units)
                self._announce(method)

    def _about(self) -> dict[str, Any]:
        """What a checkpoint's state belongs to: everything that shapes the function or the state's layout."""
        about = {
            "method": "+".join(method.name for method in self._meft_methods),
            "model": type(self.module).__name__,
            "param_groups": len(self.optimizer.param_groups),
        }
        for method in self._meft_methods:
            about |= method.fingerprint()
        return about


def trained_by(model: nn.Module) -> list[SavingEngine]:
    """Engines that live and were given `model`, and have not been destroyed."""
    hooks = [hook for hook in model._state_dict_pre_hooks.values() if isinstance(hook, _BeforeExport)]
    return [engine for hook in hooks if hook.find is not None and (engine := hook.find()) is not None]


class _BeforeExport(ModelHook):
    """Before a model's `state_dict`."""

    def __init__(self, engine: SavingEngine | None = None) -> None:
        self.find = None if engine is None else weakref.ref(engine)

    def __call__(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        if self.find is not None and (engine := self.find()) is not None:
            engine._say_untrained()
