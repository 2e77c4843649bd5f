# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_traffic.py do: count what a step's collectives are given, by kind, beside the formulas."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from tests.toy import ADAPTER, HIDDEN, batch, ds_config, make_engine, tiny_llama

BLOCKS: dict[str, dict[str, Any]] = {
    "sparse_adapter": {"sparse_adapter": dict(ADAPTER), "train": ["norm"]},
    "subspace": {"subspace": {"nonzeros": 2, "projectors": "random"}},
    "sparse_matrix": {"sparse_matrix": {"density": 0.1, "block_size": 8, "score": "magnitude"}, "train": ["norm"]},
}


def traffic(folder: Path) -> dict[str, Any]:
    return {"methods": {name: of(block) for name, block in BLOCKS.items()}, "planted": planted()}


def of(block: dict[str, Any]) -> dict[str, Any]:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    engine = make_engine(ds_config(block=block, micro=4 // world), tiny_llama())
    for step in range(2):
        with counting() as counts:
            step_of(engine, step, slice(rank * (4 // world), (rank + 1) * (4 // world)))
    flat = [unit for unit in engine.optimizer.pipeline.units if unit.wire != "rows"]
    rows = sum(engine.meft_stats().get("sparse_adapter", {}).get("active_rows", []))
    expected = {
        # the payload's float32 sum, and the updated slice padded to the longest
        "all_reduce": sum(4 * unit.numel for unit in flat),
        "all_gather": sum(4 * -(-unit.numel // world) for unit in flat),
        # ids and gradients of the rows that this rank's batch activated, and how many go to each rank
        "all_to_all_single": rows * (8 + 4 * 2 * HIDDEN)
        + (8 * world * len(engine._meft_methods[0].adapters) if rows else 0),
    }
    dense = sum(p.numel() * 4 for p in engine.module.parameters())
    engine.destroy()
    expected = {name: nbytes for name, nbytes in expected.items() if nbytes}
    return {"counts": counts, "expected": expected, "dense": dense}


def step_of(engine: Any, step: int, mine: slice) -> None:
    loss = engine(**{key: t[mine] for key, t in batch(step).items()}).loss
    engine.backward(loss)
    engine.step()
    engine.meft_flush()


# By torch's name of a collective: what process groups call it (it depends on the version), and which argument is given.
COLLECTIVES = {
    "all_reduce": (("allreduce", "allreduce_coalesced"), 0),
    "broadcast": (("broadcast",), 0),
    "reduce": (("reduce",), 0),
    "send": (("send",), 0),
    "all_gather": (("allgather", "allgather_coalesced"), 1),
    "all_gather_into_tensor": (
        ("_allgather_base", "allgather_into_tensor_coalesced", "all_gather_single", "all_gather_single_coalesced"),
        1,
    ),
    "reduce_scatter": (("reduce_scatter",), 1),
    "reduce_scatter_tensor": (
        (
            "_reduce_scatter_base",
            "reduce_scatter_tensor_coalesced",
            "reduce_scatter_single",
            "reduce_scatter_single_coalesced",
        ),
        1,
    ),
    "all_to_all": (("alltoall",), 1),
    "all_to_all_single": (("alltoall_base", "all_to_all_single"), 1),
    "gather": (("gather",), 1),
    "scatter": (("scatter",), 1),
}


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Bytes that this rank gives to collectives inside, but for those of a few numbers, by torch's name of them.

    Counted where process groups are called: DeepSpeed keeps references of its own to torch's functions.
    """
    counts: Counter[str] = Counter()
    originals: dict[str, Any] = {}
    group: Any = dist.ProcessGroup

    def wrapped(name: str, original: Any, index: int) -> Any:
        def collective(self: Any, *args: Any, **kwargs: Any) -> Any:
            for given in tree_leaves(args[index]):
                if isinstance(given, torch.Tensor) and given.dtype != torch.float64:  # the norm and the verdict
                    counts[name] += given.numel() * given.element_size()
            return original(self, *args, **kwargs)

        return collective

    for name, (methods, index) in COLLECTIVES.items():
        for method in methods:
            if hasattr(group, method):
                originals[method] = vars(group)[method]  # bound to instances when it is put back, as getattr's is not
                setattr(group, method, wrapped(name, getattr(group, method), index))
    try:
        yield counts
    finally:
        for method, original in originals.items():
            setattr(group, method, original)


def planted() -> dict[str, float]:
    """What is counted when a dense gradient goes through each collective that could take it."""
    import deepspeed.comm as ds

    world = dist.get_world_size()
    dense, part = torch.ones(64 * world), torch.empty(64)
    whole = [torch.empty_like(dense) for _ in range(world)]
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(dense),
        "all_reduce of DeepSpeed": lambda: ds.all_reduce(dense),
        "broadcast": lambda: dist.broadcast(dense, 0),
        "reduce": lambda: dist.reduce(dense, 0),
        "all_gather": lambda: dist.all_gather(whole, dense),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.cat(whole), dense),
        "all_gather_into_tensor of DeepSpeed": lambda: ds.allgather_fn(torch.cat(whole), dense),
        "reduce_scatter": lambda: dist.reduce_scatter(part, list(dense.split(64))),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(part, dense),
        "reduce_scatter_tensor of DeepSpeed": lambda: ds.reduce_scatter_fn(part, dense),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty_like(dense), dense),
    }
    found = {}
    for name, call in calls.items():
        # gloo of some versions has no reduce_scatter: what it was given was counted
        with counting() as counts, contextlib.suppress(RuntimeError):
            call()
        found[name] = counts[name.partition(" of ")[0]] / (4 * dense.numel())
    return found
