# SPDX-License-Identifier: Apache-2.0
"""Tests that need an accelerator: skipped, with the reason said, where PyTorch sees none.

Those of kernels and of CUDA's own tools need CUDA. The others run on any accelerator that DeepSpeed knows.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tests.gpu import runs
from tests.ranks import run_ranks

HAS_CUDA = torch.cuda.is_available()
CYCLES_PER_MS = 2_000_000  # of a GPU's clock, about


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA and os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1 would test Triton's interpreter, not this GPU: unset it")
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        if "cuda" in getattr(item, "fixturenames", ()) and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif not torch.accelerator.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture
def cuda() -> torch.device:
    """The first CUDA device."""
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def on_cpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], runs.Result]:
    """What a case gives on the CPU. All cases that the chosen tests ask for run in one other process."""
    folder = tmp_path_factory.mktemp("on_cpu")
    given = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = {params.get("name") for params in given} | {name for params in given for name in params.get("names", ())}
    names = [name for name, case in runs.CASES.items() if name in asked and case.precision == "fp32"]
    here = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    run_ranks(Path(runs.__file__), 1, str(folder), "twin", *names, env=here)
    return lambda name: runs.load(folder, name)


@pytest.fixture
def make_streams_late() -> Callable[[Any, int], None]:
    """Makes an engine's streams late at random: `make_streams_late(engine, seed)`.

    A kernel that sleeps goes before what a layer computes forward and backward (so before the update that the layer
    applies), before each payload is complete, and before the copies of each lane. What does not wait for such a stream
    then reads or overwrites too early.
    """
    return _make_streams_late


def _make_streams_late(engine: Any, seed: int) -> None:
    device = torch.device(engine.device)
    runtime, pipeline = torch.get_device_module(device), engine.optimizer.pipeline
    rngs = {name: random.Random(f"{seed}{name}") for name in ("forward", "backward", "complete", "down", "up")}

    def sleep(where: str) -> None:
        # the longest outlasts what the host does between two uses of a buffer
        if milliseconds := rngs[where].choice((0, 0, 1, 30)):
            runtime._sleep(milliseconds * CYCLES_PER_MS)

    for layer in engine.module.model.layers:
        # before the hook that applies the layer's update
        layer.register_forward_pre_hook(lambda *_: sleep("forward"), prepend=True)
        layer.register_forward_hook(lambda module, args, out: _when_backward_comes(out, lambda: sleep("backward")))
    complete, lane = pipeline.complete, pipeline.bus.lane

    def late_complete(unit: Any) -> None:
        sleep("complete")
        complete(unit)

    @contextlib.contextmanager
    def late_lane(direction: Literal["down", "up"], after: Any = None) -> Iterator[Any]:
        with lane(direction, after) as transfer:
            sleep(direction)
            yield transfer

    pipeline.complete, pipeline.bus.lane = late_complete, late_lane


def _when_backward_comes(out: Any, call: Callable[[], None]) -> None:
    hidden = out[0] if isinstance(out, tuple) else out
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: call())
