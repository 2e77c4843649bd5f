# SPDX-License-Identifier: Apache-2.0
"""The rest of the ds_config beside the block: conflicts stop the run, settings without effect are warned of."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import nn

from meft_ds.offload.ranks import Ranks
from meft_ds.options import is_number, is_whole, listed, shown

_logger = logging.getLogger("meft_ds")

TESTED = {"deepspeed": ("0.18.2", "0.19.8"), "transformers": ("4.57.3", "5.23.0")}
"""Oldest and newest version that the tests run against."""

_FLOAT16 = ("float16", "fp16", "half")
_FLOAT32 = 3.4e38  # about the largest number that updates, which are made in fp32, can be


def tell(ds_config: Mapping[str, Any]) -> None:
    """Log which settings have no effect, and versions outside the tested ranges."""
    for line in [*version_warnings(), *skipped(ds_config)]:
        # almost every config has this one, and the optimizer state is on the host as it asks
        level = logging.INFO if line.startswith("zero_optimization.offload_optimizer") else logging.WARNING
        _logger.log(level, line)


def version_warnings() -> list[str]:
    """Return one line for each installed package outside its tested range."""
    lines = []
    for package, (oldest, newest) in TESTED.items():
        here = Version(version(package))
        if not Version(oldest) <= here <= Version(newest):
            lines.append(f"{package} {here} is outside the range meft-ds is tested with ({oldest} to {newest})")
    return lines


def zero_settings(ds_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the "zero_optimization" object as DeepSpeed reads it: true is stage 1."""
    zero = ds_config.get("zero_optimization")
    return {"stage": 1} if zero is True else _section(ds_config, "zero_optimization", [])


def conflicts(ds_config: Mapping[str, Any]) -> list[str]:
    """Return the settings that the block cannot work with, one line each with the fix."""
    faults: list[str] = []
    if not isinstance(ds_config.get("zero_optimization"), bool):
        _section(ds_config, "zero_optimization", faults)
    zero = zero_settings(ds_config)
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        faults.append(f"zero_optimization.stage: expected 0, 1, 2 or 3, got {shown(stage)}")
    if zero.get("zenflow") is not None:  # DeepSpeed takes {} for yes
        faults.append("zero_optimization.zenflow: does not go with meft_offload; remove it")
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if _is_on(zero.get(key)):
            faults.append(f"zero_optimization.{key}: does not go with meft_offload; remove it")
    if stage == 3 and _above(zero.get("zero_hpz_partition_size"), 1):
        faults.append("zero_optimization.zero_hpz_partition_size: does not go with meft_offload; set it to 1")
    if stage == 3 and _above(zero.get("mics_shard_size"), 0):
        faults.append("zero_optimization.mics_shard_size: does not go with meft_offload; remove it")
    offload = zero.get("offload_param")
    if _is_on(offload) and stage != 3:
        faults.append("zero_optimization.offload_param: works with stage 3 only; remove it or set stage to 3")
    elif isinstance(offload, Mapping) and offload.get("device") == "nvme":
        faults.append('zero_optimization.offload_param.device: "nvme" does not go with meft_offload; use "cpu"')
    for key in ("hybrid_engine", "amp", "compression_training", "sparse_gradients"):
        if _is_on(ds_config.get(key)):
            faults.append(f"{key}: does not go with meft_offload; remove it")
    if _above(_section(ds_config, "tensor_parallel", faults).get("autotp_size"), 1):
        faults.append("tensor_parallel.autotp_size: tensor parallelism does not go with meft_offload; remove it")
    sequence_parallel = ds_config.get("sequence_parallel_size", 1)
    if not is_whole(sequence_parallel, 1):
        faults.append(f"sequence_parallel_size: expected a whole number, got {shown(sequence_parallel)}; set it to 1")
    elif sequence_parallel > 1:
        faults.append("sequence_parallel_size: sequence parallelism does not go with meft_offload; set it to 1")
    clip = ds_config.get("gradient_clipping", 0.0)
    if clip != "auto" and not _is_from_0(clip, most=math.inf):
        faults.append(f"gradient_clipping: expected a number >= 0, got {shown(clip)}")
    autocast = _section(ds_config, "torch_autocast", faults)
    dtype = autocast.get("dtype")
    if autocast.get("enabled") and (dtype is torch.float16 or _text(dtype) in ("torch.float16", *_FLOAT16)):
        faults.append(
            'torch_autocast.dtype: float16 needs a loss scaler that meft_offload has only under "fp16"; use it'
        )
    faults += _checkpoint_faults(ds_config)
    faults += _optimizer_faults(ds_config)
    return faults


def skipped(ds_config: Mapping[str, Any]) -> list[str]:
    """Return the settings that have no effect under the block, one line each."""
    lines = []
    if _is_on(zero_settings(ds_config).get("offload_optimizer")):
        lines.append(
            "zero_optimization.offload_optimizer is skipped: meft_offload holds the optimizer state on the host"
        )
    if _section(ds_config, "data_types", []).get("grad_accum_dtype") not in (None, "fp32", "float32"):
        lines.append("data_types.grad_accum_dtype is skipped: meft_offload accumulates gradients in fp32")
    for key in ("communication_data_type", "prescale_gradients", "gradient_predivide_factor"):
        if key in ds_config:
            lines.append(f"{key} is skipped: meft_offload reduces its own payloads")
    return lines


