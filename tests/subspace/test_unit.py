# SPDX-License-Identifier: Apache-2.0
"""What a subspace unit computes in a window, by hand and against autograd, without DeepSpeed."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from meft_ds import ops
from meft_ds.offload.flat_unit import Place
from meft_ds.offload.host.transfer import Bus
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.window import StepSettings
from meft_ds.plugin.build import dense_units
from meft_ds.subspace.matrix import Matrix, Side
from meft_ds.subspace.unit import SubspaceUnit
from tests.subspace.hand import (
    CPU,
    HYPER,
    Model,
    assert_s,
    backward,
    differing,
    everything,
    grads_of,
    inputs,
    model_of,
    permutation,
    pipeline_of,
    reference_s,
    run_of,
    subspace_units,
)

RANDOM: dict[str, Any] = {"projectors": "random", "refit_interval": 0}


# The update


@pytest.mark.parametrize("clip", [0.0, 0.02])
@pytest.mark.parametrize("side", ["activation", "weight"])
def test_signed_permutations_with_scale_1_equal_torch_adamw(side: str, clip: float) -> None:
    """P and Q square with one +-1 in each row: d = m and d = n, so nothing is lost and Adam must be Adam."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), Conv1D(5, 9), nn.Tanh(), nn.Linear(5, 5, bias=False))
    model[2].weight.data.normal_(0, 0.5)
    twin = copy.deepcopy(model)
    units = []
    for index in (0, 2, 4):
        module, (m, n) = model[index], model[index].weight.shape
        matrix = Matrix(
            name=str(index),
            param=0,
            left=Side("left", permutation(m, index)),
            right=Side("right", permutation(n, index + 1)),
            offset=0,
            input_first=isinstance(module, Conv1D),
        )
        unit = SubspaceUnit(
            Place(name=f"{index}", layer=index, params=[(f"{index}.weight", module.weight)]),
            matrices=[matrix],
            modules=[module if side == "activation" else None],
            scale=1.0,
            residual=False,
            seed=0,
            learned=False,
            arriving=lambda unit: None,
            captured_all=lambda unit: None,
        )
        unit.allocate()
        units.append(unit)
    dense = dense_units(run_of(model), 5, {id(unit.params[0][1]) for unit in units})
    for unit in dense:
        unit.allocate()
    settings = StepSettings(hyper_of=lambda unit: HYPER, grad_scale=1.0, clip=clip)
    pipeline = Pipeline([*units, *dense], Bus(CPU), Ranks(), lambda: settings)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    norms = []
    for step in range(25):
        for micro in range(3):
            for trained in (model, twin):
                backward(trained, 3 * step + micro, factor=1 / 3, width=6)
        norms.append(float(nn.utils.clip_grad_norm_(twin.parameters(), clip or math.inf)))
        result = pipeline.step()
        assert not result.overflow and result.grad_norm == pytest.approx(norms[-1], rel=1e-5)
        reference.step()
        reference.zero_grad()
    assert not clip or sum(norm > clip for norm in norms) > 5, "clipping must bite"
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5, msg=name)


def test_the_default_scale_moves_a_weight_by_about_as_much_as_adam_would() -> None:
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    pipeline = pipeline_of(model, **RANDOM)
    backward(model, 0)
    pipeline.step()
    for unit in subspace_units(pipeline):
        for name, p in unit.params:
            moved = (p - before[name] * (1 - HYPER.lr * HYPER.weight_decay)).square().mean().sqrt()
            assert 0.7 * HYPER.lr < moved < 1.4 * HYPER.lr, name  # Adam's first step is +-lr everywhere


