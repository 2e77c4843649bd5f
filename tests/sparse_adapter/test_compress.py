# SPDX-License-Identifier: Apache-2.0
"""Compressed row gradients: against AdamW, against plain torch with a dense Q, and through an engine."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from meft_ds.offload.host.shared_memory import TensorSpec, allocate
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.ranks import Ranks
from meft_ds.ops.adam import AdamHyper
from meft_ds.ops.projector import Projector
from meft_ds.sparse_adapter.config import CompressConfig, ResolvedCompress
from meft_ds.sparse_adapter.rows import compression as compress_module
from meft_ds.sparse_adapter.rows.compression import RowCompression, view_bytes
from meft_ds.sparse_adapter.rows.host import HostRows
from meft_ds.sparse_adapter.unit import RowsUnit
from tests.forked import Forge
from tests.offload.arena_ranks import ranks_here

CPU = torch.device("cpu")
R, D = 40, 12
HALF = ResolvedCompress(dim=6, nonzeros=2, scale=math.sqrt(2))


def unit_of(
    compression: RowCompression | None,
    mode: str = "dense",
    dtype: torch.dtype = torch.float32,
    capacity: int = R,
    moments_dtype: torch.dtype = torch.float32,
) -> RowsUnit:
    master = torch.randn(R, 2 * D, generator=torch.Generator().manual_seed(0))
    replica = master if dtype == torch.float32 else master.to(dtype)
    return RowsUnit(
        name="layer0.rows",
        layer=0,
        rows=HostRows(master=master, replica=replica, capacity=capacity, bus=Bus(CPU), selection="host"),
        group=0,
        ranks=Ranks(),
        mode=mode,  # type: ignore[arg-type]
        moments_dtype=moments_dtype,
        grad_dtype=torch.float32,
        compression=compression,
    )


def hyper(window: int) -> AdamHyper:
    return AdamHyper(lr=0.02 / (1 + window), beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.3)


def window_of(unit: RowsUnit, window: int, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Give the unit a window's gradients, in `parts` micro-batches of the same rows; returns (ids, their sum)."""
    g = torch.Generator().manual_seed(window)
    ids = torch.randperm(R, generator=g)[: 5 + window % 9]
    grads = torch.randn(parts, len(ids), 2 * D, generator=g)
    for grad in grads:
        unit.rows.gather(ids)
        unit.rows.add_grad(ids, grad)
    return ids, grads.sum(0)


def finish(unit: RowsUnit, window: int, grad_scale: float = 0.5) -> None:
    unit.collect()
    unit.reduce(Ranks())
    unit.send(unit.rows._bus)
    unit.sq_norm()
    unit.host_step(hyper(window), step=window + 1, grad_scale=grad_scale)
    unit.fetch(unit.rows._bus, Ranks())
    unit.apply()


def identity(n: int) -> Projector:
    return Projector(torch.arange(n, dtype=torch.int16)[:, None], torch.ones(n, 1, dtype=torch.float16), n)


def dense_q(compression: RowCompression) -> Tensor:
    """[2 d, 2 d'] by the definition of a projector."""
    index, value = compression.rows
    return torch.zeros(index.shape[0], compression.width).scatter_(1, index.long(), value.float())


