# SPDX-License-Identifier: Apache-2.0
"""Subspace units without DeepSpeed: a model, its units, the other tensors in dense units, a pipeline and its gates."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from meft_ds.offload import update_gates
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.method import Run
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.window import StepSettings
from meft_ds.ops.adam import AdamHyper
from meft_ds.ops.projector import Projector
from meft_ds.plugin.build import dense_units
from meft_ds.subspace.config import SubspaceConfig
from meft_ds.subspace.matrix import Matrix
from meft_ds.subspace.method import SubspaceMethod
from meft_ds.subspace.unit import SubspaceUnit

HYPER = AdamHyper(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
CPU = torch.device("cpu")
TOKENS = 10


class Attention(nn.Module):
    """q, k and v read one tensor; names as in Hugging Face's models, so they share a projector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width, bias=False), nn.Linear(width, 6)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.tanh(self.q_proj(x) * self.k_proj(x).sum(-1, keepdim=True) + self.v_proj(x)))


class Block(nn.Module):
    """Everything that a unit meets: shared inputs, both kinds of layers, a module called twice, one weight that is
    also read outside its module's forward, and experts in one 3-D tensor."""

    def __init__(self, width: int = 12, experts: bool = True) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.fc, self.proj = Conv1D(20, width), Conv1D(width, 20)
        self.twice, self.outside = nn.Linear(width, width), nn.Linear(width, width)
        self.experts = nn.Parameter(torch.randn(3, 9, width) / 3) if experts else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        x = x + self.proj(torch.tanh(self.fc(x)))
        x = x + self.twice(torch.tanh(self.twice(x)))
        x = x + self.outside(x) + torch.tanh(F.linear(x, self.outside.weight))
        if self.experts is not None:
            flat = x.reshape(-1, x.shape[-1])
            each = [torch.tanh(F.linear(flat[i::3], self.experts[i])).sum(-1) for i in range(3)]
            x = x * (1 + torch.cat(each).mean())
        return torch.tanh(x)


class Model(nn.Module):
    """Two blocks; the first linear layers read what needs no gradient."""

    def __init__(self, width: int = 12, blocks: int = 2, experts: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width, experts) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def model_of(seed: int = 0, **kwargs: Any) -> Model:
    """Weights large enough that every one of them has a gradient to speak of."""
    torch.manual_seed(seed)
    model = Model(**kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / 3)
    return model


def inputs(seed: int, width: int = 12, batch: int = 3) -> Tensor:
    return torch.randn(batch, TOKENS, width, generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, seed: int, factor: float = 1.0, **kwargs: Any) -> None:
    (model(inputs(seed, **kwargs).to(next(model.parameters()).dtype)).float().square().mean() * factor).backward()


def run_of(model: nn.Module) -> Run:
    return Run(
        model=model,
        groups=[{"params": list(model.parameters()), "lr": HYPER.lr}],
        bus=Bus(CPU),
        ranks=Ranks(),
        dtype=next(model.parameters()).dtype,
        moments_dtype=torch.float32,
        grad_dtype=torch.float32,
    )


def pipeline_of(model: nn.Module, *, clip: float = 0.0, hyper: AdamHyper = HYPER, **settings: Any) -> Pipeline:
    """What an engine does with a "subspace" block of these settings; gradients are sums over the window."""
    config = SubspaceConfig(
        # named, because some would be too small
        **{"target_modules": ".*", "projectors": "learned", "dim": 0.5, "nonzeros": 2, "fit_steps": 5, **settings}
    )
    method, run = SubspaceMethod(config), run_of(model)
    method.prepare(model)
    claimed = method.claim(run)
    dense = dense_units(run, method.layers, claimed)
    for unit in dense:
        unit.allocate()
    units = sorted([*dense, *method.build(run, {})], key=lambda unit: (unit.layer, unit.name))
    step = StepSettings(hyper_of=lambda unit: hyper, grad_scale=1.0, clip=clip)
    pipeline = Pipeline(units, run.bus, run.ranks, lambda: step, methods=[method])
    update_gates.install(model, units, pipeline)
    pipeline.method = method  # type: ignore[attr-defined]  # what the hooks hold weakly
    return pipeline


def subspace_units(pipeline: Pipeline) -> list[SubspaceUnit]:
    return [unit for unit in pipeline.units if isinstance(unit, SubspaceUnit)]


def everything(pipeline: Pipeline, model: nn.Module) -> dict[str, Any]:
    """Copies of all that a step may change: weights, host state, projectors, residuals and counters."""
    pipeline.flush()
    state: dict[str, Any] = {name: p.detach().clone() for name, p in model.named_parameters()}
    for unit in pipeline.units:
        for tensors in (unit.state_tensors(), unit.shared_tensors()):
            state |= {f"{unit.name}/{key}": t.clone() for key, t in tensors.items()}
        state[f"{unit.name}/scalars"] = repr(unit.scalars())
    return state | {"counters": repr(pipeline.state()["steps"])}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names under which two states are not the same bits."""
    assert one.keys() == other.keys()
    return [k for k, a in one.items() if not (torch.equal(a, other[k]) if isinstance(a, Tensor) else a == other[k])]


def permutation(n: int, seed: int) -> Projector:
    """A signed permutation matrix."""
    return Projector.draw(n, n, 1, seed, CPU)


def reference_s(unit: SubspaceUnit, matrix: Matrix, grads: dict[str, Tensor]) -> Tensor:
    """P^T G Q by dense products with what autograd computed."""
    g = grads[unit.params[matrix.param][0]]
    g = g if matrix.expert is None else g[matrix.expert]
    return matrix.left.projector.dense().T @ g.float() @ matrix.right.projector.dense()


def assert_s(unit: SubspaceUnit, matrix: Matrix, grads: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """What the unit has summed is P^T G Q, up to rounding relative to the whole."""
    wanted = reference_s(unit, matrix, grads)
    assert wanted.norm() > 1e-4, f"{matrix.name} has no gradient to speak of"
    error = float((matrix.part(unit._acc) - wanted).norm() / wanted.norm())
    assert error < tolerance, f"{matrix.name}: {error}"


def grads_of(model: nn.Module, seed: int, **kwargs: Any) -> dict[str, Tensor]:
    twin = copy.deepcopy(model)
    backward(twin, seed, **kwargs)
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
