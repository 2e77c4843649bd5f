# SPDX-License-Identifier: Apache-2.0
"""Rows, routers and tensors in no parameter group get the learning rate of a group that trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.toy import ADAPTER, ds_config, make_engine, tiny_llama, train

BLOCK = {"sparse_adapter": dict(ADAPTER), "train": ["model.norm"]}


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What users are warned of."""
    logger, told = logging.getLogger("meft_ds"), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield told
    logger.removeHandler(handler)


def engine_of(groups: list[dict[str, Any]], model: nn.Module, **kwargs: Any) -> Any:
    config = ds_config(block=BLOCK)
    del config["optimizer"]
    return make_engine(config, model, optimizer=torch.optim.AdamW(groups), **kwargs)


def test_rows_train_where_the_first_groups_are_empty_or_have_no_learning_rate(warnings: list[str]) -> None:
    model = tiny_llama()
    first, *rest = [p for name, p in model.named_parameters() if name != "model.norm.weight"]
    groups = [
        {"params": [], "lr": 1.0},
        {"params": [first], "lr": 0.0},
        {"params": rest, "lr": 1e-2},
    ]
    engine = engine_of(groups, model)
    assert {unit.group for unit in engine.optimizer.pipeline.units} == {2}
    rows = [adapter.rows.master.clone() for adapter in engine._meft_methods[0].adapters]
    norm = model.model.norm.weight.detach().clone()
    train(engine, 2)
    assert all(
        not torch.equal(a.rows.master, was) for a, was in zip(engine._meft_methods[0].adapters, rows, strict=True)
    )
    assert not torch.equal(model.model.norm.weight, norm)
    assert not any("lr 0" in line for line in warnings)


def test_a_tensor_with_a_group_of_its_own_keeps_it() -> None:
    model = tiny_llama()
    norm = model.model.norm.weight
    engine = engine_of([{"params": list(model.model.layers.parameters()), "lr": 1e-2}, {"params": [norm]}], model)
    groups = {unit.name: unit.group for unit in engine.optimizer.pipeline.units}
    assert [group for name, group in groups.items() if "dense.g1" in name] == [1]
    assert groups["layer0.rows"] == 0


def test_one_warning_where_nothing_has_a_learning_rate(warnings: list[str]) -> None:
    model = tiny_llama()
    engine_of([{"params": [], "lr": 1e-2}, {"params": list(model.parameters()), "lr": 0.0}], model)
    (line,) = [line for line in warnings if "lr 0" in line]
    assert "parameter group 1" in line and "adapter rows" in line


def test_a_warm_up_from_zero_is_no_reason_for_a_warning(warnings: list[str]) -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(
        [{"params": [model.model.norm.weight], "lr": 0.0}, {"params": list(model.model.layers.parameters())}], lr=1e-2
    )
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 2, 1.0))
    config = ds_config(block=BLOCK)
    del config["optimizer"]
    engine = make_engine(config, model, optimizer=optimizer)  # the program steps its scheduler by itself
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    groups = {unit.name: unit.group for unit in engine.optimizer.pipeline.units}
    assert groups["layer0.rows"] == groups["layer1.rows"] == 1
    assert not any("lr 0" in line for line in warnings)