def tell_of_broken_weights(model: nn.Module) -> None:
    """Warn of parameters with NaN or infinite values, on the first rank. Collective.

    If the loss depends on one, every step is skipped. It is no error, because no forward may read it.
    """
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    names, finite = [], []
    for name, p in model.named_parameters():
        own = getattr(p, "ds_tensor", None)  # this rank's slice, where parameters are partitioned already
        held = (p if own is None else own).detach()
        if held.numel() and not held.is_meta and held.dtype in floats:
            names.append(name)
            finite.append(torch.isfinite(torch.stack(torch.aminmax(held))).all().cpu())
    ranks = Ranks.everyone()
    here = [name for name, fine in zip(names, finite, strict=True) if not fine]
    broken = list(dict.fromkeys(name for found in ranks.gather(here) for name in found))
    if broken and ranks.rank == 0:
        _logger.warning(
            "%s %s NaN or infinite values before the first step; if the loss becomes NaN, no step trains anything: "
            "load the model from a good checkpoint",
            listed(broken),
            "hold" if len(broken) > 1 else "holds",
        )


def refuse_expert_parallelism(model: nn.Module, groups: Mapping[str, Any]) -> None:
    """Raise where ranks hold different experts under the same names, whose payloads must not be summed.

    Args:
        model: in which DeepSpeed marks experts by `allreduce = False` and the name of their expert-parallel group.
        groups: DeepSpeed's expert-parallel process groups by name.

    Raises:
        ValueError: naming the first parameter of a group of several ranks; the same on every rank.
    """
    for name, p in model.named_parameters():
        if getattr(p, "allreduce", True):
            continue
        ranks = dist.get_world_size(groups.get(getattr(p, "group_name", "")))  # of all ranks if it is of no group
        if ranks > 1:
            raise ValueError(
                f"{name}: expected an expert that every rank holds, but its expert-parallel group has {ranks} ranks, "
                "each with an expert of its own; set ep_size to 1, or remove the meft_offload block"
            )


def _checkpoint_faults(ds_config: Mapping[str, Any]) -> list[str]:
    faults: list[str] = []
    settings = _section(ds_config, "checkpoint", faults)
    _section(ds_config, "data_types", faults)
    # other writers replace files of an older checkpoint before the new one is complete, some of them in the background
    needs = "meft_offload needs DeepSpeed's default writer, torch.save; remove it"
    if settings.get("writer") is not None:
        faults.append(f"checkpoint.writer: expected no such key, got {shown(settings['writer'])}: {needs}")
    if ds_config.get("datastates_ckpt", False) is not False:  # DeepSpeed takes null and {} for yes
        found = shown(ds_config["datastates_ckpt"])
        faults.append(f"datastates_ckpt: expected no such key or false, got {found}: {needs}")
    nebula = _section(ds_config, "nebula", faults).get("enabled")
    if nebula:
        faults.append(f"nebula.enabled: expected false, got {shown(nebula)}: {needs}")
    if settings.get("use_node_local_storage"):
        faults.append(
            "checkpoint.use_node_local_storage: expected false, got true: a checkpoint of meft_offload is one folder "
            "that all nodes see; remove it and give save_checkpoint a folder on shared storage"
        )
    if settings.get("load_universal"):
        faults.append(
            "checkpoint.load_universal: expected false, got true: checkpoints of meft_offload load with any number of "
            "ranks and in any stage as they are, and universal ones cannot be read; remove it"
        )
    return faults


def _optimizer_faults(ds_config: Mapping[str, Any]) -> list[str]:
    faults: list[str] = []
    optimizer = _section(ds_config, "optimizer", faults)
    if not optimizer:
        return faults
    kind, params = _text(optimizer.get("type")), _section(optimizer, "params", faults, "optimizer.")
    if kind not in ("adam", "adamw"):
        found = shown(optimizer.get("type", ""))
        return [
            *faults,
            f'optimizer.type: {found} is not supported, meft_offload updates with AdamW; use "AdamW"',
        ]
    l2 = kind == "adam" and (params.get("adam_w_mode") is False or params.get("torch_adam") is True)
    if l2 and params.get("weight_decay"):
        faults.append(
            "optimizer.params.weight_decay: L2 decay (Adam) is not supported, only decoupled decay; use AdamW"
        )
    if params.get("amsgrad"):
        faults.append("optimizer.params.amsgrad: is not supported; remove it")
    if params.get("bias_correction") is False:
        faults.append("optimizer.params.bias_correction: false is not supported; remove it")
    for name in ("lr", "weight_decay", "eps"):
        value = params.get(name, 0.0)
        if value != "auto" and not _is_from_0(value):  # HF fills "auto" in before the engine is made
            limit = f" and at most {_FLOAT32:.1e}" if _above(value, _FLOAT32) else ""
            faults.append(f"optimizer.params.{name}: expected a number >= 0{limit}, got {shown(value)}")
    betas = params.get("betas", "auto")
    if betas != "auto" and not _are_betas(betas):
        faults.append(f"optimizer.params.betas: expected two numbers from 0 and below 1, got {shown(betas)}")
    return faults


def _section(holder: Mapping[str, Any], key: str, faults: list[str], prefix: str = "") -> Mapping[str, Any]:
    """Return the object under `key`; {} where there is none, with a fault where there is something else."""
    found = holder.get(key)
    if found is None or isinstance(found, Mapping):
        return found or {}
    faults.append(f"{prefix}{key}: expected an object of settings, got {shown(found)}")
    return {}


def _text(value: Any) -> str:
    return value.lower() if isinstance(value, str) else ""


def _is_from_0(value: Any, most: float = _FLOAT32) -> bool:
    return is_number(value) and 0 <= value <= most or value == math.inf == most


def _are_betas(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(is_number(b) and 0 <= b < 1 for b in value)


def _above(value: Any, limit: float) -> bool:
    """Return whether it is a number above `limit`; DeepSpeed's own checks name what is no number."""
    return isinstance(value, int | float) and value > limit


def _is_on(section: Any) -> bool:
    if isinstance(section, Mapping):
        return bool(section) and section.get("enabled", True) is not False and section.get("device") != "none"
    return bool(section)
