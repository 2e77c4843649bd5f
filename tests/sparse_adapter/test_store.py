# SPDX-License-Identifier: Apache-2.0
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.ranks import Ranks
from meft_ds.ops.adam import AdamHyper
from meft_ds.sparse_adapter.rows.host import HostRows, store_specs
from meft_ds.sparse_adapter.unit import RowsUnit

R, D = 40, 3
HYPER = AdamHyper(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01)


def make(capacity: int = R, selection: str = "host", dtype: torch.dtype = torch.float32) -> tuple[HostRows, Bus]:
    master = torch.randn(R, 2 * D, generator=torch.Generator().manual_seed(0))
    replica = master if dtype == torch.float32 else master.to(dtype)
    bus = Bus(torch.device("cpu"))
    return HostRows(master=master, replica=replica, capacity=capacity, bus=bus, selection=selection), bus


def make_unit(rows: HostRows, mode: str = "dense") -> RowsUnit:
    return RowsUnit(
        name="layer0.rows",
        layer=0,
        rows=rows,
        group=0,
        ranks=Ranks(),
        mode=mode,
        moments_dtype=torch.float32,
        grad_dtype=rows.dtype,
    )


tables = st.lists(st.lists(st.integers(0, R - 1), unique=True, max_size=12), min_size=1, max_size=6)


@given(
    requests=tables, capacity=st.integers(12, R), selection=st.sampled_from(["host", "device"]), seed=st.integers(0, 99)
)
def test_gradients_of_a_window_equal_a_dense_sum_even_when_the_cache_spills(
    requests: list[list[int]], capacity: int, selection: str, seed: int
) -> None:
    rows, _ = make(capacity, selection)
    g = torch.Generator().manual_seed(seed)
    dense = torch.zeros(R, 2 * D)
    for request in requests:
        ids = torch.tensor(request, dtype=torch.int64)
        table = torch.full((len(request) + 3,), -1, dtype=torch.int64)
        table[torch.randperm(len(table), generator=g)[: len(request)]] = ids
        fetched = rows.gather(table)
        assert torch.equal(fetched[table >= 0], rows.master[table[table >= 0]])
        assert not fetched[table < 0].any()
        grad = torch.randn(len(table), 2 * D, generator=g)
        rows.add_grad(table, grad)
        dense[table[table >= 0]] += grad[table >= 0]
    ids, grads = rows.close_window()
    assert ids.tolist() == sorted({i for request in requests for i in request})
    assert torch.allclose(grads, dense[ids], atol=1e-6)
    touched = len({i for request in requests for i in request})
    assert rows.spills > 0 or touched <= capacity


def test_rows_are_fetched_once_per_window_and_counted_exactly() -> None:
    rows, bus = make(dtype=torch.bfloat16)
    unit = make_unit(rows)
    for _ in range(4):  # four micro-batches of one window
        for table in (torch.tensor([1, 5, -1]), torch.tensor([5, 7])):
            rows.gather(table)
            rows.add_grad(table, torch.ones(len(table), 2 * D))
    unit.collect()
    unit.send(bus)
    counts = bus.close_window().by_channel()
    u_win, nbytes = 3, 2
    assert counts["rows"] == {"up": 2 * D * u_win * nbytes, "down": 2 * D * u_win * nbytes}


def test_rows_that_only_evaluation_fetched_are_not_active() -> None:
    rows, bus = make()
    rows.is_training = lambda: False
    rows.gather(torch.tensor([2, 3]))
    rows.is_training = lambda: True
    rows.gather(torch.tensor([3, 4]))
    rows.add_grad(torch.tensor([3, 4]), torch.ones(2, 2 * D))
    assert rows.close_window()[0].tolist() == [3, 4]
    counts = bus.close_window().by_channel()
    assert counts["eval_rows"]["up"] == 2 * 2 * D * 4 and counts["rows"]["up"] == 1 * 2 * D * 4


def test_evaluations_that_overflow_the_cache_leave_nothing_behind() -> None:
    rows, _ = make(capacity=12)
    rows.is_training = lambda: False
    for start in (0, 12, 24):
        rows.gather(torch.arange(start, start + 12))
    assert rows.spills == 0 and not rows._spilled
    assert rows.close_window()[0].numel() == 0


@pytest.mark.parametrize("mode", ["dense", "lazy"])
@pytest.mark.parametrize("selection", ["host", "device"])
def test_next_window_sees_the_updated_rows(mode: str, selection: str) -> None:
    rows, bus = make(selection=selection, dtype=torch.bfloat16)
    unit = make_unit(rows, mode)
    assert torch.equal(rows.keys_for_selection().float(), rows.replica[:, :D].float())
    table = torch.tensor([0, 9, 30])
    before = rows.gather(table).clone()
    rows.add_grad(table, torch.ones(3, 2 * D))
    unit.collect()
    unit.reduce(Ranks())
    unit.send(bus)
    unit.host_step(HYPER, step=1, grad_scale=1.0)
    unit.fetch(bus, Ranks())
    unit.apply()
    after = rows.gather(table)
    assert rows.version == 1 and not torch.equal(before, after)
    assert torch.equal(after, rows.master[table].to(torch.bfloat16))
    assert torch.equal(rows.keys_for_selection(), rows.master[:, :D].to(torch.bfloat16))


def test_a_replica_is_page_locked_only_where_keys_go_up_from_it() -> None:
    def locked(device: str, selection: Literal["host", "device"]) -> bool:
        specs = store_specs("layer0", 8, D, torch.bfloat16, device=torch.device(device), selection=selection)
        return specs["layer0.replica"].pinned

    assert [locked("cuda", "host"), locked("cuda", "device"), locked("cpu", "device")] == [False, True, False]


def test_a_discarded_window_leaves_store_moments_and_version_untouched_bit_for_bit() -> None:
    rows, bus = make()
    unit = make_unit(rows, "lazy")
    before = {k: t.clone() for k, t in unit.state_tensors().items()}
    table = torch.tensor([0, 9])
    rows.gather(table)
    rows.add_grad(table, torch.full((2, 2 * D), float("inf")))
    unit.collect()
    unit.send(bus)
    assert unit.sq_norm() == float("inf")
    unit.discard()
    assert rows.version == 0
    assert all(torch.equal(before[k], t) for k, t in unit.state_tensors().items())
    rows.gather(table)
    rows.add_grad(table, torch.ones(2, 2 * D))
    assert torch.equal(rows.close_window()[1], torch.ones(2, 2 * D)), "nothing of the discarded window may remain"


def test_device_memory_is_bounded_by_the_cache_and_does_not_grow_with_r() -> None:
    held = []
    for r in (1024, 16384):
        master = torch.zeros(r, 2 * D)
        rows = HostRows(master=master, replica=master, capacity=512, bus=Bus(torch.device("cpu")), selection="host")
        for start in range(0, 1024, 128):
            table = torch.arange(start, start + 128)
            rows.gather(table)
            rows.add_grad(table, torch.ones(128, 2 * D))
        held.append(rows.device_bytes())
    assert held[0] == held[1] == 2 * (512 + 1) * 2 * D * 4
