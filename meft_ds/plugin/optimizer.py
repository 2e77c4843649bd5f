# SPDX-License-Identifier: Apache-2.0
"""The optimizer that DeepSpeed's engine sees: it reads the user's hyperparameters and lets the pipeline do the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from torch import Tensor

from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.window import StepResult, StepSettings
from meft_ds.plugin.hyper import READ, check_groups, hyper_of

logger = logging.getLogger("meft_ds")

_IGNORABLE = {"torch_adam", "adam_w_mode", "fp32_optimizer_states", "fused", "foreach", "bias_correction", "amsgrad"}


class MeftOptimizer(ZeROOptimizer):
    """Reads lr, betas, eps and weight decay from the user's own `param_groups` at every step.

    So any LR scheduler that drives them keeps working. It is a `ZeROOptimizer` because DeepSpeed then scales losses
    through it, and accepts `loss.backward()`.

    Args:
        basic: the user's optimizer; only its `param_groups` are used, its `step` is never called.
        pipeline: carries the units.
        clip: largest global gradient norm, 0 for none.
        mean_over: gradients of how many ranks are averaged (1 when the user asked for sums).
        compute_dtype: torch.float16 turns loss scaling on.
        static_loss_scale, dynamic_loss_scale, loss_scale_args: DeepSpeed's fp16 settings.
        observed: called first in a step: None in an ordinary window; in one that methods only watched, whether its
            gradients were finite.
        after_step: called after every step, skipped or not.
        zero_grad: called when gradients are to be forgotten.
        at_end: called when the engine has been taken down.
    """

    def __init__(
        self,
        basic: torch.optim.Optimizer,
        pipeline: Pipeline,
        *,
        clip: float,
        mean_over: int,
        compute_dtype: torch.dtype,
        static_loss_scale: float,
        dynamic_loss_scale: bool,
        loss_scale_args: dict[str, Any],
        observed: Callable[[], bool | None],
        after_step: Callable[[StepResult], None],
        zero_grad: Callable[[], None],
        at_end: Callable[[], None],
    ) -> None:
        super().__init__()
        check_groups(basic.param_groups)
        self.optimizer, self.pipeline = basic, pipeline
        self.clip, self._mean_over = clip, mean_over
        self._observed, self._after_step, self._zero_grad, self._at_end = observed, after_step, zero_grad, at_end
        self.custom_loss_scaler = False
        self.torch_autocast_gradscaler = None
        self.dynamic_loss_scale = dynamic_loss_scale and compute_dtype == torch.float16
        self.loss_scaler = CreateLossScaler(
            dtype=compute_dtype,
            static_loss_scale=static_loss_scale,
            dynamic_scaling=self.dynamic_loss_scale,
            dynamic_loss_args=loss_scale_args,
        )
        self.overflow = False
        self.applied_steps = 0
        self.bf16_groups: list[Any] = []  # DeepSpeed 0.18 lists these in its checkpoint; ours are in the units
        self._global_grad_norm: float | None = None
        self._release: Callable[[], None] | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The user's parameter groups. Empty ones are among them, because an LR scheduler counts them."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @property
    def state(self) -> dict[Any, Any]:
        """Empty: the state lives on the host, in the pipeline's units."""
        return {}

    @property
    def cur_scale(self) -> float:
        """Loss scale in use; 1 outside fp16."""
        return float(self.loss_scaler.loss_scale)

    @property
    def loss_scale(self) -> float:
        return self.cur_scale

    def step(self, closure: Any = None) -> None:
        """Update from what the window collected, or skip if any gradient was not finite."""
        if closure is not None:
            raise ValueError("MeftOptimizer.step takes no closure; call engine.backward(loss) and engine.step()")
        counts = self._observed()
        if counts is not None:
            self._pass_over(finite=counts)
            return
        result = self.pipeline.step()
        self.overflow = result.overflow
        self._global_grad_norm = result.grad_norm
        if not result.overflow:
            self.applied_steps += 1
        elif not self.dynamic_loss_scale and self.pipeline.ranks.rank == 0:
            logger.warning("gradients are not finite, step skipped; weights and moments are unchanged")
        self.loss_scaler.update_scale(result.overflow)
        self._after_step(result)

    def _pass_over(self, *, finite: bool) -> None:
        """End a window that trained nothing. DeepSpeed sees a skipped step, so LR schedules start with training."""
        result = StepResult(overflow=True, grad_norm=math.nan, times=self.pipeline.pass_over())
        self.overflow, self._global_grad_norm = True, None
        if not finite and not self.dynamic_loss_scale and self.pipeline.ranks.rank == 0:
            logger.warning("gradients are not finite, this batch is not scored")
        self.loss_scaler.update_scale(not finite)
        self._after_step(result)

    def settings(self) -> StepSettings:
        """Return what the pipeline takes for the window that is open now.

        Raises:
            ValueError: where a unit's parameter group has numbers that AdamW is not defined for.
        """
        groups = self.param_groups
        # all of them before any unit is updated
        hypers = {index: hyper_of(index, groups[index]) for index in sorted({u.group for u in self.pipeline.units})}
        return StepSettings(
            hyper_of=lambda unit: hypers[unit.group],
            grad_scale=1.0 / (self._mean_over * self.cur_scale),
            clip=self.clip,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients of parameters outside the units, of which there are usually none.

        Where DeepSpeed does, drop what the window has collected too (`meft_ds.plugin.zero_grad`).
        """
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
        self._zero_grad()

    def lend(self, offload: Any) -> None:
        """Offer what programs read of ZeRO-3's own optimizers.

        For generation trl takes the hooks of `parameter_offload` off, and puts them back afterwards.

        Args:
            offload: DeepSpeed's parameter hooks (`DeepSpeedZeRoOffload`).
        """
        self.parameter_offload = offload
        self.persistent_parameters = offload.persistent_parameters
        self.dp_process_group = offload.dp_process_group
        self.empty_partition_cache = offload.empty_partition_cache
        # DeepSpeed 0.18 has only the one that also partitions the small ones
        self._release = getattr(offload, "release_backward_leftovers", offload.partition_all_parameters)

    def backward_prologue(self, loss: Tensor | None = None) -> Tensor | None:
        """Scale the loss that older engines hand over before a backward; newer ones hand over nothing."""
        return None if loss is None else self.scale_if_loss(loss)

    def scale_if_loss(self, value: Any) -> Any:
        """Return the loss times the loss scale."""
        return value * self.loss_scaler.loss_scale

    def needs_scaler(self) -> bool:
        """Return whether a bare loss.backward() would lack loss scaling."""
        return self.cur_scale != 1.0 or self.dynamic_loss_scale

    def backward_epilogue(self, **_: Any) -> None:
        """After a backward, partition again what stage 3 still holds.

        Modules whose backward did not end in a hook hold their parameters. The program could then gather them, but not
        let them go.
        """
        if self._release is not None:
            self._release()

    def backward(self, loss: Tensor, retain_graph: bool = False, **_: Any) -> None:
        """Run a backward, as DeepSpeed before 0.19 asks its optimizer to."""
        self.scale_if_loss(loss).backward(retain_graph=retain_graph)
        self.backward_epilogue()

    def state_dict(self) -> dict[str, Any]:
        """Give DeepSpeed's own file nothing: `meft_ds.plugin.checkpoint.state` saves all state and `counters`."""
        return {}

    def load_state_dict(self, state: dict[str, Any], load_optimizer_states: bool = True, **_: Any) -> None:
        """Do nothing, as `state_dict` gave nothing."""

    def counters(self) -> dict[str, Any]:
        """Return what resuming needs beside the units' state, as JSON: steps, loss scaler, hyperparameters."""
        groups = [_plain({k: v for k, v in group.items() if k != "params"}) for group in self.param_groups]
        return {
            "applied_steps": self.applied_steps,
            "loss_scaler": _plain(vars(self.loss_scaler)),
            "param_groups": groups,
            "pipeline": self.pipeline.state(),
        }

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Take back what `counters` gave."""
        self.applied_steps = counters["applied_steps"]
        vars(self.loss_scaler).update(counters["loss_scaler"])
        for group, saved in zip(self.param_groups, counters["param_groups"], strict=True):
            group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
        self.pipeline.load_state(counters["pipeline"])

    def destroy(self) -> None:
        """Finish what is under way and stop listening to the model, when the engine is taken down."""
        try:
            self.pipeline.close()
        finally:
            self._at_end()


def holder_of_groups(given: Any, params: list[Any], settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Return an optimizer that only holds parameter groups: the user's own, or an AdamW.

    Args:
        given: the program's optimizer or what makes one of `params`; None where the ds_config has it.
        params: parameters or groups of them.
        settings: the ds_config's "optimizer.params".

    Raises:
        ValueError: when the update is not AdamW's, or for numbers that AdamW is not defined for.
    """
    if given is None:
        return _adamw_from_config(params, settings)
    made = given if hasattr(given, "param_groups") else given(params)
    _check_client_optimizer(made)
    return made


def _adamw_from_config(params: list[Any], settings: Mapping[str, Any]) -> torch.optim.AdamW:
    for key in settings:
        if key not in READ and key not in _IGNORABLE and Ranks.everyone().rank == 0:
            logger.warning("optimizer.params.%s is skipped: the host AdamW has no such setting", key)
        if key in READ and settings[key] == "auto":
            raise ValueError(f'optimizer.params.{key}: expected a number, got "auto", which nobody has filled in')
    return torch.optim.AdamW(params, **{k: v for k, v in settings.items() if k in READ})


def _check_client_optimizer(optimizer: Any) -> None:
    """Refuse optimizers whose update is not AdamW's.

    Raises:
        ValueError: naming the class and the fix.
    """
    name = type(optimizer).__name__
    if "adam" not in name.lower() or "8bit" in name.lower():
        raise ValueError(
            f"meft_offload updates with AdamW, but the training program passes {name}; pass torch.optim.AdamW"
        )
    coupled = isinstance(optimizer, torch.optim.Adam) and not isinstance(optimizer, torch.optim.AdamW)
    decays = any(group.get("weight_decay") for group in optimizer.param_groups)
    if coupled and decays and not optimizer.defaults.get("decoupled_weight_decay", False):
        raise ValueError("meft_offload supports only decoupled weight decay; pass torch.optim.AdamW instead of Adam")
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ValueError("meft_offload does not support amsgrad; build the optimizer without it")
    check_groups(optimizer.param_groups)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Keep what JSON can hold; numbers in tensors (capturable optimizers) become floats."""
    numbers = {k: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in values.items()}
    return {k: v for k, v in numbers.items() if v is None or isinstance(v, bool | int | float | str | list | tuple)}
