# SPDX-License-Identifier: Apache-2.0
"""Page-locked host memory, which an accelerator copies from and to without the CPU.

torch's own allocator of it takes a power of two for every block, up to twice what is asked for. CUDA can lock pages
that are there already, so on it whole pages are taken and locked here. Elsewhere torch's allocator serves, and what it
takes is what `taken` says.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from meft_ds.offload.host.memory import in_units

PAGE = mmap.PAGESIZE


def pages(nbytes: int) -> int:
    """Return the bytes of the pages that `nbytes` need."""
    return -(-nbytes // PAGE) * PAGE


def taken(nbytes: int, device: torch.device) -> int:
    """Return how many bytes of the host `page_locked` takes for `nbytes`."""
    if device.type == "cuda":
        return pages(nbytes)
    return nbytes if device.type == "cpu" or nbytes == 0 else 1 << (nbytes - 1).bit_length()


def page_locked(nbytes: int, device: torch.device) -> Tensor:
    """Return zeros, uint8 [nbytes], on the host; page-locked unless `device`, which copies from them, is the host.

    Raises:
        ValueError: when the driver refuses.
    """
    with torch.inference_mode(False):  # an evaluation may be the first to need it
        if device.type != "cuda" or nbytes == 0:
            return torch.zeros(nbytes, dtype=torch.uint8, device="cpu", pin_memory=device.type != "cpu" and nbytes > 0)
        # a shared mapping: after a fork a private one would be copied for whichever process writes first, and the
        # device would go on with the pages of the other
        memory = mmap.mmap(-1, nbytes)
        view = memoryview(memory)
        block = torch.frombuffer(view, dtype=torch.uint8)
        unlock, fault = lock(view, memory, [block])
        if fault:
            unlock()
            raise ValueError(f"meft_offload {fault}")
        return block


def lock(view: memoryview, memory: mmap.mmap, tensors: Sequence[Tensor]) -> tuple[Callable[[], object], str]:
    """Page-lock `tensors`, which begin on pages of their own in `memory`, until nobody refers to `view` any more.

    Returns what unlocks them earlier, and why one could not be locked ("" if all are).
    """
    locked: list[int] = []
    fault = ""
    for t in tensors:
        nbytes = t.numel() * t.element_size()
        if error := _register(t.data_ptr(), nbytes):
            fault = (
                f"could not page-lock {in_units(nbytes)} of host memory (cudaHostRegister: error {error}); lift the "
                "container's or driver's limit, or make what is offloaded smaller"
            )
            break
        locked.append(t.data_ptr())
    # that it refers to the memory keeps it mapped until its pages are unlocked
    unlock = weakref.finalize(view, _unlock, memory, locked, torch.cuda.current_device(), os.getpid())
    unlock.atexit = False  # tensors may be in use until the process ends, and that unlocks them too
    return unlock, fault


def _unlock(memory: mmap.mmap, addresses: list[int], device: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked process has locked nothing
    with contextlib.suppress(RuntimeError):  # of a device that has failed already
        torch.cuda.synchronize(device)  # copies may still be under way
    for address in addresses:
        _unregister(address)


def _register(address: int, nbytes: int) -> int:
    return int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # there is nothing to be done about an error
