# SPDX-License-Identifier: Apache-2.0
"""When Triton's kernels serve a GPU, alike on all ranks, and how they are compiled. Nothing here runs on one."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import meft_ds.ops
from meft_ds import ops
from meft_ds.ops import build
from meft_ds.plugin import build as plugin_build

GPU = torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="triton is not installed, or interprets",
)


class Kernels:
    """Stands in for the module of kernels."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.probed = error, 0

    def probe(self, device: torch.device) -> None:
        self.probed += 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("MEFT_DS_OPS", raising=False)
    monkeypatch.setattr(build, "_without_triton", threading.Event())

    def plug_in(error: Exception | None = None) -> Kernels:
        module = Kernels(error)
        monkeypatch.setitem(sys.modules, "meft_ds.ops.triton_sketch", module)  # type: ignore[misc]
        monkeypatch.setattr(meft_ds.ops, "triton_sketch", module, raising=False)
        build._probe_once.cache_clear()
        return module

    yield plug_in
    build._probe_once.cache_clear()


def test_kernels_that_run_are_probed_once_and_used(kernels: Any) -> None:
    module = kernels()
    assert ops.triton_fault(GPU) == "" and build.triton_kernels(GPU) is module and build.triton_kernels(GPU) is module
    assert module.probed == 1
    assert build.triton_kernels(torch.device("cpu")) is None


@pytest.mark.parametrize(
    "error", [RuntimeError("a\nFailed to find C compiler.\n"), ImportError("no triton"), OSError()]
)
def test_any_failure_means_plain_torch_and_one_warning(
    kernels: Any, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    module = kernels(error)
    for _ in range(3):
        assert build.triton_kernels(GPU) is None
    assert module.probed == 1
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    reason = {RuntimeError: "Failed to find C compiler.", ImportError: "no triton", OSError: "OSError()"}[type(error)]
    assert f"cannot run ({reason})" in line and "C compiler" in line


def test_nothing_is_probed_where_nobody_asks_for_it(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = kernels(RuntimeError("planted"))
    assert ops.triton_fault(torch.device("cpu")) == ""
    monkeypatch.setenv("MEFT_DS_OPS", "torch")
    assert ops.triton_fault(GPU) == "" and build.triton_kernels(GPU) is None
    assert module.probed == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_decide_alike_and_the_first_one_tells(kernels: Any, rank: int, caplog: pytest.LogCaptureFixture) -> None:
    kernels()  # they run on this rank
    ranks = SimpleNamespace(rank=rank, gather=lambda fault: ["", "no headers"])
    run: Any = SimpleNamespace(bus=SimpleNamespace(is_host=False, device=GPU), ranks=ranks)
    plugin_build._agree_on_kernels(run)
    assert build.triton_kernels(GPU) is None
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (rank == 0) and all("on rank 1: no headers" in line for line in lines)


@needs_triton
def test_every_launch_says_that_products_and_sums_are_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    from meft_ds.ops import triton_sketch

    fused: dict[str, Any] = {}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: fused.update({self.name: options.get("enable_fp_fusion")})

    names = ("_sketch", "_combine", "_update", "_direction")
    for name in names:
        monkeypatch.setattr(triton_sketch, name, Recorder(name))
    index, value = torch.zeros(4, 2, dtype=torch.int16), torch.ones(4, 2, dtype=torch.float16)
    x, moments = torch.ones(4, 4), torch.ones(8)
    triton_sketch.sketch(x, index, value, torch.float32)
    numbers: dict[str, Any] = dict(alpha=1.0, decay=1.0, key=1, step=1, residual=None)
    triton_sketch.subspace_apply(x, x, (index, value), (index, value), **numbers)
    betas: dict[str, Any] = dict(beta1=0.9, beta2=0.9, eps=1e-8, step=1, grad_scale=1.0)
    triton_sketch.adam_direction(moments, moments, moments, moments, **betas)
    assert fused == dict.fromkeys(names, False)
    fused.clear()
    triton_sketch.combine(x, index, value)
    assert fused == {"_combine": False}


@needs_triton
def test_what_launches_say_keeps_the_compiler_from_fusing() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from meft_ds.ops import triton_sketch

    pointers = {"z": "*bf16", "index": "*i16", "value": "*fp16", "out": "*fp32"}
    signature = {**pointers, "columns": "i32", "width": "i32", "alpha": "fp32", "COLUMNS": "constexpr"}
    source = ASTSource(fn=triton_sketch._combine, signature=signature, constexprs={"COLUMNS": 1024})
    ptx = triton.compile(source, target=GPUTarget("cuda", 89, 32), options=triton_sketch._ROUNDING).asm["ptx"]
    assert "mul.rn.f32" in ptx and "add.rn.f32" in ptx
    assert not re.search(r"\s(mul|add)\.f32|fma\.rn\.f32", ptx), "the assembler may fuse these, or has"


@needs_triton
def test_the_number_of_tokens_makes_no_variants_of_the_sketch() -> None:
    from meft_ds.ops import triton_sketch

    assert [p.name for p in triton_sketch._sketch.params if p.do_not_specialize] == ["T"]
