# SPDX-License-Identifier: Apache-2.0
"""Training of chosen tiles without DeepSpeed, against dense training by torch."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from meft_ds.offload.pipeline import Pipeline
from meft_ds.sparse_matrix.choice.choice import Choice
from meft_ds.sparse_matrix.unit import TilesUnit
from tests.sparse_matrix.hand import choice_of, pipeline_of
from tests.subspace.hand import HYPER, backward, differing, everything, inputs, model_of
from tests.toy import batch, tiny_llama

Chosen = Callable[[int], bool]


def every(i: int) -> bool:
    return True


def some(i: int) -> bool:
    return i % 7 in (0, 3)


def build(
    tmp_path: Path, keep: Chosen = some, dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[nn.Module, Pipeline, Choice]:
    model = model_of().to(dtype)
    choice = choice_of(model, keep=keep)
    choice.save(tmp_path / "tiles.json")
    return model, pipeline_of(model, tmp_path / "tiles.json", **more), choice


def functions(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def mask_of(choice: Choice, model: nn.Module) -> dict[str, Tensor]:
    """True where an element trains."""
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for tile in choice.tiles:
        mask = masks[tile.name] if tile.expert is None else masks[tile.name][tile.expert]
        mask[slice(*tile.rows), slice(*tile.cols)] = True
    return masks


def weights_of(model: nn.Module, pipeline: Pipeline) -> dict[str, Tensor]:
    """The weights after all updates."""
    pipeline.flush()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# What it computes


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_training_all_tiles_is_adamw_on_those_matrices(tmp_path: Path, clip: float) -> None:
    """With linear layers and Conv1D, one called twice, one read outside its forward, experts; two micro-batches."""
    hyper = dataclasses.replace(HYPER, eps=1e-3)  # clipped gradients are about as large: Adam does not undo clipping
    model, pipeline, choice = build(tmp_path, every, clip=clip, hyper=hyper)
    twin = model_of().requires_grad_(False)
    weights = {name: twin.get_parameter(name).requires_grad_(True) for name in choice.shapes}
    assert len(weights) == 18
    optimizer = torch.optim.AdamW(
        weights.values(), lr=hyper.lr, betas=(hyper.beta1, hyper.beta2), eps=hyper.eps, weight_decay=hyper.weight_decay
    )
    for step in range(4):
        for module in (model, twin):
            for micro in range(2):
                backward(module, 10 * step + micro)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        result = pipeline.step()
        assert result.grad_norm == pytest.approx(float(norm), rel=3e-4)
        assert clip == 0.0 or result.grad_norm > clip
    found = weights_of(model, pipeline)
    for name, p in twin.named_parameters():
        torch.testing.assert_close(found[name], p.detach(), rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_leaves_outputs_unchanged_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    plain = model_of().to(dtype)
    model, pipeline, _ = build(tmp_path, dtype=dtype)
    x = inputs(3).to(dtype)
    assert torch.equal(functions(model, x), functions(plain, x))
    assert torch.equal(model(x), plain(x)), "with gradients it is another path"
    pipeline.close()
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_chosen_elements_change_and_all_of_them_do(tmp_path: Path, dtype: torch.dtype) -> None:
    base = model_of().to(dtype)
    model, pipeline, choice = build(tmp_path, dtype=dtype)
    for step in range(4):
        backward(model, step)
        assert not pipeline.step().overflow
    pipeline.close()
    for name, mask in mask_of(choice, model).items():
        changed = model.get_parameter(name) != base.get_parameter(name)
        assert not changed[~mask].any(), name
        # a step of 4 lr is below half a unit of bfloat16 in the last place of large values
        assert bool(changed[mask].all()) if dtype == torch.float32 else changed[mask].sum() >= 0.9 * mask.sum(), name


def test_steps_too_small_for_bfloat16_add_up(tmp_path: Path) -> None:
    hyper = dataclasses.replace(HYPER, lr=1e-4, weight_decay=0.0)
    model, pipeline, choice = build(tmp_path, dtype=torch.bfloat16, hyper=hyper)
    start = weights_of(model, pipeline)
    for _ in range(60):
        backward(model, 0)
        pipeline.step()
    found, masks = weights_of(model, pipeline), mask_of(choice, model)
    large = {name: mask & (start[name].abs() > 0.25) for name, mask in masks.items()}  # a step is 1/10 of a round there
    count = sum(int(mask.sum()) for mask in large.values())
    moved = sum(int((found[name] != start[name])[mask].sum()) for name, mask in large.items())
    assert count > 100 and moved > 0.5 * count


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_overflow_changes_nothing(tmp_path: Path, bad: float) -> None:
    model, pipeline, _ = build(tmp_path)
    _, twin_pipeline, _ = twin = build(tmp_path)
    for step in range(3):
        for each, pipe in ((model, pipeline), twin[:2]):
            backward(each, step)
            pipe.step()
        before = everything(pipeline, model)
        backward(model, 50)
        backward(model, 51, factor=bad)
        assert pipeline.step().overflow
        assert differing(before, everything(pipeline, model)) == []
    assert differing(everything(pipeline, model), everything(twin_pipeline, twin[0])) == []


@pytest.mark.parametrize("how", ["reentrant", "nonreentrant"])
def test_checkpointed_layers_train_to_the_same_bits(tmp_path: Path, how: str) -> None:
    def run(how: str) -> dict[str, Any]:
        model, pipeline, _ = build(tmp_path)
        for step in range(3):
            x = inputs(step).requires_grad_(True)
            for block in model.layers:
                x = block(x) if how == "none" else checkpoint(block, x, use_reentrant=how == "reentrant")
            x.square().mean().backward()
            pipeline.step()
        return everything(pipeline, model)

    assert differing(run("none"), run(how)) == []


@pytest.mark.parametrize("settings", [{}, {"moments": torch.bfloat16}])
def test_state_where_the_model_is_gives_the_same_bits(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if settings:
        from tests.sparse_matrix import hand

        run_of = hand.run_of
        monkeypatch.setattr(hand, "run_of", lambda m: dataclasses.replace(run_of(m), moments_dtype=torch.bfloat16))
    found = []
    for where in ("cpu", "accelerator"):
        model, pipeline, _ = build(tmp_path, state_device=where, dtype=torch.bfloat16)
        for step in range(4):
            backward(model, step)
            pipeline.step()
        assert all(unit.on_device == (where == "accelerator") for unit in pipeline.units)
        found.append(everything(pipeline, model))
        dtypes = {t.dtype for name, t in found[-1].items() if "exp_avg" in name}
        assert dtypes == {settings.get("moments", torch.float32)}
    assert differing(*found) == []


class Untouchable(TorchDispatchMode):
    """Fails whoever asks anything of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the host lane")