@pytest.fixture(params=[1 << 19, 14 * D], ids=["one-block", "blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(compress_module, "_BLOCK", request.param)
    return int(request.param)


@pytest.mark.parametrize("mode", ["dense", "lazy"])
@pytest.mark.parametrize("q", ["identity", "signed permutation"])
def test_a_q_that_loses_nothing_equals_adamw_of_the_uncompressed_adapter(
    ops_path: str, block: int, mode: str, q: str
) -> None:
    settings = ResolvedCompress(dim=D, nonzeros=1, scale=1.0)
    if q == "identity":
        compression = RowCompression(identity(2 * D), settings, CPU)
    else:  # AdamW does not care for signs and order
        compression = RowCompression.draw(settings, D, 0, 0, CPU)
        assert torch.equal(dense_q(compression).abs().sum(0), torch.ones(2 * D))
    plain, compressed = unit_of(None, mode), unit_of(compression, mode)
    for window in range(12):
        for unit in (plain, compressed):
            window_of(unit, window)
            finish(unit, window)
        torch.testing.assert_close(compressed.rows.master, plain.rows.master, atol=1e-6, rtol=1e-6)
    for key in ("row_steps", "row_decay") if mode == "lazy" else ():
        assert torch.equal(plain.state_tensors()[key], compressed.state_tensors()[key])
    assert plain.scalars() == compressed.scalars()


@pytest.mark.parametrize("moments_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_update_equals_the_equations_in_plain_torch(
    ops_path: str, block: int, mode: str, moments_dtype: torch.dtype
) -> None:
    compression = RowCompression.draw(HALF, D, 3, 1, CPU)
    unit = unit_of(compression, mode, torch.bfloat16, moments_dtype=moments_dtype)
    q = dense_q(compression)
    row, m, v = unit.rows.master.clone(), torch.zeros(R, 2 * HALF.dim), torch.zeros(R, 2 * HALF.dim)
    steps, slept = torch.zeros(R), torch.ones(R)
    for window in range(12):
        ids, g = window_of(unit, window, parts=2)
        h = hyper(window)
        if mode == "dense":
            moved = torch.arange(R)
        else:
            moved = ids
            row[ids] *= slept[ids, None]
            slept[ids] = 1.0
        s = torch.zeros(R, 2 * HALF.dim).index_copy_(0, ids, 0.5 * g @ q)[moved]
        steps[moved] += 1
        m[moved] = (0.9 * m[moved] + 0.1 * s).to(moments_dtype).float()
        v[moved] = (0.99 * v[moved] + 0.01 * s * s).to(moments_dtype).float()
        m_full, v_full = m[moved], v[moved]
        if moments_dtype == torch.float32:
            t = steps[moved, None]
            ds = (m_full / (1 - 0.9**t)) / ((v_full / (1 - 0.99**t)).sqrt() + h.eps)
            row[moved] = row[moved] * (1 - h.lr * h.weight_decay) - h.lr * HALF.scale * ds @ q.T
        finish(unit, window)
        if mode == "lazy":
            slept *= 1 - h.lr * h.weight_decay
            slept[ids] = 1.0
    state = unit.state_tensors()
    tolerance = {"atol": 2e-5, "rtol": 1e-4} if moments_dtype == torch.float32 else {"atol": 2e-3, "rtol": 2e-2}
    torch.testing.assert_close(state["exp_avg"].float(), m, **tolerance)
    torch.testing.assert_close(state["exp_avg_sq"].float(), v, **tolerance)
    if moments_dtype == torch.float32:
        torch.testing.assert_close(unit.rows.master, row, **tolerance)
    assert torch.equal(unit.rows.replica, unit.rows.master.to(torch.bfloat16))


def test_compression_and_expansion_are_adjoint_and_keep_the_halves_apart(ops_path: str) -> None:
    compression = RowCompression.draw(ResolvedCompress(dim=25, nonzeros=3, scale=1.0), 70, 0, 0, CPU)
    g = torch.Generator().manual_seed(1)
    rows, s = torch.randn(9, 140, generator=g), torch.randn(9, 50, generator=g)
    expanded = torch.zeros(9, 140)
    compression.add_expanded_(expanded, s, torch.arange(9), alpha=1.0, decay=1.0)
    assert torch.sum(compression.compress(rows) * s).item() == pytest.approx(torch.sum(rows * expanded).item(), 1e-4)
    torch.testing.assert_close(compression.compress(rows), rows @ dense_q(compression), atol=1e-5, rtol=1e-5)
    rows[:, 70:] = 0  # keys only
    assert not compression.compress(rows)[:, 25:].any() and compression.compress(rows)[:, :25].any()


def test_q_is_a_function_of_seed_layer_and_half_with_columns_of_length_one() -> None:
    def q(seed: int, layer: int) -> Tensor:
        return dense_q(RowCompression.draw(HALF, D, seed, layer, CPU))

    before = torch.get_rng_state()
    assert torch.equal(q(1, 2), q(1, 2)) and torch.equal(torch.get_rng_state(), before)
    keys, values = q(1, 2)[:D, : HALF.dim], q(1, 2)[D:, HALF.dim :]
    assert not torch.equal(keys, values) and not torch.equal(q(1, 2), q(1, 3)) and not torch.equal(q(1, 2), q(2, 2))
    torch.testing.assert_close(q(1, 2).norm(dim=0), torch.ones(2 * HALF.dim), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_scale_adam_moves_a_row_by_as_much_as_adam_does(dim: int) -> None:
    d = 256
    settings = CompressConfig(dim=dim).resolve(d)
    assert settings.scale == math.sqrt(d / dim)
    compression = RowCompression.draw(settings, d, 0, 0, CPU)
    s = torch.randn(50, 2 * dim, generator=torch.Generator().manual_seed(0)).sign()  # Adam's first step
    moved = torch.zeros(50, 2 * d)
    compression.add_expanded_(moved, s, torch.arange(50), alpha=settings.scale, decay=1.0)
    assert moved.square().mean().sqrt().item() == pytest.approx(1.0, rel=0.02)


def test_what_goes_down_is_kept_until_the_lane_is_done_with_it_and_no_longer() -> None:
    """The device may reuse its memory as soon as nobody holds it, and a copy may still be under way."""
    unit = unit_of(RowCompression.draw(HALF, D, 0, 0, CPU))
    window_of(unit, 0)
    unit.collect()
    payload = weakref.ref(unit._payload)
    unit.reduce(Ranks())
    unit.send(unit.rows._bus)
    assert payload() is not None
    unit.sq_norm()  # follows the end of the lane's job
    assert payload() is None


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_memory_and_bytes_down_shrink_by_d_over_d_prime_and_bytes_up_stay(mode: str) -> None:
    compression = RowCompression.draw(HALF, D, 0, 0, CPU)
    plain, compressed = unit_of(None, mode), unit_of(compression, mode)
    assert compressed.footprint().payload * 2 == plain.footprint().payload
    assert compressed.footprint().down * 2 == plain.footprint().down
    assert compressed.footprint().up == plain.footprint().up
    assert compressed.footprint().host_shared == plain.footprint().host_shared
    row_view, column_view = view_bytes(HALF, D)
    assert row_view == sum(t.numel() * t.element_size() for t in compression.rows)
    assert column_view == compression.device_bytes()
    saved = R * D * 4 * 3  # half of two moments and of the payload, 2 d values each
    block = sum(t.numel() * 4 for t in (compressed.adam._minus_ds, compressed.adam._active))  # type: ignore[attr-defined]
    assert plain.footprint().host_private - compressed.footprint().host_private == saved - row_view - block
    for unit in (plain, compressed):
        moments = [t for name, t in unit.state_tensors().items() if "exp_avg" in name]
        assert all(t.shape == (R, 2 * (HALF.dim if unit is compressed else D)) for t in moments)
        window_of(unit, 0)
        unit.collect()
        unit.send(unit.rows._bus)
    u = len(window_of(unit_of(None), 0)[0])
    moved = [unit.rows._bus.window.by_channel()["rows"] for unit in (plain, compressed)]
    assert moved == [{"up": 2 * D * u * 4, "down": 2 * width * u * 4} for width in (D, HALF.dim)]


@pytest.mark.parametrize(("d", "dim", "k"), [(16, 8, 4), (100, 33, 4), (70, 7, 7), (64, 63, 5)])
def test_planned_bytes_of_q_are_those_it_takes(d: int, dim: int, k: int) -> None:
    settings = ResolvedCompress(dim=dim, nonzeros=k, scale=1.0)
    compression = RowCompression.draw(settings, d, 0, 0, CPU)
    rows = sum(t.numel() * t.element_size() for t in compression.rows)
    assert view_bytes(settings, d) == (rows, compression.device_bytes())


class Largest(TorchDispatchMode):
    """The largest storage that an operation made, in values."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known, self.values = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, list | tuple) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.values = max(self.values, t.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_no_temporary_of_an_update_is_larger_than_a_block(
    ops_path: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_module, "_BLOCK", 8 * D)
    unit = unit_of(RowCompression.draw(HALF, D, 0, 0, CPU), mode)
    ids = torch.arange(R)
    unit.rows.gather(ids)
    unit.rows.add_grad(ids, torch.ones(R, 2 * D))
    unit.collect()
    unit.send(unit.rows._bus)
    payload = unit._payload
    assert payload is not None
    state = [*unit.state_tensors().values(), payload, ids, unit._ids]
    with Largest([t for t in state if t is not None]) as largest:
        unit.host_step(hyper(0), step=1, grad_scale=1.0)
    assert 0 < largest.values <= 8 * D < R * 2 * HALF.dim


@pytest.mark.parametrize("capacity", [R, 14], ids=["roomy", "spilling"])
def test_micro_batches_of_a_window_and_late_gradients_add_up(capacity: int) -> None:
    compression = RowCompression.draw(HALF, D, 0, 0, CPU)
    whole, parts = unit_of(compression), unit_of(compression, capacity=capacity)
    g = torch.Generator().manual_seed(0)
    sums = torch.zeros(R, 2 * D)
    tables = [torch.randperm(R, generator=g)[:9] for _ in range(4)]
    for n, table in enumerate(tables):
        grad = torch.randn(9, 2 * D, generator=g)
        sums[table] += grad
        parts.rows.gather(table)
        parts.rows.add_grad(table, grad)
        if n == 2:
            parts.collect()  # more gradients come afterwards, and it is collected again
            parts.send(parts.rows._bus)
    ids = torch.unique(torch.cat(tables))
    whole.rows.gather(ids)
    whole.rows.add_grad(ids, sums[ids])
    assert (parts.rows.spills > 0) == (capacity < R)
    for unit in (whole, parts):
        finish(unit, 0)
    torch.testing.assert_close(parts.rows.master, whole.rows.master, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("planted", [float("inf"), float("nan")])
@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_one_non_finite_value_anywhere_in_a_row_shows_in_the_norm_and_a_discarded_window_changes_nothing(
    mode: str, planted: float
) -> None:
    unit = unit_of(RowCompression.draw(HALF, D, 0, 0, CPU), mode)
    window_of(unit, 0)
    finish(unit, 0)
    before = {name: t.clone() for name, t in unit.state_tensors().items()} | {"replica": unit.rows.replica.clone()}
    scalars, version = unit.scalars(), unit.rows.version
    for column in range(2 * D):
        ids, _ = window_of(unit, 1)
        bad = torch.zeros(1, 2 * D)
        bad[0, column] = planted
        unit.rows.add_grad(ids[:1], bad)
        unit.collect()
        unit.send(unit.rows._bus)
        assert not math.isfinite(unit.sq_norm())
        unit.discard()
    after = {**unit.state_tensors(), "replica": unit.rows.replica}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (unit.scalars(), unit.rows.version) == (scalars, version)


def test_a_window_without_active_rows_still_moves_rows_in_dense_mode_and_none_in_lazy_mode() -> None:
    for mode in ("dense", "lazy"):
        unit = unit_of(RowCompression.draw(HALF, D, 0, 0, CPU), mode)
        window_of(unit, 0)
        finish(unit, 0)
        before = unit.rows.master.clone()
        finish(unit, 1)
        assert torch.equal(before, unit.rows.master) == (mode == "lazy")


def trained(mode: str, ranks: Ranks, mine: Iterable[int]) -> Tensor:
    """Rows after 20 windows, in each of which these ranks' parts have gradients."""
    r, bus = 41, Bus(CPU)
    master = allocate({"m": TensorSpec((r, 2 * D), torch.float32)}, ranks)["m"]
    if ranks.rank == 0:
        master.copy_(torch.randn(r, 2 * D, generator=torch.Generator().manual_seed(0)))
    ranks.barrier()
    rows = HostRows(master=master, replica=master, capacity=r, bus=bus, selection="host")
    unit = RowsUnit(
        name="u",
        layer=0,
        rows=rows,
        group=0,
        ranks=ranks,
        mode=mode,
        moments_dtype=torch.float32,
        grad_dtype=torch.float32,
        compression=RowCompression.draw(ResolvedCompress(dim=5, nonzeros=2, scale=1.5), D, 7, 0, CPU),
    )
    for window in range(20):
        for rank in mine:
            g = torch.Generator().manual_seed(100 * window + rank)
            ids = torch.randperm(r, generator=g)[: 3 + 2 * rank]
            rows.gather(ids)
            rows.add_grad(ids, torch.randn(len(ids), 2 * D, generator=g))
        unit.collect()
        unit.reduce(ranks)
        unit.send(bus)
        unit.sq_norm()
        hyper = AdamHyper(lr=0.02, beta1=0.9, beta2=0.99, eps=1e-4, weight_decay=0.1)
        unit.host_step(hyper, step=window + 1, grad_scale=1.0)
        unit.fetch(bus, ranks)
        unit.apply()
    ranks.barrier()
    assert unit.state_tensors()["exp_avg"].shape[0] <= r // ranks.world + 1
    return master.clone()


def two_as_one(folder: Path) -> list[list[float]]:
    """On each rank: training together repeats its bits and equals training alone; returns the rows, by mode."""
    together, found = ranks_here(), []
    for mode in ("dense", "lazy"):
        two, again = (trained(mode, together, [together.rank]) for _ in range(2))
        assert torch.equal(two, again), "from run to run"
        torch.testing.assert_close(two, trained(mode, Ranks(), range(together.world)), atol=1e-5, rtol=1e-5)
        found.append(two.flatten().tolist())
    return found


def test_two_ranks_equal_one_rank_and_repeat_bit_for_bit(forge: Forge, tmp_path: Path) -> None:
    first, second = forge.results(two_as_one, tmp_path)
    assert first == second and first[0] != first[1]
