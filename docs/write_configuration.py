# SPDX-License-Identifier: Apache-2.0
"""Write docs/reference/configuration.md and the shipped JSON schema from the models of the block:
python docs/write_configuration.py"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import meft_ds
from meft_ds.cli import schema
from meft_ds.config import MeftConfig

PAGE = Path(__file__).resolve().parent / "reference" / "configuration.md"
SCHEMA = Path(meft_ds.__file__).parent / schema.FILE

HEAD = """\
# The `"meft_offload"` block

<!-- Written by docs/write_configuration.py from the descriptions in meft_ds. Edit those. -->

One top-level block in the ds_config. `"meft_offload": {}` turns the sparse adapter on with its defaults,
`{"subspace": {}}` the subspace projectors, both keys both methods. Remove the block, and DeepSpeed behaves as if
meft-ds were not installed. One error lists all faults of a block, each with the key's path and the nearest valid key.

What `train` selects, and what trains without it: [what trains](../explanation/what-trains.md). What the block makes of
the rest of the ds_config: [the rest of the ds_config](ds-config.md).
"""

INTROS = {
    "sparse_adapter": "MEFT (arXiv 2406.04984). d is the hidden size; letters are the paper's. [The adapter as "
    "built](../explanation/sparse-adapter.md).",
    "sparse_adapter.compress": "LSP-Offload (arXiv 2406.10181) on one side of the rows' gradients. Signs and positions "
    "follow `sparse_adapter.seed`, so a checkpoint asks for the same `dim`, `nonzeros` and `seed` again.",
    "subspace": "LSP-Offload (arXiv 2406.10181). [The projectors as built](../explanation/subspace.md).",
    "sparse_matrix": "SMT (arXiv 2405.15525). A tile is a rectangle of a weight. A role is what the weight does in its "
    "layer: `q`, `k`, `v`, `o`, `gate`, `up`, `down`, or the name of its module. [Tiles as "
    "built](../explanation/sparse-matrix.md).",
    "schedule": "[The schedule as built](../explanation/schedule.md).",
}


def page() -> str:
    """Return the page that the models of today make."""
    return HEAD + "".join(_section(path, model) for path, model in _models("", MeftConfig))


def _models(path: str, model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """Return a model and those inside it, with their paths in the block."""
    found = [(path, model)]
    for name, field in model.model_fields.items():
        for kind in _kinds(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += _models(f"{path}.{name}".lstrip("."), kind)
    return found


def _section(path: str, model: type[BaseModel]) -> str:
    heading = f"\n{'#' * (2 + path.count('.'))} `{path}`\n\n{INTROS[path]}\n" if path else ""
    rows = [f"| `{name}` | {_values(f)} | {_default(name, f)} | {_cell(f)} |" for name, f in model.model_fields.items()]
    return "\n".join([f"{heading}", "| key | values | default | meaning |", "|---|---|---|---|", *rows, ""])


def _kinds(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def _values(field: FieldInfo) -> str:
    words = []
    for kind in _kinds(field.annotation):
        if get_origin(kind) is Literal:
            words += [f"`{json.dumps(value)}`" for value in get_args(kind)]
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            words.append("object")
        else:
            words.append(_WORDS[get_origin(kind) or kind])
    return " or ".join(dict.fromkeys(word for word in words if word))


_WORDS = {
    bool: "`true`, `false`",
    int: "whole number",
    float: "number",
    str: "text",
    tuple: "expression, or list of them",
    dict: "object",
    type(None): "",
}


def _default(name: str, field: FieldInfo) -> str:
    if name in MeftConfig.methods():
        return "off"
    value = field.get_default(call_default_factory=True)
    return "`{}`" if isinstance(value, BaseModel) else f"`{json.dumps(value)}`"


def _cell(field: FieldInfo) -> str:
    assert field.description, "every key has a description"
    return field.description.replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(schema.text(schema.block_schema()), encoding="utf-8")
    print(f"wrote {PAGE} and {SCHEMA}")
