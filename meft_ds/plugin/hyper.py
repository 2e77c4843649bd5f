# SPDX-License-Identifier: Apache-2.0
"""AdamW's numbers in the user's parameter groups: read, and refused where AdamW is not defined for them."""

from __future__ import annotations

import math
from typing import Any

import torch

from meft_ds.ops.adam import AdamHyper

READ = ("lr", "betas", "eps", "weight_decay")
_TYPICAL = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def hyper_of(index: int, group: dict[str, Any]) -> AdamHyper:
    """Read AdamW's numbers from parameter group `index`, as they are now.

    Raises:
        ValueError: naming the group, the key, what was found and what to set.
    """
    missing = [key for key in READ if key not in group]
    if missing:
        raise ValueError(f"parameter group {index} lacks {', '.join(missing)}; meft_offload needs an AdamW optimizer")
    lr, eps, weight_decay = (_number(index, group, key) for key in ("lr", "eps", "weight_decay"))
    betas = group["betas"]
    found = [_float(beta) for beta in betas] if isinstance(betas, tuple | list) else []
    if len(found) != 2 or not all(0 <= beta < 1 for beta in found):
        raise _wrong(index, group, "betas", "two numbers that lie in [0, 1)")
    return AdamHyper(lr=lr, beta1=found[0], beta2=found[1], eps=eps, weight_decay=weight_decay)


def check_groups(groups: list[dict[str, Any]]) -> None:
    """Refuse numbers that no run should start with.

    Raises:
        ValueError: as `hyper_of`, and for negative numbers. A schedule may end a rounding error below zero.
    """
    for index, group in enumerate(groups):
        hyper = hyper_of(index, group)
        for key in ("lr", "eps", "weight_decay"):
            if getattr(hyper, key) < 0:
                raise _wrong(index, group, key, "a finite number >= 0")


def _number(index: int, group: dict[str, Any], key: str) -> float:
    value = _float(group[key])
    if not math.isfinite(value):
        raise _wrong(index, group, key, "a finite number >= 0")
    if abs(value) > torch.finfo(torch.float32).max:  # updates are made in fp32
        raise _wrong(index, group, key, "a number that float32 can hold")
    return value


def _float(value: Any) -> float:
    """Return NaN for what is no number; tensors of one element are numbers, strings are not."""
    if isinstance(value, str | bytes | bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def _wrong(index: int, group: dict[str, Any], key: str, expected: str) -> ValueError:
    return ValueError(
        f"parameter group {index}: {key} must be {expected}, got {group[key]!r}; set "
        f'optimizer.param_groups[{index}]["{key}"], or correct the LR scheduler that does (e.g. {_TYPICAL[key]})'
    )
