# SPDX-License-Identifier: Apache-2.0
"""Engines watched by PyTorch's CUDA sanitizer, which raises when two streams use a tensor and neither waits.

    TORCH_CUDA_SANITIZER=1 pytest tests/gpu/test_sanitizer.py

It sees operators of PyTorch, not kernels of our own, and only those of threads that it was turned on in. So stages run
in line here: on their streams, and with their waits, but on the thread that trains. Races of lanes as threads are what
test_streams.py hunts.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.gpu.runs import CASES, result_of

# few, because it takes the stack at each operator
WATCHED = (
    *("adapter", "subspace", "tiles", "dense", "adapter, spilling", "adapter, keys chosen on the device"),
    *("subspace, state on the accelerator", "tiles, state on the accelerator", "adapter, compressed"),
    *("subspace, eager", "tiles, stage 3", "adapter, stage 3, offload_param"),
)
pytestmark = pytest.mark.skipif(
    not os.environ.get("TORCH_CUDA_SANITIZER"), reason="run with TORCH_CUDA_SANITIZER=1, in a process of its own"
)


def test_the_sanitizer_sees_a_stream_that_does_not_wait(cuda: torch.device) -> None:
    from torch.cuda._sanitizer import CUDASanitizerErrors

    t = torch.zeros(1000, device=cuda)
    with torch.cuda.stream(torch.cuda.Stream(cuda)), pytest.raises(CUDASanitizerErrors):
        t.add_(1)


@pytest.mark.parametrize("name", WATCHED)
def test_no_operator_touches_what_another_stream_is_using(cuda: torch.device, name: str) -> None:
    case = CASES[name]
    result_of(case, case.mode, inline=True)