def test_with_state_where_the_model_is_the_host_lane_reads_no_device_memory_for_the_norm(tmp_path: Path) -> None:
    """It would wait for the backward that is queued by then, and `eager` updates with it."""
    model, pipeline, _ = build(tmp_path, state_device="accelerator")
    backward(model, 0)
    for unit in pipeline.units:
        unit.collect()
        unit.reduce(pipeline.ranks)
        assert isinstance(unit, TilesUnit) and unit._payload is not None
        squares = unit._payload.double().square().sum().item()
        unit.send(pipeline.bus)
        with Untouchable():
            norm = unit.sq_norm()
        assert norm == pytest.approx(squares, rel=1e-12) and norm > 0.0


# What requires grad


@pytest.mark.parametrize("how", ["none", "nonreentrant", "reentrant"])
def test_backward_ends_at_the_lowest_layer_with_tiles(tmp_path: Path, how: str) -> None:
    """Reentrant checkpoints cannot end there, but train the same."""

    def run(how: str) -> tuple[dict[str, Tensor], list[str]]:
        model = tiny_llama(layers=3).train()
        if how != "none":
            model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
            model.disable_input_require_grads()  # which transformers turns on, whether it is needed or not
        tiles = choice_of(model)
        kept = tuple(t for t in tiles.tiles if t.layer == 1 and t.role in ("o", "up") and t.rows[0] == 4)
        shapes = {name: shape for name, shape in tiles.shapes.items() if name in {t.name for t in kept}}
        dataclasses.replace(tiles, tiles=kept, shapes=shapes).save(tmp_path / "tiles.json")
        pipeline = pipeline_of(model, tmp_path / "tiles.json")
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(shapes)
        reached: list[str] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                y = output[0] if isinstance(output, tuple) else output
                if isinstance(y, Tensor) and y.requires_grad:
                    y.register_hook(lambda grad: reached.append(name))

            return hook

        for name, module in model.named_modules():
            module.register_forward_hook(watch(name))
        for step in range(2):
            model(**batch(step)).loss.backward()
            assert all(p.grad is None for p in model.parameters())
            pipeline.step()
        return everything(pipeline, model), reached

    plain, reached = run("none")
    below = {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.embed_tokens"}
    assert below.isdisjoint(reached) and not any("layers.0" in name for name in reached)
    assert {"model.layers.1.self_attn.o_proj", "model.layers.2.self_attn.q_proj"} <= set(reached)
    if how != "none":
        other, reached = run(how)
        assert differing(plain, other) == []
        assert any("layers.0" in name for name in reached) == (how == "reentrant")


def test_a_backward_through_weights_that_were_updated_since_its_forward_fails(tmp_path: Path) -> None:
    model, pipeline, _ = build(tmp_path, every)
    stale = model(inputs(0)).square().mean()
    backward(model, 1)
    pipeline.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# The model beside its units


def test_a_closed_pipeline_leaves_an_ordinary_model_with_what_was_learned(tmp_path: Path) -> None:
    model, pipeline, _ = build(tmp_path)
    for step in range(3):
        backward(model, step)
        pipeline.step()
    learned, out = weights_of(model, pipeline), functions(model, inputs(9))
    pipeline.close()
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert all(torch.equal(p, learned[name]) for name, p in model.named_parameters())
    torch.testing.assert_close(functions(model, inputs(9)), out, rtol=1e-5, atol=1e-5)
    backward(model, 3)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(p, learned[name]) for name, p in model.named_parameters())
    pipeline.close()  # a second time does nothing
    assert all(torch.equal(p, learned[name]) for name, p in model.named_parameters())


