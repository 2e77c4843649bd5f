# SPDX-License-Identifier: Apache-2.0
"""The adapter and the engine on an accelerator, against the same oracles that judge them on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.sparse_adapter.oracle import dense_adapter, grid, make_adapter, random_adapter, rows_grad, small_config
from tests.toy import ADAPTER, batch, ds_config, make_engine, oracle_model, train


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("selection", ["host", "device"])
@pytest.mark.parametrize("union", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 37, 256])
def test_values_and_gradients_equal_the_dense_oracle(
    cuda: torch.device, tokens: int, union: bool, selection: str, gate: bool
) -> None:
    config = small_config(24, rows=130, experts=11, selection=selection, gate=gate)
    g = torch.Generator().manual_seed(tokens)
    rows, router = grid(config.rows, 48, generator=g), grid(config.experts, 24, generator=g)
    x, dy = grid(tokens, 24, generator=g), grid(tokens, 24, generator=g)
    mask = torch.rand(tokens, generator=g) < 0.8
    want = [t.clone().requires_grad_() for t in (x, rows, router)]
    y_want, _ = dense_adapter(*want, config, mask)
    y_want.backward(dy)

    adapter = make_adapter(config, rows, router, union=union).to(cuda)
    x_own = x.to(cuda).requires_grad_()
    y = adapter(x_own, mask.to(cuda))
    y.backward(dy.to(cuda))

    def close(got: torch.Tensor | None, expected: torch.Tensor | None) -> None:
        zero = torch.zeros(())
        got = zero if got is None else got.cpu()
        torch.testing.assert_close(got, zero if expected is None else expected, atol=1e-5, rtol=1e-5)

    close(y, y_want)
    close(x_own.grad, want[0].grad)
    close(rows_grad(adapter), want[1].grad)
    if gate:
        close(adapter.router.weight.grad, want[2].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_forms_agree(cuda: torch.device, dtype: torch.dtype) -> None:
    results = []
    for union in (False, True):
        adapter = random_adapter(small_config(), union=union).to(cuda, dtype)
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).to(cuda, dtype).requires_grad_()
        y = adapter(x)
        y.backward(torch.ones_like(y))
        assert y.dtype == dtype and rows_grad(adapter).dtype == torch.float32
        assert x.grad is not None and adapter.router.weight.grad is not None
        results.append((y.float(), x.grad.float(), adapter.router.weight.grad.float(), rows_grad(adapter)))
    for grouped, whole in zip(*results, strict=True):
        torch.testing.assert_close(grouped, whole, rtol=0.05, atol=0.03 * float(whole.detach().abs().max()))


@pytest.mark.parametrize("selection", ["host", "device"])
def test_twenty_engine_steps_equal_torch_adamw_on_the_dense_module(cuda: torch.device, selection: str) -> None:
    engine = make_engine(ds_config(block={"sparse_adapter": {**ADAPTER, "selection": selection}}))
    assert engine.device.type == cuda.type
    model, oracles = oracle_model(engine)
    model.to(cuda)
    for oracle in oracles:
        oracle.to(cuda)
        oracle.expert_of = oracle.expert_of.to(cuda)
    params = [p for oracle in oracles for p in oracle.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    expected = []
    for n in range(20):
        loss = model(**{k: t.to(cuda) for k, t in batch(100 + n % 4).items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    got = train(engine, 20, distinct=4)
    # Looser than on the CPU: atomics and cuBLAS reorder sums, and AdamW amplifies that in its first steps.
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("selection", ["host", "device"])
def test_same_seed_gives_bit_identical_losses(cuda: torch.device, selection: str) -> None:
    block = {"sparse_adapter": {**ADAPTER, "selection": selection}}
    first, second = (train(make_engine(ds_config(precision="bf16", block=block)), 10) for _ in range(2))
    assert first == second


def test_optimizer_state_stays_on_the_host_while_bytes_cross_both_ways(cuda: torch.device) -> None:
    engine = make_engine(ds_config(precision="bf16"))
    assert next(engine.module.parameters()).device.type == cuda.type
    train(engine, 3)
    stats = engine.meft_stats()
    assert stats["bytes_down_per_step"] > 0 and stats["bytes_up_per_step"] > 0
    host = [t for unit in engine.optimizer.pipeline.units for t in unit.state_tensors().values()]
    assert {t.device.type for t in host} == {"cpu"}