def test_rounding_has_random_bits_of_its_own_for_every_matrix_and_update(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    apply = ops.subspace_apply_
    monkeypatch.setattr(
        ops, "subspace_apply_", lambda *args, **kw: (seen.append((kw["key"], kw["step"])), apply(*args, **kw))[-1]
    )
    for _ in range(2):
        model = model_of().bfloat16()
        pipeline = pipeline_of(model, **RANDOM)
        for step in range(3):
            backward(model, step)
            pipeline.step()
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert first == second, "a replay rounds alike"
    assert len(set(first)) == len(first) == 3 * 22 and {step for _, step in first} == {1, 2, 3}


def test_the_norm_that_clips_is_that_of_the_compressed_gradients_and_the_dense_ones() -> None:
    model = model_of()
    twin = copy.deepcopy(model)
    pipeline = pipeline_of(model, clip=1e-3, **RANDOM)
    backward(model, 0)
    backward(twin, 0)
    grads = {name: p.grad for name, p in twin.named_parameters()}
    squares = 0.0
    for unit in subspace_units(pipeline):
        for matrix in unit.matrices:
            squares += float(reference_s(unit, matrix, grads).double().square().sum())
        for name, _ in unit.params:
            del grads[name]
    squares += sum(float(g.double().square().sum()) for g in grads.values())
    assert pipeline.step().grad_norm == pytest.approx(math.sqrt(squares), rel=1e-5)
    for unit in subspace_units(pipeline):  # clipped: Adam's first moment is a tenth of the clipped gradient
        assert float(unit.exp_avg.norm()) <= 0.1 * 1e-3 * 1.001


# S, from activations or from gradients


@pytest.mark.parametrize("side", ["activation", "weight"])
@pytest.mark.parametrize("projectors", ["learned", "random"])
def test_s_is_the_compressed_gradient_of_every_matrix(side: str, projectors: str) -> None:
    """With shared inputs, both kinds of layers, a module called twice, a weight read outside its module, experts, and
    a first layer whose input needs no gradient; in a calibrating window S is of the projectors it switched to."""
    model = model_of()
    grads = grads_of(model, 0)
    pipeline = pipeline_of(model, gradient_side=side, projectors=projectors)
    (draws,) = [[s.projector for u in subspace_units(pipeline) for s in u.sides]]
    backward(model, 0)
    for unit in subspace_units(pipeline):
        assert len(unit.matrices) == 11 and not unit.asked and not unit.captured
        for matrix in unit.matrices:
            assert_s(unit, matrix, grads)
    switched = [s.projector for u in subspace_units(pipeline) for s in u.sides]
    changed = sum(a is not b for a, b in zip(draws, switched, strict=True))
    assert changed > len(draws) / 2 if projectors == "learned" else changed == 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("shape", [(7, 12), (2, 7, 12), (2, 3, 7, 12), (12,), (1, 12)])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_s_from_activations_of_any_shape(shape: tuple[int, ...], kind: str, needs_grad: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 16) if kind == "linear" else Conv1D(16, 12)
    model, x = nn.Sequential(layer), torch.randn(shape)
    twin = copy.deepcopy(model)
    pipeline = pipeline_of(model, **RANDOM)
    found = []
    for trained in (model, twin):
        leaf = x.clone().requires_grad_(needs_grad)
        y = trained(leaf)
        y.mul_(1.5)  # what follows may change the output in place
        y.sin().sum().backward()
        found.append((y.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] is None if not needs_grad else torch.equal(found[0][1], found[1][1])
    (unit,) = subspace_units(pipeline)
    (matrix,) = unit.matrices
    assert_s(unit, matrix, {"0.weight": twin[0].weight.grad})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("projectors", ["learned", "random"])
def test_s_in_half_precision_is_as_close_as_rounding_allows(dtype: torch.dtype, projectors: str) -> None:
    model = model_of().to(dtype)
    grads = grads_of(model, 0)
    pipeline = pipeline_of(model, projectors=projectors)
    backward(model, 0)
    for unit in subspace_units(pipeline):
        for matrix in unit.matrices:
            assert_s(unit, matrix, grads, 2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_siblings_that_read_one_tensor_sketch_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(blocks=1, experts=False)
    pipeline = pipeline_of(model, **RANDOM)
    (unit,) = subspace_units(pipeline)
    of = {matrix.name: matrix for matrix in unit.matrices}
    q, k, v, o = (of[f"layers.0.attn.{name}_proj.weight"] for name in "qkvo")
    assert k.right is not q.right  # another d, so another projector
    assert q.right is v.right and o.right is not q.right
    made: list[int] = []
    sketch = ops.sketch
    monkeypatch.setattr(ops, "sketch", lambda x, *args: (made.append(args[0].data_ptr()), sketch(x, *args))[-1])
    backward(model, 0)
    assert made.count(q.right.projector.columns[0].data_ptr()) == 1
    assert not unit._sketched, "nothing is kept beyond the layer"


def test_a_shared_sketch_is_not_used_for_another_tensor() -> None:
    """Cross attention: q reads another tensor than k and v, though they share a projector."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * torch.tanh(self.k(x.flip(0))) + self.v(x.flip(0))

    torch.manual_seed(0)
    model = Cross()
    grads = grads_of(model, 0)
    pipeline = pipeline_of(model, **RANDOM)
    backward(model, 0)
    (unit,) = subspace_units(pipeline)
    assert len({id(matrix.right) for matrix in unit.matrices}) == 1
    for matrix in unit.matrices:
        assert_s(unit, matrix, grads)


@pytest.mark.parametrize("side", ["activation", "weight"])
def test_four_micro_batches_equal_one_of_four_times_the_size(side: str) -> None:
    models = model_of(experts=False), model_of(experts=False)
    # with a tiny eps Adam turns rounding differences of near-zero gradients into whole steps
    hyper = replace(HYPER, eps=1e-3)
    whole, parts = (pipeline_of(m, gradient_side=side, clip=0.5, hyper=hyper, **RANDOM) for m in models)
    for step in range(3):
        x = inputs(step, batch=8)
        models[0](x).square().mean().backward()
        for part in x.chunk(4):
            (models[1](part).square().mean() / 4).backward()
        assert whole.step().grad_norm == pytest.approx(parts.step().grad_norm, rel=1e-4)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=5e-5, rtol=1e-4, msg=name)


def test_a_second_micro_batch_of_a_calibrating_window_uses_the_new_projectors() -> None:
    model = model_of()
    pipeline = pipeline_of(model)
    first, second = grads_of(model, 0), grads_of(model, 1)
    backward(model, 0)
    backward(model, 1)
    for unit in subspace_units(pipeline):
        for matrix in unit.matrices:
            assert_s(unit, matrix, {k: first[k] + second[k] for k in first})


def test_modules_that_backward_never_reaches_cost_nothing_but_their_gradient() -> None:
    class Some(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0].twice(self.layers[1].attn(self.layers[0].attn(x)))

    torch.manual_seed(0)
    model = Some()
    grads = grads_of(model, 0)
    pipeline = pipeline_of(model)
    backward(model, 0)
    result = pipeline.step()
    assert not result.overflow
    for unit in subspace_units(pipeline):
        for matrix in unit.matrices:
            reached = unit.params[matrix.param][0] in grads
            assert matrix.fitted <= reached and ("held_out" in matrix.bias) == reached, matrix.name
            assert bool(matrix.part(unit.exp_avg).any()) == reached


# Overflow


@pytest.mark.parametrize(
    ("side", "rounding", "value"),
    [("activation", "stochastic", math.inf), ("activation", "residual", math.nan), ("weight", "residual", math.inf)],
)
def test_a_planted_inf_in_any_one_matrix_leaves_no_trace(side: str, rounding: str, value: float) -> None:
    """In a calibrating window and in an ordinary one; afterwards training goes on as if the batch had never been."""
    settings = dict(gradient_side=side, rounding=rounding, refit_interval=2, refit_threshold=0.0, fit_steps=1)
    model = model_of(blocks=1, experts=False).bfloat16()
    pipeline = pipeline_of(model, **settings)
    twin_model = model_of(blocks=1, experts=False).bfloat16()
    twin = pipeline_of(twin_model, **settings)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    assert len(names) == 8
    for step in range(3):
        before = everything(pipeline, model)
        for name in names[step % 2 :: 1 + step // 2]:
            spoil_next_gradient(model.get_submodule(name), value)
            backward(model, 100)
            assert pipeline.method._calibrator._step == 2 * (step // 2)
            result = pipeline.step()
            assert result.overflow and math.isinf(result.grad_norm), name
            assert differing(before, everything(pipeline, model)) == [], name
        for trained, its in ((model, pipeline), (twin_model, twin)):
            backward(trained, step)
            assert not its.step().overflow
        assert differing(everything(twin, twin_model), everything(pipeline, model)) == []
    assert any(matrix.fitted for unit in subspace_units(twin) for matrix in unit.matrices)


def spoil_next_gradient(module: nn.Module, value: float) -> None:
    """One entry of the gradient of the next output, and with it of the weight."""

    def plant(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.view(-1)[3] = value
        return grad

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        handle.remove()
        output.register_hook(plant)
        return output

    handle = module.register_forward_hook(hook)


# Where the state lives


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_state_on_the_accelerator_gives_the_same_bits_and_moves_none_over_the_bus(clip: float) -> None:
    states = []
    for where in ("cpu", "accelerator"):
        model = model_of(blocks=1)
        pipeline = pipeline_of(model, state_device=where, clip=clip, refit_interval=2, fit_steps=2)
        for step in range(4):
            backward(model, step)
            pipeline.step()
        counts = pipeline.bus.close_window().by_channel()
        assert ("subspace" in counts) == (where == "cpu") and counts["dense"]["down"] > 0
        states.append(everything(pipeline, model))
    assert differing(*states) == []


@pytest.mark.parametrize("where", ["cpu", "accelerator"])
def test_the_payload_is_d_by_d(where: str) -> None:
    model = model_of()
    pipeline = pipeline_of(model, state_device=where, **RANDOM)
    backward(model, 0)
    pipeline.step()
    elements = sum(m.shape[0] * m.shape[1] for u in subspace_units(pipeline) for m in u.matrices)
    moved = pipeline.bus.close_window().by_channel().get("subspace", {"down": 0, "up": 0})
    assert moved == ({"down": 4 * elements, "up": 4 * elements} if where == "cpu" else {"down": 0, "up": 0})
    assert elements * 3.5 < sum(p.numel() for u in subspace_units(pipeline) for _, p in u.params)


def test_an_old_graph_cannot_go_backward_through_weights_that_were_updated_since() -> None:
    model = model_of()
    pipeline = pipeline_of(model, **RANDOM)
    late = model(inputs(0)).sum()
    backward(model, 1)
    pipeline.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_training_model_hands_nothing_over(copied: Any) -> None:
    model = model_of()
    pipeline = pipeline_of(model, **RANDOM)
    other = copied(model)
    backward(other, 0)
    assert not any(unit._acc.any() for unit in subspace_units(pipeline))
    assert all(p.grad is not None for p in other.parameters()) and all(p.grad is None for p in model.parameters())
