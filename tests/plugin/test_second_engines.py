# SPDX-License-Identifier: Apache-2.0
"""Engines that only evaluate (reference, reward and teacher models, an evaluation before training) are DeepSpeed's own.

Programs give them a copy of the ds_config. tests/e2e/test_trl.py has the trainers that do.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import Forge
from tests.toy import ADAPTER, batch, ds_config, make_engine, tiny_llama, train

BLOCKS: dict[str, dict[str, Any]] = {
    "adapter": {"sparse_adapter": dict(ADAPTER)},
    "subspace": {"subspace": {"dim": 8, "nonzeros": 2}},
    "tiles": {"sparse_matrix": {"density": 0.2, "block_size": 6}},
}
WAYS = ("no optimizer", "frozen", "nothing to train")


def evaluating(way: str, block: dict[str, Any], **extra: Any) -> Any:
    """An engine as programs make it that only want to evaluate; the config is left as it was."""
    model, config = tiny_llama(), ds_config(block=block, scheduler={"type": "WarmupLR", "params": {}}, **extra)
    given: dict[str, Any] = {}
    if way == "no optimizer":
        del config["optimizer"], config["scheduler"]
    elif way == "frozen":
        model.requires_grad_(False)
    else:
        given["model_parameters"] = []
    before = copy.deepcopy(config)
    engine = make_engine(config, model, **given)
    assert config == before
    return engine


def is_deepspeeds_own(engine: Any, plain: torch.Tensor, precision: str = "fp32") -> None:
    assert type(engine).__name__ == "DeepSpeedEngine" and type(engine).__module__ == "deepspeed.runtime.engine"
    assert not any("meft" in name for name, _ in engine.module.named_modules())
    engine.eval()
    with torch.no_grad():
        found = engine(**batch(0)).logits
    torch.testing.assert_close(found.float(), plain, **({} if precision == "fp32" else {"atol": 0.1, "rtol": 0.1}))


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    with torch.no_grad():
        return tiny_llama().eval()(**batch(0)).logits


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("way", WAYS)
def test_an_engine_that_cannot_train_is_deepspeeds_own(
    way: str, stage: int, plain: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    for block in BLOCKS.values():
        caplog.clear()
        with caplog.at_level(logging.INFO, "meft_ds"):
            is_deepspeeds_own(evaluating(way, block, zero_optimization=zero), plain)
        (line,) = [r.getMessage() for r in caplog.records if r.name == "meft_ds"]
        assert "only evaluates" in line


def test_a_reference_model_in_bf16_has_no_rows(plain: torch.Tensor) -> None:
    engine = evaluating("no optimizer", BLOCKS["adapter"], precision="bf16", zero_optimization={"stage": 0})
    is_deepspeeds_own(engine, plain, "bf16")


def test_a_reference_model_beside_a_model_that_trains_changes_nothing() -> None:
    def run(way: str | None) -> list[float]:
        if way is not None:
            evaluating(way, BLOCKS["adapter"])
        return train(make_engine(ds_config(block=BLOCKS["adapter"])), 3)

    assert run("frozen") == run(None)


@pytest.mark.parametrize("given", ["optimizer", "callable", "all parameters", "nothing"])
def test_an_engine_with_an_optimizer_and_trainable_parameters_is_ours(given: str) -> None:
    model, config = tiny_llama().eval(), ds_config(block=BLOCKS["adapter"])
    kwargs: dict[str, Any] = {
        "optimizer": {"optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2)},
        "callable": {"optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2)},
        "all parameters": {"model_parameters": model.parameters()},
        "nothing": {"model_parameters": None},
    }[given]
    if "optimizer" in kwargs:
        del config["optimizer"]
    engine = make_engine(config, model, **kwargs)
    assert type(engine).__name__ == "MeftEngine"


def test_in_stage_3_an_engine_that_cannot_train_is_deepspeeds_own_and_partitioned(forge: Forge, tmp_path: Path) -> None:
    forge.results(in_stage_3, tmp_path, world=1)


def in_stage_3(folder: Path) -> None:
    with torch.no_grad():
        plain = tiny_llama().eval()(**batch(0)).logits
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_optimizer": {"device": "cpu"}}
    for way, block in zip(WAYS, BLOCKS.values(), strict=True):
        engine = evaluating(way, block, zero_optimization=zero)
        assert sum(p.numel() for p in engine.module.parameters()) == 0, "partitioned"
        for _ in range(2):  # after a single forward DeepSpeed itself fails where a second engine takes a model over
            is_deepspeeds_own(engine, plain)
    # an evaluation before training: an engine that trains takes the model over
    config = ds_config(block=BLOCKS["subspace"], zero_optimization=zero)
    engine, twin = make_engine(config, engine.module.requires_grad_(True).train()), make_engine(config)
    assert type(engine).__name__ == type(twin).__name__ == "MeftEngine"
    assert train(engine, 3) == train(twin, 3)


@pytest.mark.parametrize(
    "key",
    ["meft_ofload", "meft-offload", "MEFT_offload", "meft", "mfet_offload", "optimizer.meft_offload"],
)
def test_a_misspelt_block_is_warned_of_once(key: str, caplog: pytest.LogCaptureFixture) -> None:
    from meft_ds.plugin import decision

    decision._told.clear()
    config, holder = ds_config(block=None), key.partition(".")
    if holder[1]:
        config[holder[0]][holder[2]] = {}
    else:
        config[key] = {}
    with caplog.at_level(logging.WARNING, "meft_ds"):
        for _ in range(2):
            assert type(make_engine(config)).__name__ == "DeepSpeedEngine"
    (line,) = [r.getMessage() for r in caplog.records if r.name == "meft_ds"]
    assert f'"{key}"' in line and '"meft_offload"' in line


def test_no_key_of_deepspeeds_own_passes_for_a_misspelt_block() -> None:
    from deepspeed.runtime import config, constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from meft_ds.plugin.decision import near_misses

    keys = {value for module in (config, constants) for value in vars(module).values() if isinstance(value, str)}
    assert len(keys) > 100
    nested = dict.fromkeys([*DeepSpeedZeroConfig.model_fields, "cpu_offload", "cpu_offload_params"])
    assert list(near_misses({**dict.fromkeys(keys), "zero_optimization": nested})) == []
