# SPDX-License-Identifier: Apache-2.0
"""The pipeline alone, on small models: whatever the lanes' timing, results are those of the serial order."""

import copy
import gc
import itertools
import pickle
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from meft_ds.offload import update_gates
from meft_ds.offload.dense_unit import DenseUnit
from meft_ds.offload.flat_unit import Place
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.eager import MEASURED_WINDOWS
from meft_ds.offload.schedule.window import StepSettings
from meft_ds.ops.adam import AdamHyper
from tests.offload.overlap import make_late, run_inline

HYPER = AdamHyper(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)


class Tower(nn.Module):
    """Numbered blocks, a tied weight, a parameter that is read outside any module, and branches a batch may skip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(6, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.branch = nn.ModuleList([nn.Linear(6, 6)])
        self.loose = nn.Parameter(torch.ones(6))
        self.out = nn.Linear(6, 6, bias=False)
        self.out.weight = self.inp.weight

    def forward(self, x: Tensor, *, skip: bool = False) -> Tensor:
        x = self.inp(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        if not skip:
            x = x + self.branch[0](x)
        return self.out(x * self.loose)


def build(
    mode: str, model: nn.Module, parts: list[str], *, clip: float = 0.5, closes: Callable[[], bool] = lambda: True
) -> Pipeline:
    """One unit per part of the model, gates installed."""
    units = []
    for layer, part in enumerate(parts):
        params = [(n, p) for n, p in model.named_parameters() if n.startswith(part)]
        unit = DenseUnit(Place(name=part, layer=layer, params=params))
        unit.allocate()
        units.append(unit)
    step = StepSettings(hyper_of=lambda unit: HYPER, grad_scale=1.0, clip=clip)
    bus = Bus(torch.device("cpu"))
    pipeline = Pipeline(units, bus, Ranks(), lambda: step, mode=mode, closes_window=closes)  # type: ignore[arg-type]
    update_gates.install(model, units, pipeline)
    return pipeline


def tower(mode: str, **kwargs: Any) -> tuple[Tower, Pipeline]:
    model = Tower()
    return model, build(
        mode, model, ["inp", "layers.0", "layers.1", "layers.2", "layers.3", "branch", "loose"], **kwargs
    )


@pytest.fixture
def pipelines() -> Iterator[Callable[..., tuple[Tower, Pipeline]]]:
    made: list[Pipeline] = []

    def make(mode: str, **kwargs: Any) -> tuple[Tower, Pipeline]:
        model, pipeline = tower(mode, **kwargs)
        made.append(pipeline)
        return model, pipeline

    yield make
    for pipeline in made:
        pipeline.close()


def state(pipeline: Pipeline, model: nn.Module) -> dict[str, Tensor]:
    pipeline.flush()
    found = {f"{u.name}.{k}": t.clone() for u in pipeline.units for k, t in u.state_tensors().items()}
    return found | {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


Window = list[tuple[bool, bool]]  # per micro-batch: skip the branch? backward in two parts?


def run(model: Tower, pipeline: Pipeline, windows: list[Window], micro: dict[str, bool], eval_after: set[int]) -> list:
    g = torch.Generator().manual_seed(1)
    seen: list[float] = []
    for n, window in enumerate(windows):
        for i, (skip, twice) in enumerate(window):
            micro["last"] = i == len(window) - 1
            x = torch.randn(3, 6, generator=g)
            y = model(x, skip=skip)
            if twice:  # the second backward gives gradients to units whose payload may have left
                y[:, :3].square().mean().backward(retain_graph=True)
                y[:, 3:].square().mean().backward()
            else:
                y.square().mean().backward()
            seen.append(y.detach().sum().item())
        result = pipeline.step()
        seen.append(result.grad_norm)
        if n in eval_after:
            model.eval()
            with torch.no_grad():
                seen.append(model(x).sum().item())
            model.train()
    return seen


@given(
    windows=st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=3), min_size=1, max_size=5),
    eval_after=st.sets(st.integers(0, 4)),
    seed=st.integers(0, 10**6),
)
def test_random_schedules_of_exact_equal_serial_bit_for_bit(
    windows: list[Window], eval_after: set[int], seed: int
) -> None:
    outcomes = []
    for mode in ("serial", "exact"):
        micro = {"last": True}
        model, pipeline = tower(mode, closes=lambda micro=micro: micro["last"])
        if mode == "exact":
            make_late(pipeline, seed, 1e-3)
        seen = run(model, pipeline, windows, micro, eval_after)
        outcomes.append((seen, state(pipeline, model)))
        pipeline.close()
    assert outcomes[0][0] == outcomes[1][0]
    assert_equal(outcomes[0][1], outcomes[1][1])


def simple(model: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    model(torch.randn(3, 6, generator=g)).square().mean().backward()


@pytest.mark.parametrize("seed", range(3))
def test_eager_equals_its_own_stages_run_in_line_bit_for_bit(pipelines: Callable, seed: int) -> None:
    outcomes = []
    for inline in (True, False):
        model, pipeline = pipelines("eager")
        if inline:
            run_inline(pipeline)
        else:
            make_late(pipeline, seed)
        norms = []
        for n in range(20):
            simple(model, n)
            norms.append(pipeline.step().grad_norm)
        assert pipeline.tuner.eager_now
        outcomes.append((norms, state(pipeline, model)))
    assert outcomes[0][0] == outcomes[1][0]
    assert_equal(outcomes[0][1], outcomes[1][1])


def test_eager_clips_by_the_norm_of_the_window_before(pipelines: Callable) -> None:
    model, pipeline = pipelines("eager", clip=0.1)
    run_inline(pipeline)
    seen: list[float] = []
    unit = pipeline.units[1]
    original = unit.host_step
    unit.host_step = lambda hyper, *, step, grad_scale: (  # type: ignore[method-assign]
        seen.append(grad_scale),
        original(hyper, step=step, grad_scale=grad_scale),
    )[-1]
    norms = []
    for n in range(MEASURED_WINDOWS + 4):
        simple(model, n)
        norms.append(pipeline.step().grad_norm)
    for n, scale in enumerate(seen):
        by = norms[n] if n <= MEASURED_WINDOWS - 1 else norms[n - 1]
        if n != MEASURED_WINDOWS:  # the window in which the order becomes known began as an exact one
            assert scale == pytest.approx(min(1.0, 0.1 / (by + 1e-6)))


def test_eager_overflow_of_one_unit_touches_nothing_of_that_unit_and_updates_the_others(pipelines: Callable) -> None:
    model, pipeline = pipelines("eager")
    for n in range(MEASURED_WINDOWS + 3):
        simple(model, n)
        pipeline.step()
    before, steps = state(pipeline, model), pipeline.state()["steps"]
    simple_loss = model(torch.ones(3, 6)).square().mean()
    handle = model.layers[1].weight.register_hook(lambda grad: torch.full_like(grad, float("nan")))
    simple_loss.backward()
    handle.remove()
    assert pipeline.step().overflow
    after, now = state(pipeline, model), pipeline.state()["steps"]
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("layers.1"))
    assert now["layers.1"] == steps["layers.1"]
    for part in ("layers.0", "layers.2", "loose"):
        assert now[part] == steps[part] + 1 and not torch.equal(before[f"{part}.master"], after[f"{part}.master"])
    simple(model, 99)
    assert not pipeline.step().overflow


def test_no_time_of_the_training_thread_is_counted_twice_when_a_payload_is_sent_again(pipelines: Callable) -> None:
    model, pipeline = pipelines("exact")
    y = model(torch.ones(3, 6))
    y[:, :3].square().mean().backward(retain_graph=True)
    y[:, 3:].square().mean().backward()
    times = pipeline.step().times
    assert times.payloads > len(pipeline.units)
    spans = sorted((span for span in times.spans if span.lane == "main"), key=lambda span: span.start)
    assert all(one.end <= other.start for one, other in itertools.pairwise(spans))


def test_a_gradient_that_comes_after_an_eager_update_is_an_error_not_a_wrong_result(pipelines: Callable) -> None:
    model, pipeline = pipelines("eager")
    for n in range(MEASURED_WINDOWS + 3):
        simple(model, n)
        pipeline.step()
    y = model(torch.ones(3, 6))
    y[:, :3].square().mean().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="after its update had begun.*schedule.mode"):
        y[:, 3:].square().mean().backward()


def test_a_weight_read_outside_its_module_is_never_stale(pipelines: Callable) -> None:
    """`loose` belongs to the root and is read in its forward; its gate must be the root's."""
    model, pipeline = pipelines("exact")
    make_late(pipeline, 0, 0.02)
    for n in range(3):
        simple(model, n)
        pipeline.step()
    model(torch.ones(1, 6))
    assert not any(entry.pending for entry in pipeline._entries)


