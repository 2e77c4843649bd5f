# SPDX-License-Identifier: Apache-2.0
"""Every fault of a user's ends in a ValueError that says what was expected and how to fix it."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from meft_ds.plugin import build
from meft_ds.plugin.ds_config import conflicts
from meft_ds.sparse_adapter import attach
from meft_ds.sparse_matrix import plan
from tests.toy import ADAPTER, ds_config, make_engine, single_rank, tiny_llama


def refused(config: dict[str, Any], model: nn.Module | None = None, **kwargs: Any) -> str:
    with pytest.raises(ValueError) as e:
        make_engine(config, model, **kwargs)
    return str(e.value)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"sparse_adapter": {**ADAPTER, "row": 3}}, "sparse_adapter.row: unknown key; did you mean 'rows'?"),
        ({"sparse_adapter": {**ADAPTER, "rows": 8}}, "keys_per_token: 9 is more than rows = 8"),
        ({"sparse_adapter": {**ADAPTER, "experts": 41}}, "experts: 41 is more than rows = 40"),
        ({"sparse_adapter": {**ADAPTER, "keys_per_token": 0}}, "keys_per_token"),
        ({"sparse_adapter": {**ADAPTER, "experts_per_token": 0}}, "experts_per_token"),
        ({"subspace": {"dims": 4}}, "subspace.dims: unknown key; did you mean 'dim'?"),
        ({"subspace": {"dim": 1.5}}, "subspace.dim: expected a fraction below 1 or a whole number"),
        ({"subspace": {"target_modules": "q_prj"}}, "target_modules ['q_prj'] matches no whole module name"),
        ({"subspace": {"dim": 8, "nonzeros": 9}}, "too small for subspace.dim 8"),
        (None, "meft_offload: expected an object such as"),
    ],
)
def test_faults_in_the_block_reach_the_user_through_deepspeed_initialize(block: Any, expected: str) -> None:
    config = ds_config()
    config["meft_offload"] = block
    assert expected in refused(config)


def test_negative_learning_rate_is_refused_from_the_config_and_from_code() -> None:
    config = ds_config()
    config["optimizer"]["params"]["lr"] = -1e-3
    assert "optimizer.params.lr: expected a number >= 0, got -0.001" in refused(config)
    del config["optimizer"]
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.param_groups[0]["lr"] = -1.0
    assert "group 0: lr must be a finite number >= 0, got -1.0" in refused(config, model, optimizer=optimizer)


def test_optimizers_other_than_adamw_are_refused() -> None:
    config = ds_config()
    del config["optimizer"]
    model = tiny_llama()
    assert "passes SGD; pass torch.optim.AdamW" in refused(
        config, model, optimizer=torch.optim.SGD(model.parameters(), lr=1)
    )
    adam = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    assert "only decoupled weight decay" in refused(config, tiny_llama(), optimizer=adam)


def test_a_model_without_an_ffn_gets_the_candidate_names() -> None:
    class NoFfn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    message = refused(ds_config(), NoFfn())
    assert "first: it is a single linear layer from 4 to 4 values" in message and "target_modules" in message


@pytest.mark.parametrize(
    ("zero", "told"),
    [
        ({"stage": 4}, "zero_optimization.stage: expected 0, 1, 2 or 3, got 4"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param: works with stage 3 only"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, '"nvme" does not go with meft_offload; use "cpu"'),
        ({"stage": 3, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size: does not go with"),
        ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights: does not go with"),
    ],
)
def test_zero_settings_that_do_not_go_with_it_are_refused(zero: dict[str, Any], told: str) -> None:
    assert told in "; ".join(conflicts({"zero_optimization": zero}))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"checkpoint": {"writer": {"type": "python"}}},
            "checkpoint.writer: expected no such key, got {'type': 'python'}",
        ),
        ({"checkpoint": {"writer": {"decoupled": True}}}, "needs DeepSpeed's default writer, torch.save; remove it"),
        ({"datastates_ckpt": {}}, "datastates_ckpt: expected no such key or false, got {}"),
        ({"nebula": {"enabled": True}}, "nebula.enabled: expected false, got True"),
        ({"checkpoint": {"use_node_local_storage": True}}, "give save_checkpoint a folder on shared storage"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal: expected false, got true"),
    ],
)
def test_checkpoint_settings_that_do_not_go_with_it_are_refused(settings: dict[str, Any], told: str) -> None:
    assert told in "; ".join(conflicts(settings))
    assert conflicts({"checkpoint": {"tag_validation": "Fail"}, "datastates_ckpt": False, "nebula": {}}) == []


def test_pipeline_models_are_refused() -> None:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    single_rank()
    deepspeed.init_distributed("gloo")
    config = ds_config(zero_optimization={"stage": 0})
    model = PipelineModule(layers=[nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=1, loss_fn=nn.MSELoss())
    assert "does not go with PipelineEngine: pass a plain nn.Module" in refused(config, model)


def test_hybrid_engine_is_refused() -> None:
    config = ds_config(hybrid_engine={"enabled": True})
    assert "hybrid_engine" in refused(config)


def test_too_little_host_memory_names_needed_free_and_the_knob(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ds_config()
    config["meft_offload"]["host_memory_gb"] = 1e-6
    assert "host_memory_gb allows 1.0 KiB" in refused(config)
    monkeypatch.setattr(build, "free_host_bytes", lambda: 1000)
    message = refused(ds_config())
    assert (
        re.search(r"needs [\d.]+ KiB", message) and "sparse_adapter.rows" in message and "free on this node" in message
    )


def test_a_train_pattern_that_matches_nothing_is_refused() -> None:
    config = ds_config()
    config["meft_offload"]["train"] = ["lm_heat"]
    assert "'lm_heat' matches no parameter; names look like model.embed_tokens.weight" in refused(config)


@pytest.mark.parametrize("settings", [{"rows": 1_000_000_000}, {"rows": 2**31 - 1, "experts": 2**31 - 1}])
def test_rows_that_no_host_can_hold_are_refused_before_any_memory_is_taken(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*args: Any) -> None:
        raise AssertionError("keys were drawn before the check")

    monkeypatch.setattr(attach, "init_keys", taken)
    monkeypatch.setattr(build, "free_host_bytes", lambda: 2**36)
    model = tiny_llama()
    names = [name for name, _ in model.named_modules()]
    told = refused(ds_config(block={"sparse_adapter": settings}), model)
    assert "GiB of host memory" in told and "64.00 GiB are free" in told and 'lower "sparse_adapter.rows"' in told
    assert [name for name, _ in model.named_modules()] == names, "the model is as it was"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_at_the_start_are_named(value: float, caplog: pytest.LogCaptureFixture) -> None:
    for broken in (True, False):
        model = tiny_llama()
        if broken:
            model.model.layers[1].mlp.up_proj.weight.data[3, 3] = value
        caplog.clear()
        make_engine(ds_config(), model)
        lines = [r.getMessage() for r in caplog.records if "NaN or infinite" in r.getMessage()]
        assert len(lines) == broken and all("model.layers.1.mlp.up_proj.weight holds NaN" in line for line in lines)


def test_auto_that_nobody_fills_in_is_named() -> None:
    config = ds_config()
    config["optimizer"]["params"]["lr"] = "auto"
    assert 'optimizer.params.lr: expected a number, got "auto"' in refused(config)


@pytest.mark.parametrize("lr", [1e308, 10**400, "1e-4"], ids=["float", "whole", "text"])
def test_learning_rates_of_a_program_that_no_update_can_have_are_named(lr: Any) -> None:
    config = ds_config()
    del config["optimizer"]
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.param_groups[0]["lr"] = lr
    assert "parameter group 0: lr must be" in refused(config, model, optimizer=optimizer)


def test_tiles_too_small_for_the_host_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "choose", lambda *args: pytest.fail("tiles were chosen before the check"))
    block = {"sparse_matrix": {"block_size": 1, "score": "random", "density": 0.5}}
    monkeypatch.setattr(build, "free_host_bytes", lambda: 500_000)  # 5,120 values, each a tile, half of them chosen
    told = refused(ds_config(block=block))
    assert "of host memory (before moments and buffers)" in told and 'raise "sparse_matrix.block_size"' in told
