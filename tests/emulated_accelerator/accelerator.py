# SPDX-License-Identifier: Apache-2.0
"""The emulated device as DeepSpeed sees it.

Of `CPU_Accelerator` we keep what is not about a device: builders of host operators, random numbers (the device draws
from the host's generator), profiler ranges.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor

from tests.emulated_accelerator import ranks
from tests.emulated_accelerator.device import NAME, module


class EmulatedAccelerator(CPU_Accelerator):
    """A device that answers as CUDA does: asynchronous, with memory of its own, streams and page-locked host memory."""

    _torch_pins_host_memory = True

    def __init__(self) -> None:
        super().__init__()
        self._name, self._communication_backend_name = NAME, ranks.BACKEND

    def is_synchronized_device(self) -> bool:
        return False

    # -- devices -------------------------------------------------------------------------------------------------------

    def device_name(self, device_index: int | None = None) -> str:
        return NAME if device_index is None else f"{NAME}:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device(NAME, module.current_device() if device_index is None else device_index)

    def set_device(self, device_index: int) -> None:
        module.set_device(device_index)

    def current_device(self) -> int:
        return module.current_device()

    def current_device_name(self) -> str:
        return f"{NAME}:{module.current_device()}"

    def device_count(self) -> int:
        return module.device_count()

    def synchronize(self, device_index: int | None = None) -> None:
        module.synchronize()

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == NAME

    # -- streams and events --------------------------------------------------------------------------------------------

    @property
    def Stream(self) -> Any:
        return module.Stream

    @property
    def Event(self) -> Any:
        return module.Event

    def stream(self, stream: Any) -> Any:
        return module.stream(stream)

    def current_stream(self, device_index: int | None = None) -> Any:
        return module.current_stream()

    def default_stream(self, device_index: int | None = None) -> Any:
        return module.default_stream()

    # -- memory --------------------------------------------------------------------------------------------------------

    def memory_allocated(self, device_index: int | None = None) -> int:
        return module.memory_allocated()

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return module.max_memory_allocated()

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        module.reset_peak_memory_stats()

    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats
    memory_cached = memory_reserved = memory_allocated
    max_memory_cached = max_memory_reserved = max_memory_allocated

    def memory_stats(self, device_index: int | None = None) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": self.memory_allocated(),
            "allocated_bytes.all.peak": self.max_memory_allocated(),
        }

    def total_memory(self, device_index: int | None = None) -> int:
        return module.get_device_properties(0).total_memory

    def available_memory(self, device_index: int | None = None) -> int:
        return module.mem_get_info()[0]

    def empty_cache(self) -> None:
        module.empty_cache()

    def pin_memory(self, tensor: Tensor, make_copy: bool = True, match_shape: bool = True) -> Tensor:
        return tensor.pin_memory()

    def _torch_pin_memory(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory()

    def _torch_empty_pinned(self, tensor: Tensor, shape: Any) -> Tensor:
        return torch.empty(shape, dtype=tensor.dtype, pin_memory=True)

    # -- data types ----------------------------------------------------------------------------------------------------

    def is_fp16_supported(self) -> bool:
        return True

    BFloat16Tensor = property(lambda self: partial(torch.tensor, dtype=torch.bfloat16, device=NAME))
    ByteTensor = property(lambda self: partial(torch.tensor, dtype=torch.uint8, device=NAME))
    DoubleTensor = property(lambda self: partial(torch.tensor, dtype=torch.float64, device=NAME))
    FloatTensor = property(lambda self: partial(torch.tensor, dtype=torch.float32, device=NAME))
    HalfTensor = property(lambda self: partial(torch.tensor, dtype=torch.float16, device=NAME))
    IntTensor = property(lambda self: partial(torch.tensor, dtype=torch.int32, device=NAME))
    LongTensor = property(lambda self: partial(torch.tensor, dtype=torch.int64, device=NAME))


def install() -> None:
    """Make the emulated device DeepSpeed's accelerator, and register its process groups. Once per process."""
    import deepspeed.accelerator

    ranks.register()
    deepspeed.accelerator.set_accelerator(EmulatedAccelerator())
