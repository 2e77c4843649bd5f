# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of both compute forms against the dense oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meft_ds.sparse_adapter.forward import grouping
from tests.sparse_adapter.oracle import dense_adapter, grid, make_adapter, random_adapter, rows_grad, small_config

pytestmark = pytest.mark.usefixtures("ops_path")


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    rows = draw(st.integers(1, 60))
    experts = draw(st.integers(1, rows))
    scope = draw(st.sampled_from(["token", "token", "batch"]))
    return {
        "rows": rows,
        "experts": experts,
        "experts_per_token": draw(st.integers(1, experts)),
        "keys_per_token": draw(st.integers(1, rows)),
        "gate": draw(st.booleans()),
        "scope": scope,
        "union": draw(st.booleans()),
        "selection": draw(st.sampled_from(["host", "device"])),
        "d": draw(st.integers(1, 12)),
        "T": draw(st.integers(0, 40)),
        "padding": draw(st.sampled_from(["none", "some", "all"])),
        "capacity": draw(st.one_of(st.none(), st.integers(1, rows))),
        "chunked": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


@given(case=cases())
def test_values_and_gradients_equal_the_dense_oracle(case: dict) -> None:
    case = dict(case)
    d, T, padding, capacity, chunked, seed, union = (
        case.pop(name) for name in ("d", "T", "padding", "capacity", "chunked", "seed", "union")
    )
    config = small_config(d, **case)
    g = torch.Generator().manual_seed(seed)
    rows, router, x = (
        grid(config.rows, 2 * d, generator=g),
        grid(config.experts, d, generator=g),
        grid(T, d, generator=g),
    )
    tokens = None
    if padding != "none":
        tokens = torch.rand(T, generator=g) < (0.6 if padding == "some" else 0.0)
    dy = grid(T, d, generator=g)

    want = [t.clone().requires_grad_() for t in (x, rows, router)]
    y_want, _ = dense_adapter(*want, config, tokens)
    y_want.backward(dy)

    adapter = make_adapter(config, rows, router, capacity, union=union)
    x_own = x.clone().requires_grad_()
    limits = (grouping._CHUNK_BYTES, grouping._CPU_BLOCK_BYTES)
    if chunked:  # several chunks of tokens, several blocks of tiles
        grouping._CHUNK_BYTES, grouping._CPU_BLOCK_BYTES = 4 * d * 20, 4 * d * 16
    try:
        y = adapter(x_own, tokens)
        y.backward(dy)
    finally:
        grouping._CHUNK_BYTES, grouping._CPU_BLOCK_BYTES = limits

    def close(got: torch.Tensor | None, expected: torch.Tensor | None) -> None:
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if got is None else got, zero if expected is None else expected, atol=1e-5, rtol=1e-5
        )

    close(y, y_want)
    close(x_own.grad, want[0].grad)
    close(rows_grad(adapter), want[1].grad)
    if config.gate:
        close(adapter.router.weight.grad, want[2].grad)
    else:
        assert adapter.router.weight.grad is None


