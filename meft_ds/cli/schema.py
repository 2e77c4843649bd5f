# SPDX-License-Identifier: Apache-2.0
"""The block's JSON schema, from the same models that check it: editors complete keys and mark misspelt ones.

A schema knows types and names. Ranges, and rules over several keys, are checked when the engine starts.
"""

from __future__ import annotations

import json
from typing import Any

from meft_ds.config import BLOCK, MeftConfig

FILE = "meft_offload.schema.json"
"""In the package: the block's schema, as `text` gives it."""
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def block_schema() -> dict[str, Any]:
    """Return the schema of what stands under "meft_offload"."""
    schema = MeftConfig.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        model["description"] = model["description"].partition("\n\n")[0]  # the rest is for who reads the code
        for name, field in model["properties"].items():
            kinds = field.get("anyOf", [])
            # what the models' validators take beside the annotated types, and what they refuse
            if any(kind.get("type") == "array" for kind in kinds):
                kinds.insert(0, {"type": "string"})
            if name in MeftConfig.methods():
                field["anyOf"] = [kind for kind in kinds if kind.get("type") != "null"]
                del field["default"]
    return {"$schema": _DIALECT, "title": f'The "{BLOCK}" block of a ds_config', **_without_titles(schema)}


def ds_config_schema() -> dict[str, Any]:
    """Return the schema of a whole ds_config: DeepSpeed's own keys are left to DeepSpeed."""
    block = block_schema()
    definitions = block.pop("$defs")
    del block["$schema"]
    return {
        "$schema": _DIALECT,
        "title": f'A ds_config with a "{BLOCK}" block',
        "type": "object",
        "properties": {BLOCK: block},
        "$defs": definitions,
    }


def text(schema: dict[str, Any]) -> str:
    """Return a schema as it is printed and shipped."""
    return json.dumps(schema, indent=2) + "\n"


def _without_titles(schema: Any) -> Any:
    """Drop pydantic's titles, which only repeat names."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without_titles(value) for key, value in schema.items() if key != "title" or not isinstance(value, str)
    }
