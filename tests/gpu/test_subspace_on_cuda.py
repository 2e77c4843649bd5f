# SPDX-License-Identifier: Apache-2.0
"""Subspace kernels and the subspace method on an accelerator, against plain torch and against the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meft_ds import ops
from meft_ds.ops import torch_sketch
from meft_ds.ops.projector import Projector
from tests.toy import ds_config, make_engine, train

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pair(cuda: torch.device, m: int, n: int, d: int, k: int) -> tuple[Projector, Projector]:
    return Projector.draw(m, d, k, 1, cuda), Projector.draw(n, d, k, 2, cuda)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 200, 70, 3), (1024, 1024, 512, 4), (65, 1030, 33, 8)])
def test_sketches_equal_plain_torch(cuda: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    m, n, d, k = shape
    p, q = pair(cuda, m, n, d, k)
    x = torch.randn(177, n, generator=torch.Generator().manual_seed(0)).to(cuda, dtype)
    for view, given in ((q.columns, x), (q.rows, ops.sketch(x, *q.columns))):
        got, want = ops.sketch(given, *view, torch.float32), torch_sketch.sketch(given, *view, torch.float32)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    z = torch.randn(m, 50, generator=torch.Generator().manual_seed(1)).to(cuda, dtype)
    torch.testing.assert_close(ops.combine(z, *p.columns), torch_sketch.combine(z, *p.columns), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_update_equals_plain_torch_and_rounds_with_the_same_bits(
    cuda: torch.device, dtype: torch.dtype, residual: bool
) -> None:
    m, n, d, k = 300, 200, 70, 3
    p, q = pair(cuda, m, n, d, k)
    weights = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(cuda, dtype)
    s = torch.randn(d, d, generator=torch.Generator().manual_seed(1)).to(cuda)
    got, want = weights.clone(), weights.clone()
    kept = [torch.zeros(m, n, device=cuda) if residual else None for _ in range(2)]
    settings: dict[str, Any] = {"decay": 0.999, "key": 2**61 + 12345, "step": 7}
    ops.subspace_apply_(got, s, p.rows, q.rows, alpha=-1e-3, residual=kept[0], **settings)
    torch_sketch.subspace_apply(want, s, p.rows, q.rows, alpha=-1e-3, residual=kept[1], **settings)
    # sums may differ in their last bit, and then a rounding may fall the other way: one unit, and rarely
    assert (got != want).float().mean() < 0.01
    torch.testing.assert_close(got.float(), want.float(), atol=1e-6, rtol=2 * torch.finfo(dtype).eps)
    same = [weights.clone(), weights.clone()]
    ops.subspace_apply_(same[0], s, p.rows, q.rows, alpha=0.0, **settings)
    torch_sketch.subspace_apply(same[1], s, p.rows, q.rows, alpha=0.0, residual=None, **settings)
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize("state", ["cpu", "accelerator"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_bit_identical_from_run_to_run_and_lowers_the_loss(
    cuda: torch.device, precision: str, state: str
) -> None:
    block = {"subspace": {"projectors": "learned", "refit_interval": 4, "fit_steps": 10, "state_device": state}}
    first, second = (train(make_engine(ds_config(precision=precision, block=block)), 10, distinct=1) for _ in range(2))
    assert first == second and first[-1] < first[0]


def test_moments_lie_where_the_settings_say(cuda: torch.device) -> None:
    for state, kind in (("cpu", "cpu"), ("accelerator", cuda.type)):
        engine = make_engine(ds_config(block={"subspace": {"state_device": state}}))
        train(engine, 2)
        units = [unit for unit in engine.optimizer.pipeline.units if unit.wire == "subspace"]
        assert {t.device.type for unit in units for t in unit.state_tensors().values()} == {kind}
        assert ("subspace" in engine.meft_stats()["bytes"]) == (kind == "cpu")
