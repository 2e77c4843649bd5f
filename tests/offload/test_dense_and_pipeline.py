# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn

from meft_ds.offload.dense_unit import DenseUnit
from meft_ds.offload.flat_unit import Place
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.window import StepSettings
from meft_ds.offload.unit import Unit
from meft_ds.ops.adam import AdamHyper

HYPER = AdamHyper(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


def make(model: nn.Module, *, clip: float = 0.0) -> Pipeline:
    units: list[Unit] = []
    for layer, (name, p) in enumerate(model.named_parameters()):
        unit = DenseUnit(Place(name=name, layer=layer, params=[(name, p)]))
        unit.allocate()
        units.append(unit)
    settings = StepSettings(hyper_of=lambda unit: HYPER, grad_scale=1.0, clip=clip)
    return Pipeline(units, Bus(torch.device("cpu")), Ranks(), lambda: settings)


def step(pipeline: Pipeline) -> tuple[bool, float]:
    result = pipeline.step()
    return result.overflow, result.grad_norm


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_fifty_steps_equal_torch_adamw_with_clipping_and_accumulation(clip: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    twin = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    twin.load_state_dict(model.state_dict())
    pipeline = make(model, clip=clip)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for _ in range(50):
        for _ in range(3):
            x = torch.randn(4, 5)
            (model(x).square().mean() / 3).backward()
            (twin(x).square().mean() / 3).backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), clip if clip else math.inf)
        overflow, ours = step(pipeline)
        assert not overflow and ours == pytest.approx(float(norm), rel=1e-5)
        reference.step()
        reference.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_one_non_finite_payload_skips_the_step_for_all_units() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    pipeline = make(model)
    before = [{k: t.clone() for k, t in unit.state_tensors().items()} for unit in pipeline.units]
    weights = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(2, 3)).sum().backward()
    pipeline.units[1]._acc[0] = float("nan")  # type: ignore[attr-defined]
    overflow, norm = step(pipeline)
    assert overflow and math.isinf(norm)
    for unit, saved in zip(pipeline.units, before, strict=True):
        assert all(torch.equal(saved[k], t) for k, t in unit.state_tensors().items())
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    model(torch.ones(2, 3)).sum().backward()
    assert step(pipeline)[0] is False


def test_a_consumed_gradient_is_never_added_again() -> None:
    model = nn.Linear(2, 1, bias=False)
    pipeline = make(model)
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is None
    model(torch.ones(1, 2)).sum().backward()
    _, norm = step(pipeline)
    assert norm == pytest.approx(math.sqrt(2 * 2**2))
    assert step(pipeline)[1] == 0.0


def test_bf16_parameters_accumulate_in_fp32_and_keep_a_fp32_master() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    pipeline = make(model)
    for _ in range(300):  # 300 times 2^-9: bf16 sums would stall at 2^-1
        (model(torch.ones(1, 1, dtype=torch.bfloat16)).sum() * 2**-9).backward()
    _, norm = step(pipeline)
    assert norm == pytest.approx(300 * 2**-9)
    master = pipeline.units[0].state_tensors()["master"]
    assert master.dtype == torch.float32 and torch.equal(model.weight.reshape(-1), master.bfloat16())
