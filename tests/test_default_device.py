# SPDX-License-Identifier: Apache-2.0
"""A program may set a default device. What belongs to the host stays there, because its makers name the host."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

import meft_ds
from tests.methods import METHODS, Entry
from tests.toy import batch, ds_config, make_engine, state_of

MAKERS = {f.__name__ for f in _device_constructors()}
FILES = sorted(Path(meft_ds.__file__).parent.rglob("*.py"))


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    assert {"zeros", "tensor", "arange"} <= MAKERS and len(FILES) > 100
    unnamed = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and (node.func.value.id, node.func.attr in MAKERS) == ("torch", True)
                and not any(keyword.arg in (None, "device") for keyword in node.keywords)
            ):
                unnamed.append(f"{path.name}:{node.lineno}")
    assert not unnamed


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_default_device_changes_no_bit(entry: Entry, precision: str, tmp_path: Path) -> None:
    """A tensor on the device "meta" has no values: whatever came to lie there would show."""
    plain, other = (trained(entry, precision, tmp_path / name, name) for name in ("cpu", "meta"))
    assert plain.keys() == other.keys()
    assert [name for name in plain if not torch.equal(plain[name], other[name])] == []


def trained(entry: Entry, precision: str, folder: Path, device: str) -> dict[str, Tensor]:
    """Weights and state after an engine was made, some steps, a save and a load, and more steps."""
    model, batches = entry.model(0), [batch(seed) for seed in range(8)]
    with entry.installed():
        torch.set_default_device(device)
        try:
            engine = make_engine(ds_config(precision=precision, block=entry.block), model)
            for number, inputs in enumerate(batches):
                engine.backward(engine(**inputs).loss)
                engine.step()
                if number == 5:
                    engine.save_checkpoint(str(folder), tag="six")
                    engine.load_checkpoint(str(folder), tag="six")
            return state_of(engine)
        finally:
            torch.set_default_device(None)
