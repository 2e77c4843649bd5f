# SPDX-License-Identifier: Apache-2.0
"""`CheckpointOverrides`: what `MeftEngine` overrides for ZeRO-3 and for files, each with the reason in a line.

Stage 3 is DeepSpeed's own partitioning and gathering without its optimizer. Files are the same in every stage: whole
weights, so a checkpoint loads in any stage with any number of ranks.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from meft_ds.plugin import zero3
from meft_ds.plugin.checkpoint import ds_files, export, state
from meft_ds.plugin.checkpoint.transaction import FOLDER, Manifest, Saving
from meft_ds.plugin.optimizer import MeftOptimizer
from meft_ds.plugin.runtime import Runtime

logger = logging.getLogger("meft_ds")

F = TypeVar("F", bound=Callable[..., Any])


class CheckpointOverrides(DeepSpeedEngine):
    """Overrides that work with an engine's `Runtime`."""

    _meft: Runtime
    _meft_stage3: bool
    optimizer: MeftOptimizer

    _meft_stage = 0
    _meft_whole: dict[str, torch.Tensor] | None = None  # while files are written or read: what the first rank gathered
    _meft_plain = False  # while plain weights are written

    # -- ZeRO ----------------------------------------------------------------------------------------------------------

    def zero_optimization(self) -> bool:
        """Say no: ZeRO's own optimizer is never built, because the pipeline partitions the state."""
        return False

    def zero_optimization_stage(self) -> int:
        """Say 0 for the same reason: no path of DeepSpeed's engine may wait for a ZeRO optimizer."""
        return self._meft_stage

    def zero_optimization_partition_weights(self) -> bool:
        """Say yes in stage 3, but not while a checkpoint is written or read: its weights are whole in all stages."""
        return self._meft_stage3 and self._meft_whole is None

    def _partitioned_weights(self) -> zero3.PartitionedWeights:
        """Partition the model: build DeepSpeed's hooks that gather and partition weights, without its optimizer."""
        self._meft_stage = 3
        try:
            hooks = super()._configure_zero_optimizer(optimizer=None)
        finally:
            self._meft_stage = 0
        return zero3.PartitionedWeights(torch.device(self.device), self.seq_data_parallel_group, hooks)

    @contextlib.contextmanager
    def _as_whole(self, *, read: bool = False) -> Iterator[None]:
        """Inside, let stage 3 pass for a stage with whole weights. Collective.

        `read`: gather them on the first rank, for a file.
        """
        before = self._meft_whole
        self._meft_whole = (self._consolidated() or {}) if self._meft_stage3 and read else {}
        try:
            yield
        finally:
            self._meft_whole = before

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write DeepSpeed's files and ours under one manifest, and `latest` when both are complete."""
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        run, methods = self._meft.run, self._meft.methods
        with self._meft.busy("a save", refuses="save_checkpoint"):
            self._meft.flush(self.global_samples)
            saving = Saving(Path(save_dir), tag, run.ranks)
            with self._as_whole(read=True), ds_files.through(self, saving):
                super().save_checkpoint(
                    save_dir,
                    tag=tag,
                    client_state=client_state or {},
                    save_latest=False,
                    exclude_frozen_parameters=exclude_frozen_parameters,
                )
            if saving.ranks.rank == 0:
                ds_files.write_optimizer_file(saving, rows=any(method.extras is not None for method in methods))
            state.save(
                saving,
                self._meft.pipeline.units,
                counters=self.optimizer.counters(),
                about=self._about(),
                methods={method.name: method.state(run) for method in methods},
                trained_base=export.trained_beside(self.module),
            )
            if save_latest and saving.ranks.rank == 0:
                saving.latest()
            saving.agree()
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
        """Verify our state before DeepSpeed touches the model, and load it afterwards."""
        tag = tag if tag is not None else state.latest_tag(Path(load_dir))
        if tag is None:
            return super().load_checkpoint(load_dir)  # DeepSpeed logs that there is nothing to load
        folder, moments = Path(load_dir) / str(tag) / FOLDER, load_optimizer_states and not load_module_only
        with self._meft.busy("a load"):
            manifest = self._verified(folder)
            with self._meft.pipeline.replaced(whole=moments):
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
                    self._load_units(folder, manifest, moments=moments)
        return path, client_state

    def _verified(self, folder: Path) -> Manifest:
        """End what is under way, and return the manifest of a checkpoint that fits this engine. Collective."""
        runtime = self._meft
        runtime.pipeline.rest()
        runtime.run.weights.partition_again()  # what an evaluation left gathered would be old
        return state.verify(
            folder,
            runtime.pipeline.units,
            runtime.run.ranks,
            about=self._about(),
            accepts=lambda key, saved: any(method.accepts_fingerprint(key, saved) for method in runtime.methods),
        )

    def _load_methods(self, folder: Path, manifest: Manifest, *, moments: bool) -> None:
        for method in self._meft.methods:
            saved = state.method_state(folder, manifest, method.name)
            if saved is not None and (units := method.load_state(self._meft.run, *saved, moments=moments)):
                self._meft.admit(method, units)

    def _load_units(self, folder: Path, manifest: Manifest, *, moments: bool) -> None:
        pipeline = self._meft.pipeline
        state.load(folder, manifest, pipeline.units, moments=moments)
        pipeline.publish()
        if moments:
            self.optimizer.load_counters(manifest["counters"])
        self._meft.open_window(self._loss_factor())  # the loss scale may be another one now
        # as in a new engine, whatever was interrupted
        self.micro_steps, self._running_engine_step, self._unmanaged_backward_count = 0, False, 0

    def _configure_checkpointing(self) -> None:
        """Let DeepSpeed decide as in the other stages which rank writes."""
        with self._as_whole():
            super()._configure_checkpointing()

    def module_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return whole weights on the first rank while a file is written."""
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
        """In stage 3, let every rank take its slices from the whole weights of the file, without a gather."""
        if not self._meft_stage3 or kwargs.get("custom_load_fn") is not None:
            super().load_module_state_dict(checkpoint, strict, *args, **kwargs)
            return
        alone = self._meft_whole is None  # load_checkpoint brings the masters itself
        if alone:
            self._meft.flush(self.global_samples)
        zero3.load_consolidated(self.module, checkpoint["module"], self._meft.run.weights, strict=strict)
        for unit in self._meft.pipeline.units if alone else ():
            unit.adopt()  # as the other stages do when weights have changed

    # -- plain weights -------------------------------------------------------------------------------------------------

    def save_16bit_model(
        self, save_dir: str, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """Write what `save_pretrained` would: plain weights of the base, and an adapter beside them."""
        ranks = self._meft.run.ranks
        with self._meft.busy("a save", refuses="save_16bit_model"):
            self._meft.flush(self.global_samples)
            self._meft_plain = True
            try:
                with export.first_writes(Path(save_dir) / save_filename, ranks):
                    saved = super().save_16bit_model(save_dir, save_filename, exclude_frozen_parameters)
            finally:
                self._meft_plain = False
            if saved:
                export.write_extras(save_dir, self.module, ranks, beside_base=True)
        return saved

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> Any:
        """Apply what is under way first, and count tapped weights as trained although they do not require grad."""
        if not self._meft_stage3:
            raise ValueError("this function requires ZeRO-3 mode")
        self._meft.flush(self.global_samples)
        whole = self._consolidated()
        if whole is None:
            return None
        state = self._of_whole(whole, exclude_frozen_parameters)
        return export.plain_weights(state) if self._meft_plain else state

    def _consolidated(self) -> dict[str, torch.Tensor] | None:
        """Gather whole weights on the first rank. Collective."""
        self._meft.run.weights.partition_again()
        return zero3.consolidated(self.module)

    def _of_whole(self, whole: Mapping[str, torch.Tensor], exclude_frozen: bool) -> dict[str, torch.Tensor]:
        left_out: set[str] = set()
        if exclude_frozen:
            named = self.module.named_parameters(remove_duplicate=False)
            left_out = {name for name, p in named if not self._trains(p)}
        return {name: t for name, t in whole.items() if name not in left_out}

    def _trains(self, p: nn.Parameter) -> bool:
        return p.requires_grad or any(p is q for unit in self._meft.pipeline.units for _, q in unit.params)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _loss_factor(self) -> float:
        """Return what the next window's losses are multiplied by before their backward."""
        return self.optimizer.cur_scale / self.gradient_accumulation_steps()

    def _warn_untrained(self, *, at_end: bool = False) -> None:
        """Warn when the model's state is read, or at the end, and methods have only watched so far."""
        if self.global_steps:
            self._meft.warn_untrained(self.optimizer.applied_steps, at_end=at_end)

    def _about(self) -> dict[str, Any]:
        """Return what a checkpoint's state belongs to: all that shapes the function or the layout of the state."""
        about = {
            "method": "+".join(method.name for method in self._meft.methods),
            "model": type(self.module).__name__,
            "param_groups": len(self.optimizer.param_groups),
        }
        for method in self._meft.methods:
            about |= method.fingerprint()
        return about
