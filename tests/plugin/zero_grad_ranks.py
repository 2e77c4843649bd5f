# SPDX-License-Identifier: Apache-2.0
"""What the two ranks of test_zero_grad_ranks.py do: forget windows, wherever each rank's backward is."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.plugin.tiles import digest
from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of, tiny_llama

BLOCKS = {
    "subspace": {"subspace": {"nonzeros": 2, "fit_steps": 5}},
    "sparse_adapter": {"sparse_adapter": dict(ADAPTER)},
    "sparse_matrix": {"sparse_matrix": {"block_size": 8, "warmup_steps": 1, "density": 0.3}},
}


def backward(engine: Any, seed: int, factor: float = 1.0) -> None:
    engine.backward(factor * engine(**batch(2 * seed + dist.get_rank())).loss)


@contextlib.contextmanager
def memory_runs_out(engine: Any) -> Iterator[None]:
    """Inside, a backward ends with an error when its gradient reaches the first layer's output."""

    def fail(grad: torch.Tensor) -> None:
        raise MemoryError("planted")

    def watch(module: Any, args: Any, output: Any) -> None:
        (output[0] if isinstance(output, tuple) else output).register_hook(fail)

    handle = engine.module.model.layers[0].register_forward_hook(watch)
    with pytest.raises(MemoryError):
        yield
    handle.remove()


def half_a_backward(engine: Any, seed: int) -> None:
    with memory_runs_out(engine):
        backward(engine, seed, 30.0)


def run(method: str, fault: str, at: int) -> Any:
    """Four steps; before step `at` something is forgotten."""
    engine = make_engine(ds_config(block=BLOCKS[method], micro=4), tiny_llama())
    for step in range(4):
        if step == at and fault == "whole":
            backward(engine, 90, 30.0)
            engine.zero_grad()
        elif step == at and fault == "half on one":
            half_a_backward(engine, 90) if dist.get_rank() == 1 else backward(engine, 90, 30.0)
            engine.zero_grad()
        elif step == at and fault == "none on one":
            loss = engine(**batch(180 + dist.get_rank())).loss
            if dist.get_rank() == 0:
                engine.backward(30.0 * loss)
            del loss
            engine.optimizer.zero_grad()
        elif step == at and fault == "skipped by one alone":  # it has caught the error and told nobody
            half_a_backward(engine, 90) if dist.get_rank() == 1 else backward(engine, 90)
            engine.step()
            continue
        backward(engine, step)
        engine.step()
    reliable = all(entry.reliable for entry in engine.optimizer.pipeline._entries)
    engine.meft_flush()
    weights = digest({name: p.detach() for name, p in engine.module.named_parameters()})
    found = {"state": digest(state_of(engine)), "weights": weights, "reliable": reliable}
    engine.destroy()
    return found


def forgotten(folder: Path) -> dict[str, Any]:
    found = {}
    for method in BLOCKS:
        for at in (0, 2):
            faults = ["", "whole", "half on one", "none on one"]
            if at or method != "subspace":  # projectors are fitted by all ranks or none
                faults.append("skipped by one alone")
            for fault in faults:
                found[f"{method}, step {at}, {fault}"] = run(method, fault, at)
    return found
