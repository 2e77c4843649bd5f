# SPDX-License-Identifier: Apache-2.0
"""Where a method's moments live when the user leaves it to us."""

from __future__ import annotations

import torch

_ON_DEVICE = 0.05  # share of the accelerator's memory that moments may take by themselves


def state_on_device(choice: str, device: torch.device, nbytes: int) -> bool:
    """Whether state of `nbytes` per rank lives on the accelerator; `choice`: "auto", "cpu" or "accelerator"."""
    if choice != "auto" or device.type == "cpu":
        return choice == "accelerator"
    total = torch.get_device_module(device).get_device_properties(device).total_memory
    return bool(nbytes <= _ON_DEVICE * total)
