# SPDX-License-Identifier: Apache-2.0
"""One layer of each method on the clock against a roofline by hand: LLaMA's 1.3B shape, 2,048 tokens, an RTX 4090.

The formulas know the model and the methods, not the emulation. Python is left out on both sides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.models import SHAPES
from tests.emulated_accelerator.profiles import Profile
from tests.forked import Forge

P, SHAPE, T = Profile.load("rtx4090"), SHAPES["1.3b"], 2048
D, F = SHAPE.hidden, SHAPE.ffn
MATRICES = [(D, D)] * 4 + [(F, D)] * 2 + [(D, F)]  # [out, in] of q, k, v, o, gate, up, down
INPUTS = [D, D, D, F]  # that q, k, v share; of o; that gate and up share; of down
NEAR = 0.15

ONE_PRODUCT = sum(P.matmul(T, out, n) for out, n in MATRICES)  # f, dX or dW of all seven matrices
ONE_OF_ATTENTION = P.matmul(T, T, D) / 2  # a product of queries and keys; a half is masked
# Bytes of what is done element by element in a forward. For a value of the hidden size: two norms (36 each: casts to
# fp32 and back, a square, a mean, two products), rotary embeddings of q and k (20 each), two sums (6 each). For one of
# the FFN's: an activation and a product. A backward moves twice that.
FORWARD_BYTES = T * D * (2 * 36 + 2 * 20 + 2 * 6) + T * F * 10
ELEMENTWISE = FORWARD_BYTES / P.bytes_per_s
FIXED = 40 * P.kernel_s  # of the forward's small kernels; twice that in a backward


def forward() -> float:
    """A layer's forward."""
    return ONE_PRODUCT + 2 * ONE_OF_ATTENTION + ELEMENTWISE + FIXED


def backward(products: int) -> float:
    """A layer's backward, with (2) or without (1) gradients of weights."""
    return products * ONE_PRODUCT + 5 * ONE_OF_ATTENTION + 2 * ELEMENTWISE + 2 * FIXED


def test_native(emulated_forge: Forge, tmp_path: Path) -> None:
    """Nothing waits: f, dX, dW, and AdamW of 28 bytes for a parameter."""
    found = layer(emulated_forge, tmp_path, "native")
    assert found["kernels_s"] == pytest.approx(native(), rel=NEAR)


def native() -> float:
    return forward() + backward(2) + 28 * SHAPE.layer_parameters / P.bytes_per_s


def test_tiles(emulated_forge: Forge, tmp_path: Path) -> None:
    """No gradients of weights but of 1 % of their values, which stay on the device."""
    found = layer(emulated_forge, tmp_path, "tiles")
    by_hand = forward() + backward(1) + 0.01 * ONE_PRODUCT
    assert found["kernels_s"] == pytest.approx(by_hand, rel=NEAR)


def test_subspace(emulated_forge: Forge, tmp_path: Path) -> None:
    """Sketches of inputs and output gradients, S of them, and an update of all weights, at d = n / 2 and k = 4.

    Sketches and update gather single elements, each a 32-byte sector of the cache.
    """
    found = layer(emulated_forge, tmp_path, "subspace")
    d, k, sector = D // 2, 4, 32
    sides = sum(INPUTS) + sum(out for out, _ in MATRICES)
    sketches = T * sides * k * sector / P.cache_bytes_per_s
    products = len(MATRICES) * (P.matmul(d, d, T) + 10 * d * d / P.bytes_per_s)
    update = sum(out * n for out, n in MATRICES) * k * sector / P.cache_bytes_per_s
    combined = sum(4 * out * d for out, _ in MATRICES) / P.bytes_per_s
    by_hand = forward() + backward(1) + sketches + products + update + combined
    assert found["kernels_s"] == pytest.approx(by_hand, rel=NEAR)


def test_adapter(emulated_forge: Forge, tmp_path: Path) -> None:
    """A forward that waits for the host, and for the host's update of all rows; a backward that adds gradients to rows.

    r = 2 d rows of 2 d values, 8 experts of 16 rows for a token.
    """
    found = layer(emulated_forge, tmp_path, "adapter")
    assert found["kernels_s"] == pytest.approx(adapter()[0], rel=NEAR)


def adapter() -> tuple[float, float]:
    """Seconds of the device's work, and of a step."""
    rows, experts, per_expert = 2 * D * 2 * D, 8, 16
    pairs = T * experts
    up = 2 * rows / P.pcie["pinned_up"] + 2 * T * D / P.pcie["pinned_down"] + 10 * P.pcie["latency_us"] * 1e-6
    on_host = 2 * pairs * per_expert * D / P.host_flops + 2 * 2 * rows / P.host_bytes_per_s
    # bytes: rows gathered and split; inputs of the pairs gathered, read and written as outputs, which are summed
    in_forward = (4 * 2 * rows + 6 * 2 * pairs * D) / P.bytes_per_s
    # the same rows again, their gradients made, added and sent in fp32; two inputs and one output of the pairs
    in_backward = (4 * 2 * rows + 7 * 4 * rows + 10 * 2 * pairs * D) / P.bytes_per_s
    update = 28 * rows / P.host_bytes_per_s
    step = max(forward() + in_forward + up + on_host, update) + backward(1) + in_backward
    return forward() + backward(1) + in_forward + in_backward, step


@pytest.mark.long
@pytest.mark.parametrize(("method", "seconds"), [("native", native()), ("adapter", adapter()[1])])
def test_steps(method: str, seconds: float, emulated_forge: Forge, tmp_path: Path) -> None:
    """On a quiet machine: threads pay for the time that they take, and other programs make that longer."""
    found = layer(emulated_forge, tmp_path, method)
    assert found["s_per_step"] == pytest.approx(seconds, rel=NEAR)
    assert found["syncs"] == pytest.approx(10 if method == "adapter" else 0, abs=0.7)  # the step's own vary by one


def layer(forge: Forge, folder: Path, method: str) -> dict[str, float]:
    """What a third layer adds to two, whose first holds the embeddings and whose last the head."""
    cells = [cell(forge, folder, method, layers) for layers in (2, 3)]
    return {key: cells[1][key] - cells[0][key] for key in ("s_per_step", "kernels_s", "syncs")}


def cell(forge: Forge, folder: Path, method: str, layers: int) -> Any:
    call = "tests.emulated_accelerator.clock_checks:cell"
    return forge.results(call, folder, world=1, method=method, layers=layers, tokens=T)[0]


pytestmark = pytest.mark.slow