def copied(model: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_computes_what_the_model_does_and_is_a_model_of_its_own(tmp_path: Path, how: str) -> None:
    model, pipeline, _ = build(tmp_path)
    assert list(model.state_dict()) == list(model_of().state_dict())
    backward(model, 0)
    pipeline.step()
    twin = copied(model, how)
    out = functions(model, inputs(5))
    assert torch.equal(functions(twin, inputs(5)), out)
    plain = model_of()
    plain.load_state_dict(weights_of(model, pipeline))
    before = everything(pipeline, model)
    for each in (twin, plain):
        backward(each, 5)
    assert not any(unit._acc.any() for unit in pipeline.units)
    for name, p in twin.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, plain.get_parameter(name).grad, rtol=1e-3, atol=1e-3, msg=name)
    backward(model, 6)
    pipeline.step()
    assert set(differing(before, everything(pipeline, model))) and torch.equal(functions(twin, inputs(5)), out)


def test_state_and_gradients_take_16_bytes_for_each_trained_element(tmp_path: Path, record_property: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _, pipeline, choice = build(tmp_path, dtype=dtype)
        state = [t for unit in pipeline.units for name, t in unit.state_tensors().items() if name != "original"]
        total = sum(t.untyped_storage().nbytes() for t in [*state, *(unit._acc for unit in pipeline.units)])
        assert total == pytest.approx(16 * choice.elements, rel=0.01)
        rest = [t for unit in pipeline.units for t in (unit.original, unit._reply)]
        beside = sum(t.untyped_storage().nbytes() for t in rest) / choice.elements
        record_property(f"{dtype} bytes per element beside those", beside)
        assert beside <= dtype.itemsize * 2
        stats = pipeline.method.stats()  # type: ignore[attr-defined]
        assert stats["state_bytes"] + stats["gradient_bytes"] == 16 * choice.elements
