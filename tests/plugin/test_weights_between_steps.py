# SPDX-License-Identifier: Apache-2.0
"""Weights that the program itself reads or writes between steps, without a call of ours."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from tests.forked import Forge
from tests.offload.overlap import make_late
from tests.toy import ADAPTER, batch, ds_config, make_engine, tiny_llama, train

BLOCKS: dict[str, dict[str, Any]] = {
    "adapter": {"sparse_adapter": dict(ADAPTER), "train": ["embed_tokens", "layers.1.mlp"]},
    "subspace": {"subspace": {"nonzeros": 2, "projectors": "random"}},
    "tiles": {"sparse_matrix": {"density": 0.2, "block_size": 8, "score": "magnitude", "warmup_steps": 0}},
}
W = "model.layers.1.mlp.up_proj.weight"


def engine_for(method: str, *, stage: int = 2, mode: str = "exact", precision: str = "fp32") -> Any:
    config = ds_config(block={**BLOCKS[method], "schedule": {"mode": mode}}, precision=precision)
    config["zero_optimization"] = (
        {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    )
    model = tiny_llama()
    return make_engine(config, model.bfloat16() if precision == "bf16" and stage == 3 else model)


def step(engine: Any, seed: int = 0) -> None:
    engine.backward(engine(**batch(seed)).loss)
    engine.step()


def stop_training(engine: Any) -> None:
    """Updates from now on change nothing but what masters and weights differ in."""
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0


def by_hand(p: Tensor) -> Tensor:
    thread_saw = []
    thread = threading.Thread(target=lambda: thread_saw.append(p.detach().clone()))
    thread.start()
    thread.join()
    return thread_saw[0]


def saved(p: nn.Parameter) -> Tensor:
    file = io.BytesIO()
    torch.save({"w": p}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["w"]


READS: dict[str, Callable[[nn.Parameter], Tensor]] = {
    "data": lambda p: p.data.clone(),
    "detach": lambda p: p.detach().clone(),
    "numpy": lambda p: torch.from_numpy(np.array(p.detach().numpy())),
    "array": lambda p: torch.from_numpy(np.array(p.data)),
    "foreach": lambda p: torch._foreach_add([p], 0.0)[0].detach(),
    "ema": lambda p: torch.zeros_like(p).lerp_(p, 1.0).detach(),
    "linear": lambda p: nn.functional.linear(torch.eye(p.shape[1]), p).t().detach(),
    "vector": lambda p: nn.utils.parameters_to_vector([p]).view_as(p).detach(),
    "deepcopy": lambda p: copy.deepcopy(p).detach(),
    "save": saved,
    "dlpack": lambda p: torch.from_dlpack(p.detach()).clone(),
    "storage": lambda p: torch.empty(0).set_(p.untyped_storage()).view_as(p).clone(),
    "thread": by_hand,
}


@pytest.mark.parametrize("read", READS)
def test_whoever_reads_a_weight_after_step_sees_what_serial_order_would_show(read: str) -> None:
    seen = []
    for mode in ("serial", "exact"):
        engine = engine_for("subspace", mode=mode)
        if mode == "exact":
            make_late(engine.optimizer.pipeline, 0, 0.05)
        for seed in range(3):
            step(engine, seed)
        seen.append(READS[read](engine.module.get_parameter(W)))
        engine.destroy()
    assert torch.equal(*seen)
    assert type(engine.module.get_parameter(W)) is nn.Parameter


def test_what_programs_do_between_steps_without_reading_values_waits_for_nothing() -> None:
    engine = engine_for("subspace")
    step(engine)
    waiting = [entry for entry in engine.optimizer.pipeline._entries if entry.pending]
    assert waiting
    for p in engine.module.parameters():
        assert isinstance(p, nn.Parameter) and p.requires_grad and p.is_leaf and type(p).__name__ == "Parameter"
        assert p.shape.numel() == p.numel() and p.dtype == torch.float32 and p.grad is None and p.dim() == len(p.shape)
        assert {p: 1}[p] == 1
    engine.zero_grad()
    engine.module.zero_grad()
    engine.module.train()
    assert all(entry.pending for entry in waiting)
    engine.destroy()


@pytest.mark.parametrize("method", ["adapter", "subspace", "tiles"])
def test_touches_at_random_change_nothing_in_exact(method: str) -> None:
    g = torch.Generator().manual_seed(0)
    found = []
    for mode in ("serial", "exact"):
        engine = engine_for(method, mode=mode)
        if mode == "exact":
            make_late(engine.optimizer.pipeline, 1)
        names = [name for name, _ in engine.module.named_parameters()]
        for seed in range(5):
            step(engine, seed)
            for k in torch.randint(len(names), (3,), generator=g).tolist() if mode == "exact" else ():
                engine.module.get_parameter(names[k]).data.sum()
        engine.meft_flush()
        found.append({n: t.clone() for n, t in engine.module.state_dict().items()})
        engine.destroy()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize("method", ["adapter", "subspace", "tiles"])
def test_weights_saved_before_an_evaluation_and_put_back_after_it_go_on_learning(method: str) -> None:
    found = []
    for puts_back in (False, True):
        engine = engine_for(method)
        params = list(engine.module.parameters())
        for seed in range(4):
            step(engine, seed)
            if puts_back:
                mine = [p.detach().clone() for p in params]
                engine.eval()
                engine(**batch(9))
                engine.train()
                for p, v in zip(params, mine, strict=True):
                    p.data.copy_(v)
        engine.meft_flush()
        found.append([p.detach().clone() for p in params])
        engine.destroy()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def write_copy(p: nn.Parameter, v: Tensor) -> None:
    with torch.no_grad():
        p.copy_(v)


def write_data(p: nn.Parameter, v: Tensor) -> None:
    p.data = v.clone()


WRITES: dict[str, Callable[[nn.Parameter, Tensor], Any]] = {
    "copy": write_copy,
    "data.copy": lambda p, v: p.data.copy_(v),
    "data": write_data,
}


@pytest.mark.parametrize("method", ["adapter", "subspace", "tiles"])
@pytest.mark.parametrize(
    ("mode", "write"),
    [("exact", "copy"), ("exact", "data.copy"), ("exact", "data"), ("serial", "data.copy"), ("eager", "data.copy")],
)
def test_values_that_the_program_writes_into_weights_stay(method: str, mode: str, write: str) -> None:
    engine = engine_for(method, mode=mode, precision="bf16")
    for seed in range(6 if mode == "eager" else 2):
        step(engine, seed)
    stop_training(engine)
    trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    wanted = {n: torch.randn_like(p) for n, p in trained.items()}
    for n, p in trained.items():
        WRITES[write](p, wanted[n])
    for seed in (7, 8):
        step(engine, seed)
        assert all(torch.equal(p.data, wanted[n]) for n, p in trained.items())
    engine.destroy()


@pytest.mark.parametrize("when", ["before the first step", "after an evaluation", "before step", "of the inner model"])
@pytest.mark.parametrize("method", ["adapter", "tiles"])
def test_values_stay_whenever_they_are_written(method: str, when: str) -> None:
    engine = engine_for(method)
    stop_training(engine)
    p = engine.module.get_parameter(W)
    v = torch.randn_like(p)
    if when != "before the first step":
        step(engine)
    if when == "after an evaluation":
        engine.eval()
        engine(**batch(1))
        engine.train()
    if when == "before step":
        engine.backward(engine(**batch(1)).loss)
    if when == "of the inner model":
        inner = engine.module.model
        inner.load_state_dict({**inner.state_dict(), W.removeprefix("model."): v})
    else:
        write_copy(p, v)
    if when == "before step":
        engine.step()
    step(engine, 2)
    assert torch.equal(p.data, v)
    engine.destroy()


def test_a_weight_written_after_its_eager_update_began_is_named() -> None:
    engine = engine_for("adapter", mode="eager")
    train(engine, 6)
    engine.backward(engine(**batch(1)).loss)
    assert engine.optimizer.pipeline.has_begun
    write_copy(engine.module.get_parameter(W), torch.zeros(32, 16))
    with pytest.raises(RuntimeError, match=r"layer1\.dense.*before engine\.step"):
        engine.step()
    engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("method", ["adapter", "tiles"])
def test_a_state_dict_that_the_engine_loads_stays(method: str, stage: int) -> None:
    engine = engine_for(method, stage=stage)
    step(engine)
    stop_training(engine)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        state = {name: t.clone() for name, t in engine.module.state_dict().items()}
    step(engine, 1)  # its update may be under way when the state comes
    v = torch.randn(32, 16)
    engine.load_module_state_dict({"module": {**state, W: v}})
    for seed in (2, 3):
        step(engine, seed)
        with deepspeed.zero.GatheredParameters([engine.module.get_parameter(W)]):
            assert torch.equal(engine.module.get_parameter(W).data, v)
    engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("method", ["adapter", "tiles"])
def test_edits_by_gathered_parameters_are_adopted(method: str, stage: int) -> None:
    engine = engine_for(method, stage=stage)
    step(engine)
    stop_training(engine)
    p = engine.module.get_parameter(W)
    with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
        v = torch.randn_like(p)
        write_copy(p, v)
    step(engine, 1)
    with deepspeed.zero.GatheredParameters([p]):
        assert torch.equal(p.data, v)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("method", ["adapter", "subspace", "tiles"])
def test_full_fp32_parameters_are_the_masters(method: str, stage: int) -> None:
    engine = engine_for(method, stage=stage, precision="bf16")
    for seed in range(2):
        step(engine, seed)
    p = engine.module.get_parameter(W)
    full = safe_get_full_fp32_param(p)
    assert full is not None and full.dtype == torch.float32 and full.shape == (32, 16)
    with deepspeed.zero.GatheredParameters([p]):
        assert torch.equal(full.bfloat16(), p.data)
        if method != "subspace":
            assert not torch.equal(full, p.data.float())  # more digits than the weight has
    assert safe_get_full_grad(p) is None
    with pytest.raises(ValueError, match="cannot be set"):
        safe_set_full_grad(p, full)
    if method == "subspace":
        with pytest.raises(ValueError, match="its own shape.*subspace"):
            safe_get_full_optimizer_state(p, "exp_avg")
    else:
        moment = safe_get_full_optimizer_state(p, "exp_avg")
        assert moment is not None and moment.shape == (32, 16) and moment.any()
        safe_set_full_optimizer_state(p, 2 * moment, "exp_avg")
        again = safe_get_full_optimizer_state(p, "exp_avg")
        assert torch.equal(again, 2 * moment)
        with pytest.raises(ValueError, match="exp_avg and exp_avg_sq"):
            safe_get_full_optimizer_state(p, "momentum")
    if stage == 3:
        with pytest.raises(ValueError, match="safe_get_full_fp32_param"):
            safe_get_local_fp32_param(p)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("method", ["adapter", "subspace", "tiles"])
def test_a_full_fp32_parameter_that_is_set_stays(method: str, stage: int) -> None:
    engine = engine_for(method, stage=stage)
    step(engine)
    stop_training(engine)
    p = engine.module.get_parameter(W)
    v = torch.randn(32, 16)
    with pytest.raises(ValueError, match="shape"):
        safe_set_full_fp32_param(p, v[:3])
    safe_set_full_fp32_param(p, v)
    assert torch.equal(safe_get_full_fp32_param(p), v)
    step(engine, 1)
    with deepspeed.zero.GatheredParameters([p]):
        assert torch.equal(p.data, v)
    assert torch.equal(safe_get_full_fp32_param(p), v)
    engine.destroy()


def test_a_frozen_parameter_has_no_fp32_state() -> None:
    engine = engine_for("adapter")
    frozen = engine.module.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert safe_get_full_fp32_param(frozen) is None
    with pytest.raises(ValueError, match=r"q_proj\.weight does not train"):
        safe_set_full_fp32_param(frozen, frozen.data)
    engine.destroy()
    assert not hasattr(frozen, "_hp_mapping")


def test_a_program_that_calls_the_inner_model_has_its_projectors_fitted() -> None:
    engine = make_engine(ds_config(block={"subspace": {"nonzeros": 2, "fit_steps": 2}}), tiny_llama())
    for seed in range(3):
        inputs = batch(seed)
        h = engine.module.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
        logits = nn.functional.linear(h, engine.module.lm_head.weight)
        engine.backward(nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten()))
        engine.step()
    assert engine.meft_stats()["subspace"]["checks"] == 1
    engine.destroy()


@pytest.mark.parametrize(
    ("method", "stage"),
    [
        ("adapter", 2),
        ("adapter", 3),
        pytest.param("tiles", 2, marks=pytest.mark.slow),
        pytest.param("tiles", 3, marks=pytest.mark.slow),
        pytest.param("subspace", 2, marks=pytest.mark.slow),
        pytest.param("subspace", 3, marks=pytest.mark.slow),
    ],
)
def test_ranks_read_alone_and_write_together(forge: Forge, tmp_path: Path, method: str, stage: int) -> None:
    call = "tests.plugin.edit_ranks:reads_and_writes"
    one, other = forge.results(call, tmp_path / "ranks", method=method, stage=stage)
    assert one == other
    assert all(one.values())