class Functional(nn.Module):
    """Reads a child's weight without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(4, 4)
        self.never_called = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.child(x), self.never_called.weight, self.never_called.bias)


def test_a_module_that_is_never_called_is_updated_before_the_next_forward() -> None:
    results = []
    for mode in ("serial", "exact"):
        torch.manual_seed(0)
        model = Functional()
        pipeline = build(mode, model, ["child", "never_called"])
        if mode == "exact":
            make_late(pipeline, 1, 0.02)
        for n in range(5):
            torch.manual_seed(n)
            model(torch.randn(2, 4)).square().sum().backward()
            pipeline.step()
        results.append(state(pipeline, model))
        pipeline.close()
    assert_equal(*results)


@pytest.mark.parametrize("seed", range(20))
def test_a_worker_that_fails_at_a_random_stage_surfaces_at_the_next_call_and_leaves_no_thread(
    pipelines: Callable, seed: int
) -> None:
    rng = random.Random(seed)
    model, pipeline = pipelines(rng.choice(["exact", "eager"]))
    make_late(pipeline, seed, 1e-3)
    for n in range(3):
        simple(model, n)
        pipeline.step()
    unit = rng.choice(pipeline.units)
    stage = rng.choice(["reduce", "send", "sq_norm", "host_step", "fetch"])

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(f"planted in {stage}")

    setattr(unit, stage, fail)
    with pytest.raises(RuntimeError, match=f"OSError: planted in {stage}") as caught:
        for n in range(2):
            simple(model, n)
            pipeline.step()
        simple(model, 3)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.__traceback__ is not None
    for call in (pipeline.step, pipeline.flush, lambda: simple(model, 4)):
        with pytest.raises(RuntimeError, match="resume from the last checkpoint"):
            call()
    pipeline.close()


def test_a_forgotten_pipeline_is_freed_and_its_threads_end() -> None:
    model, pipeline = tower("exact")
    simple(model, 0)
    pipeline.step()
    before = threading.active_count()
    found = weakref.ref(pipeline)
    del pipeline
    deadline = time.monotonic() + 10
    while found() is not None and time.monotonic() < deadline:
        time.sleep(0.01)  # the last jobs hold it until they are done
        gc.collect()
    assert found() is None and threading.active_count() <= before - 3
    simple(model, 1)  # the hooks find nobody


def test_taking_a_pipeline_down_after_its_lanes_stopped_does_not_hang(pipelines: Callable) -> None:
    model, pipeline = pipelines("exact")
    make_late(pipeline, 0, 0.2)
    simple(model, 0)
    pipeline.step()
    pipeline._lanes.close()
    with pytest.raises(RuntimeError, match="taken down"):
        pipeline.flush()
    pipeline.close()


def test_a_copy_of_the_model_is_not_trained_by_the_pipeline(pipelines: Callable) -> None:
    model, pipeline = pipelines("exact")
    simple(model, 0)
    pipeline.step()
    copied = copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))
    for p in copied.parameters():
        p.data.zero_()
    copied(torch.ones(3, 6)).sum().backward()
    assert not any(entry.sent for entry in pipeline._entries)
