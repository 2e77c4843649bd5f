# SPDX-License-Identifier: Apache-2.0
"""The JSON schema says yes where the models do, and no to what a schema can know to be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

import meft_ds
from meft_ds.cli import schema
from meft_ds.cli.main import app
from meft_ds.config import parse_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
BLOCK = jsonschema.Draft202012Validator(schema.block_schema())
WHOLE = jsonschema.Draft202012Validator(schema.ds_config_schema())
RIGHT: list[dict[str, Any]] = [
    {},
    {"sparse_adapter": {"rows": "auto", "target_modules": "mlp"}, "train": []},
    {"subspace": {"dim": 0.25, "target_modules": ["a", "b"], "scale": 2}, "train": "head"},
    {"sparse_matrix": {"density": 0.01, "block_size": "auto"}, "schedule": {"mode": "eager"}},
    {"host_memory_gb": 12, "sparse_adapter": {"compress": None}},
]
WRONG: list[Any] = [
    {"subspaces": {}},
    {"subspace": {"dims": 3}},
    {"subspace": None},
    {"sparse_adapter": {"compress": {"dimm": 3}}},
    {"schedule": {"mode": "exakt"}},
    {"sparse_adapter": {"gate": "yes"}},
    [],
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_right(path: Path) -> None:
    WHOLE.validate(json.loads(path.read_text()))


@pytest.mark.parametrize("block", RIGHT, ids=repr)
def test_right_blocks_are_right_to_both(block: dict[str, Any]) -> None:
    parse_config(block)
    BLOCK.validate(block)


@pytest.mark.parametrize("block", WRONG, ids=repr)
def test_wrong_blocks_are_wrong_to_both(block: Any) -> None:
    with pytest.raises(ValueError):
        parse_config(block)
    assert not BLOCK.is_valid(block)
    assert not WHOLE.is_valid({"zero_optimization": {}, "meft_offload": block})


def test_every_key_has_its_description() -> None:
    made = schema.block_schema()
    for model in (made, *made["$defs"].values()):
        assert all(key["description"] for key in model["properties"].values())


def test_the_shipped_file_is_what_the_models_say() -> None:
    shipped = Path(meft_ds.__file__).parent / schema.FILE
    assert shipped.read_text(encoding="utf-8") == schema.text(schema.block_schema()), (
        "run: python docs/write_configuration.py"
    )


def test_the_command_prints_or_writes_it(tmp_path: Path) -> None:
    assert json.loads(CliRunner().invoke(app, ["schema"]).stdout) == schema.block_schema()
    out = tmp_path / "s.json"
    assert CliRunner().invoke(app, ["schema", "--ds-config", "--out", str(out)]).exit_code == 0
    assert json.loads(out.read_text()) == schema.ds_config_schema()
