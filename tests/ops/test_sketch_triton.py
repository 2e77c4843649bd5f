# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the plain torch oracle: on a GPU where there is one, else in Triton's interpreter.

Whether a kernel is interpreted is settled when Triton is imported, so a process of its own does that.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from meft_ds.ops import torch_sketch
from meft_ds.ops.adam import AdamHyper, direction_in_torch

from .gather_lists import Projector, projector

HERE = Path(__file__)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
kernel_test = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="run by the test of the interpreter")

if importlib.util.find_spec("triton") is not None and (DEVICE == "cuda" or INTERPRETED):
    from meft_ds.ops import triton_sketch


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="kernels are tested in this process")
@pytest.mark.slow
def test_kernels_agree_with_torch_in_the_interpreter() -> None:
    # without tests/conftest.py, which takes seconds to import DeepSpeed
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", str(HERE)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = HERE.parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    kernels = len(re.findall(r"^@kernel_test$", HERE.read_text(), re.MULTILINE))
    passed = re.search(r"(\d+) passed, 1 deselected", done.stdout)  # this test itself, which is slow
    assert passed is not None and int(passed[1]) >= kernels, done.stdout[-4000:]


def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(DEVICE) for t in tensors)


def lists(m: int, d: int, k: int, seed: int, dtype: torch.dtype = torch.int16) -> Projector:
    p = projector(m, d, k, seed, dtype, empty=1)
    return Projector(on_device(*p.rows), on_device(*p.columns), p.dense.to(DEVICE))  # type: ignore[arg-type]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def as_bits(t: Tensor) -> Tensor:
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


@kernel_test
def test_the_probe_runs() -> None:
    triton_sketch.probe(torch.device(DEVICE))


@kernel_test
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index_dtype", [torch.int16, torch.int32])
def test_sketch_and_combine(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    p = lists(70, 33, 4, 0, index_dtype)
    x = random(37, 70, dtype=dtype)
    x[3, 0] = math.inf
    for out_dtype in FLOATS:
        expected = torch_sketch.sketch(x, *p.columns, out_dtype)
        rtol = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[out_dtype]
        torch.testing.assert_close(triton_sketch.sketch(x, *p.columns, out_dtype), expected, rtol=rtol, atol=1e-5)
    z = x.t().contiguous()
    torch.testing.assert_close(triton_sketch.combine(z, *p.columns), torch_sketch.combine(z, *p.columns))


@kernel_test
def test_positions_above_32767_are_unsigned_in_16_bits() -> None:
    index = torch.tensor([[65535, 40000]]).to(torch.int16).to(DEVICE)
    x = torch.arange(65536.0, device=DEVICE).view(1, 65536)
    assert triton_sketch.sketch(x, index, torch.ones(1, 2).half().to(DEVICE), torch.float32).item() == 105535.0


@kernel_test
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("key", "step"), [(0xFEDCBA9876543210, 41), (1, 1), (-1, 2**32 - 1)])
def test_random_bits_are_the_oracles(dtype: torch.dtype, key: int, step: int) -> None:
    p, q = lists(37, 8, 2, 0), lists(205, 8, 2, 1)
    weight = (random(37, 205) * random(37, 205, seed=3).mul(6).exp()).clamp(-6e4, 6e4)
    weight[:4, 0] = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    weight[:2, 1] = torch.tensor([65504.0, torch.finfo(dtype).max])
    weight = weight.to(dtype)
    expected, kw = weight.clone(), dict(alpha=0.0, decay=0.9123, key=key, step=step, residual=None)
    torch_sketch.subspace_apply(expected, random(8, 8), p.rows, q.rows, **kw)
    triton_sketch.subspace_apply(weight, random(8, 8), p.rows, q.rows, **kw)
    assert torch.equal(weight.isnan(), expected.isnan())
    assert torch.equal(as_bits(weight)[~weight.isnan()], as_bits(expected)[~weight.isnan()])


@kernel_test
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_subspace_update(dtype: torch.dtype, with_residual: bool) -> None:
    p, q = lists(37, 9, 3, 0), lists(205, 8, 2, 1)
    weight, residual = random(37, 205, dtype=dtype), random(37, 205, seed=4) * 1e-4 if with_residual else None
    s, kw = random(9, 8, dtype=dtype, seed=5), dict(alpha=-0.01, decay=0.99, key=7, step=1)
    expected, rest = weight.clone(), None if residual is None else residual.clone()
    torch_sketch.subspace_apply(expected, s, p.rows, q.rows, residual=rest, **kw)
    triton_sketch.subspace_apply(weight, s, p.rows, q.rows, residual=residual, **kw)
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(weight, expected, rtol=rtol, atol=1e-6)
    if residual is not None and rest is not None:
        torch.testing.assert_close(weight.float() + residual, expected.float() + rest, rtol=1e-6, atol=1e-6)


@kernel_test
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_direction(moments: torch.dtype, out_dtype: torch.dtype) -> None:
    grad = random(1037)
    state = [random(1037, dtype=moments, seed=1), random(1037, dtype=moments, seed=2).abs()]
    expected = [t.clone() for t in state]
    out, wanted = torch.empty(2, 1037, dtype=out_dtype, device=DEVICE)
    numbers = dict(beta1=0.9, beta2=0.95, eps=1e-6)
    hyper = AdamHyper(lr=1.0, weight_decay=0.0, **numbers)
    triton_sketch.adam_direction(*state, grad, out, **numbers, step=3, grad_scale=0.5)
    direction_in_torch(*expected, grad, wanted, hyper, step=3, grad_scale=0.5)
    for actual, other in zip([*state, out], [*expected, wanted], strict=True):
        rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[actual.dtype]
        torch.testing.assert_close(actual, other, rtol=rtol, atol=1e-6)