@pytest.mark.parametrize("union", [False, True])
def test_rows_get_gradients_when_neither_input_nor_router_needs_one(union: bool) -> None:
    config = small_config(gate=False)
    adapter = random_adapter(config, union=union)
    x = torch.randn(7, config.d)
    adapter(x).sum().backward()
    want = adapter.rows.master.clone().requires_grad_()
    dense_adapter(x, want, adapter.router.weight.detach(), config)[0].sum().backward()
    torch.testing.assert_close(rows_grad(adapter), want.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("union", [False, True])
def test_rows_that_change_between_forward_and_backward_are_an_error(union: bool) -> None:
    adapter = random_adapter(small_config(), union=union)
    y = adapter(torch.randn(5, 16))
    adapter.rows.version += 1  # type: ignore[misc]
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        y.sum().backward()


@pytest.mark.parametrize("union", [False, True])
def test_rows_that_do_not_train_get_no_gradient_but_their_input_does(union: bool) -> None:
    adapter = random_adapter(small_config(), union=union)
    adapter.rows.trainable = False  # type: ignore[misc]
    x = torch.randn(5, 16, requires_grad=True)
    adapter(x).sum().backward()
    assert adapter.rows.grad is None and x.grad is not None and len(adapter._replay) == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("union", [False, True])
def test_eval_mode_trains_as_train_mode_does(union: bool) -> None:
    grads = []
    for training in (True, False):
        adapter = random_adapter(small_config(), union=union).train(training)
        adapter(torch.randn(5, 16, generator=torch.Generator().manual_seed(3))).sum().backward()
        grads.append(adapter.rows.grad)  # type: ignore[attr-defined]
    assert grads[1].any() and torch.equal(grads[0], grads[1])


def test_training_forward_is_recorded_once() -> None:
    adapter = random_adapter(small_config())
    seen: list[tuple] = []
    adapter.rows.record = lambda *args: seen.append(args)  # type: ignore[method-assign]
    x = torch.randn(5, 16)
    adapter(x)
    _, selected = dense_adapter(x, adapter.rows.master, adapter.router.weight.detach(), adapter.config)
    ((union_rows, tokens, load),) = seen
    assert (union_rows, tokens) == (int(selected.any(0).sum()), 5)
    assert load.shape == (8,) and load.sum() <= 5 * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_forms_agree_and_accumulate_rows_in_fp32(dtype: torch.dtype) -> None:
    results = []
    for union in (False, True):
        adapter = random_adapter(small_config(), union=union).to(dtype)
        torch.manual_seed(0)
        x = torch.randn(64, 16).to(dtype).requires_grad_()
        y = adapter(x)
        y.backward(torch.ones_like(y))
        assert y.dtype == dtype and rows_grad(adapter).dtype == torch.float32
        results.append((y.float(), x.grad.float(), adapter.router.weight.grad.float(), rows_grad(adapter)))
    for grouped, whole in zip(*results, strict=True):
        torch.testing.assert_close(grouped, whole, rtol=0.05, atol=0.03 * float(whole.detach().abs().max()))


def test_fp16_gates_do_not_overflow() -> None:
    config = small_config()
    rows = torch.full((config.rows, 32), 0.01)
    adapter = make_adapter(config, rows, torch.full((8, 16), 30.0)).half()
    y = adapter(torch.full((3, 16), 200.0).half())  # router logits of 96,000 are beyond fp16
    assert y.isfinite().sum() == 0 or y.isfinite().all()
    assert adapter.router(torch.full((3, 16), 200.0).half()).isfinite().all()


def test_balance_gradient_is_the_gradient_of_the_switch_loss() -> None:
    config = small_config(balance_loss=0.1)
    adapter, plain = random_adapter(config), random_adapter(small_config())
    adapter.aux_scale = 3.0
    x, tokens = torch.randn(20, 16), torch.arange(20) < 15
    for module in (adapter, plain):
        module(x, tokens).sum().backward()
    weight = plain.router.weight.detach().clone().requires_grad_()
    p = (x @ weight.t())[tokens]
    share = torch.zeros(8).index_add_(0, p.topk(3).indices.view(-1), torch.ones(45)) / 45
    (0.1 * 3.0 * 8 * (share * p.softmax(1).mean(0)).sum()).backward()
    torch.testing.assert_close(adapter.router.weight.grad - plain.router.weight.grad, weight.grad, atol=1e-4, rtol=1e-4)
    assert weight.grad.abs().max() > 1e-2


def test_results_are_bit_identical_from_run_to_run() -> None:
    runs = []
    for _ in range(2):
        adapter = random_adapter(small_config(d=64, rows=300, experts=40), capacity=100)
        x = torch.randn(200, 64, generator=torch.Generator().manual_seed(5)).requires_grad_()
        y = adapter(x)
        y.square().sum().backward()
        runs.append((y, x.grad, rows_grad(adapter), adapter.router.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
