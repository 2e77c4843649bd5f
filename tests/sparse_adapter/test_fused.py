# SPDX-License-Identifier: Apache-2.0
"""The fused CPU form with rows in a host store: lent in place, copied, or in several banks, the numbers are equal."""

from __future__ import annotations

import pytest
import torch

from meft_ds import ops
from meft_ds.offload.host.transfer import Bus
from meft_ds.sparse_adapter import layer
from meft_ds.sparse_adapter.layer import SparseAdapter
from meft_ds.sparse_adapter.rows.host import HostRows
from tests.sparse_adapter.oracle import random_adapter, rows_grad, small_config

D, R = 24, 90


def _host_adapter(like: SparseAdapter, capacity: int, selection: str) -> SparseAdapter:
    master = like.rows.master.clone()
    rows = HostRows(
        master=master,
        replica=master,
        capacity=capacity,
        bus=Bus(torch.device("cpu")),
        selection=selection,  # type: ignore[arg-type]
    )
    return SparseAdapter(like.config, like.router.weight.detach().clone(), rows)


@pytest.mark.parametrize("selection", ["host", "device"])
@pytest.mark.parametrize("capacity", [R, 40, 7])
def test_host_store_gives_what_device_rows_give(selection: str, capacity: int) -> None:
    config = small_config(D, rows=R, experts=11, selection=selection)
    plain = random_adapter(config)
    hosted = _host_adapter(plain, capacity, selection)
    for seed in range(3):  # several micro-batches of one window
        x = torch.randn(33, D, generator=torch.Generator().manual_seed(seed))
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [adapter(given) for adapter, given in zip((plain, hosted), inputs, strict=True)]
        for y in outputs:
            y.square().sum().backward()
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(plain.router.weight.grad, hosted.router.weight.grad, rtol=1e-4, atol=1e-2)
    rows = hosted.rows
    assert isinstance(rows, HostRows)
    ids, grads = rows.close_window()
    want = rows_grad(plain)
    torch.testing.assert_close(grads, want[ids], rtol=1e-4, atol=1e-2)
    assert torch.equal(ids, want.abs().sum(1).nonzero().view(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_and_grouped_forms_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.backend() != "cpp":
        pytest.skip("the C++ kernels cannot be built here")
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(layer, "can_fuse", lambda x: False)
        adapter = random_adapter(small_config(D, rows=R, experts=11)).to(dtype)
        x = torch.randn(40, D, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        tokens = torch.arange(40) % 5 != 0
        y = adapter(x, tokens)
        y.backward(torch.ones_like(y))
        results.append((y.float(), x.grad.float(), adapter.router.weight.grad.float(), rows_grad(adapter)))
    for one, other in zip(*results, strict=True):
        slack = 1e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(one, other, rtol=2 * slack, atol=slack * float(other.detach().abs().max()))
