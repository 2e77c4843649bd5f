# SPDX-License-Identifier: Apache-2.0
"""Tapped layers: the same function and the same other gradients, and who gets the activations."""

from __future__ import annotations

import copy
import gc
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from meft_ds.offload.model.capture import can_tap, tap, untap
from meft_ds.offload.model.discover import weights


class Recorder:
    """Sums up the weight gradient, [out, in], as a unit would."""

    def __init__(self) -> None:
        self.gradient: Any = 0.0
        self.calls: list[int] = []

    def tapped(self, index: int, x: Tensor, dy: Tensor) -> None:
        assert not torch.is_grad_enabled() and not x.requires_grad and not dy.requires_grad
        self.calls.append(index)
        self.gradient += dy.reshape(-1, dy.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()


class Operators(TorchDispatchMode):
    """Remembers the names of what is run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def layer(kind: str, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 3, bias=bias) if kind == "linear" else Conv1D(3, 5)


@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv1d", True)])
@pytest.mark.parametrize("how", ["plain", "reentrant", "nonreentrant", "twice", "autocast", "keyword"])
def test_output_and_all_other_gradients_are_the_same_bits_and_the_weights_is_handed_over(
    kind: str, bias: bool, how: str
) -> None:
    found = []
    for tapped in (False, True):
        module, recorder = layer(kind, bias), Recorder()
        if tapped:
            tap(module, recorder, 7)
        x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
        if "reentrant" in how:
            y = checkpoint(module, x, use_reentrant=how == "reentrant")
        elif how == "twice":
            y = module(x) * module(x.flip(0))
        elif how == "keyword":
            y = module(**{"input" if kind == "linear" else "x": x})
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                y = module(x)
        y.float().sin().sum().backward()
        weight = module.weight.grad
        if tapped:
            assert weight is None and recorder.calls == [7] * (2 if how == "twice" else 1)
            weight = recorder.gradient if kind == "linear" else recorder.gradient.T
        found.append((y.detach(), x.grad, None if not bias else module.bias.grad, weight))
    (y, dx, db, dw), (y2, dx2, db2, dw2) = found
    assert torch.equal(y, y2) and torch.equal(dx, dx2) and (db is None or torch.equal(db, db2))
    assert y.dtype == y2.dtype == (torch.bfloat16 if how == "autocast" else torch.float32)
    tolerance = 2e-2 if how == "autocast" else 1e-5
    torch.testing.assert_close(dw2, dw, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize("kind", ["linear with bias", "linear", "conv1d"])
def test_layers_with_and_without_a_bias_take_inputs_of_any_rank_and_what_follows_may_work_in_place(
    kind: str, partitioned: bool
) -> None:
    shapes: list[tuple[int, ...]] = [(5,), (4, 5), (2, 4, 5), (2, 3, 4, 5)]
    for shape, dtype, grad, checkpointing in product(shapes, (torch.float32, torch.bfloat16), (True, False), range(3)):
        if checkpointing == 1 and not grad:
            continue  # the reentrant kind needs an input that requires grad
        found = []
        for tapped in (False, True):
            module, recorder = layer(kind.split()[0], bias="bias" in kind).to(dtype), Recorder()
            if tapped:
                # under ZeRO-3 the weight requires no grad, and an anchor that does stands for it
                module.weight.requires_grad_(not partitioned)
                tap(module, recorder, 0, anchor=torch.zeros((), requires_grad=True) if partitioned else None)
            given = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_(grad)

            def call(x: Tensor, module: nn.Module = module) -> Tensor:
                torch.manual_seed(3)
                return nn.functional.dropout(module(x.sin()).mul_(2.0), 0.3, inplace=True)

            y = call(given) if not checkpointing else checkpoint(call, given, use_reentrant=checkpointing == 1)
            y.float().square().sum().backward()
            bias = module.bias
            found.append((y.detach(), given.grad, None if bias is None else bias.grad))
            assert recorder.calls == [0] * tapped, (shape, dtype, grad, checkpointing)
        for plain, ours in zip(*found, strict=True):
            if plain is not None or ours is not None:
                torch.testing.assert_close(ours, plain, msg=str((shape, dtype, grad, checkpointing)))


@pytest.mark.parametrize("partitioned", [False, True])
def test_a_bias_costs_no_copy_of_the_output_or_of_its_gradient(partitioned: bool) -> None:
    module, recorder = layer("linear"), Recorder()
    module.weight.requires_grad_(not partitioned)
    tap(module, recorder, 0, anchor=torch.zeros((), requires_grad=True) if partitioned else None)
    x = torch.randn(2, 4, 5, requires_grad=True)
    with Operators() as used:
        y = module(x)
        y.backward(torch.ones_like(y))
    assert not [name for name in used.names if "copy" in name or "clone" in name], used.names


def test_a_first_layer_without_bias_hands_over_though_its_input_needs_no_gradient() -> None:
    module, recorder = layer("linear", bias=False), Recorder()
    tap(module, recorder, 0)
    module(torch.ones(2, 5)).sum().backward()
    assert recorder.calls == [0] and torch.equal(recorder.gradient, torch.full((3, 5), 2.0))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("why", ["frozen", "no_grad", "receiver is gone", "untapped"])
def test_nothing_is_handed_over_when(kind: str, why: str) -> None:
    module, recorder = layer(kind), Recorder()
    plain = layer(kind)
    tap(module, recorder, 0)
    if why == "frozen":
        module.weight.requires_grad_(False)
    elif why == "receiver is gone":
        recorder = Recorder()
        gc.collect()
    elif why == "untapped":
        untap(module, recorder)
        assert module.__dict__.get("forward") is None
    with torch.set_grad_enabled(why != "no_grad"):
        y = module(torch.ones(2, 5))
    assert torch.equal(y, plain(torch.ones(2, 5)))
    if why != "no_grad":
        y.sum().backward()
        assert (module.weight.grad is None) == (why == "frozen") and module.bias.grad is not None
    assert recorder.calls == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_computes_with_its_own_weights_and_hands_nothing_over(copied: Any) -> None:
    model, recorder = nn.Sequential(layer("linear"), nn.Tanh()), Recorder()
    tap(model[0], recorder, 0)
    other = copied(model)
    with torch.no_grad():
        other[0].weight.zero_()
        other[0].bias.fill_(1.0)
    y = other(torch.ones(2, 5))
    assert torch.equal(y, torch.ones(2, 3).tanh())
    y.sum().backward()
    assert recorder.calls == [] and other[0].weight.grad is not None and model[0].weight.grad is None
    assert can_tap(other[0]), "an engine of its own may tap the copy"
    its = Recorder()
    tap(other[0], its, 4)
    other(torch.ones(2, 5)).sum().backward()
    assert its.calls == [4] and recorder.calls == []


def test_state_dicts_have_the_usual_keys_and_a_replaced_forward_cannot_be_tapped() -> None:
    module = layer("linear")
    tap(module, Recorder(), 0)
    assert list(module.state_dict()) == ["weight", "bias"]
    other = layer("linear")
    other.forward = lambda x: nn.Linear.forward(other, x) * 2  # type: ignore[method-assign]
    assert can_tap(module) and not can_tap(other)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("how", ["plain", "reentrant", "nonreentrant"])
def test_only_the_features_to_keep_live_on_and_are_handed_over(kind: str, how: str) -> None:
    whole, part, keep = Recorder(), Recorder(), torch.tensor([0, 3])
    for recorder, kept in ((whole, None), (part, keep)):
        module = layer(kind)
        tap(module, recorder, 0, kept)
        x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
        if how == "plain":
            saved: list[tuple[int, int]] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: (saved.append((t.numel(), t.untyped_storage().nbytes())), t)[1], lambda t: t
            ):
                y = module(x)
            kept_numel = x.numel() if kept is None else 2 * 4 * len(keep)
            assert (kept_numel, 4 * kept_numel) in saved
            assert kept is None or all(numel != x.numel() for numel, _ in saved)
        else:
            y = checkpoint(module, x, use_reentrant=how == "reentrant")
        y.sin().sum().backward()
    torch.testing.assert_close(part.gradient, whole.gradient[:, keep])


class InOtherWords(nn.Linear):
    """As Falcon's layers."""

    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class WithMore(nn.Linear):
    """As a layer that somebody put an adapter into, which adds nothing yet."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.more = nn.Parameter(torch.zeros(self.out_features, self.in_features))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.more.T


def test_subclasses_of_linear_count_as_one_where_they_compute_what_it_does() -> None:
    model = nn.ModuleDict(
        {
            "words": InOtherWords(5, 3),
            "words_without_bias": InOtherWords(5, 3, False),
            "renamed": type("Renamed", (nn.Linear,), {})(5, 3),
            "scaled": Scaled(5, 3),
            "more": WithMore(5, 3),
            "attention": nn.MultiheadAttention(4, 2),  # reads its output projection and never calls it
        }
    )
    found = {name: can_tap(module) for name, module, _, _ in weights(model)}
    assert found == {"words": True, "words_without_bias": True, "renamed": True, "attention.out_proj": False}


def test_a_convolution_has_no_matrices_whether_its_weight_is_computed_or_not() -> None:
    """Wav2Vec2's positions are one under weight norm, whose parts have three dimensions, as tensors of experts have."""
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 4, groups=2), dim=2)
    assert [name for name, *_ in weights(nn.Sequential(normed, nn.Conv1d(8, 8, 4), nn.Linear(4, 4)))] == ["2"]
