# SPDX-License-Identifier: Apache-2.0
"""What ``meft_adapter.json`` says: a strict model with a checksum of its own, and one error per fault."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from meft_ds import files
from meft_ds.sparse_adapter.config import ResolvedSparseAdapter

__all__ = ["FORMAT", "JSON_NAME", "About", "TensorFile", "read_about", "text_of"]

JSON_NAME = "meft_adapter.json"
FORMAT = 3
_Name = Annotated[str, StringConstraints(min_length=1)]
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("expected every name once")
    return names


class TensorFile(BaseModel):
    """The file beside the JSON that holds the tensors, with its size and checksum."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file: Annotated[str, StringConstraints(pattern=r"^meft_adapter-[0-9a-f]{16}\.safetensors$")]
    bytes: Annotated[int, Field(ge=0)]
    sha256: _Sha256


class About(BaseModel):
    """An adapter, its tensors aside.

    modules: names of the FFNs with an adapter, in the order of the layers. base: names of the base's tensors that were
    trained beside it and are in the file. elsewhere: methods that trained more of the base, which is not in the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[3] = 3
    method: Literal["sparse_adapter"] = "sparse_adapter"
    model_class: _Name
    config: ResolvedSparseAdapter
    modules: Annotated[list[_Name], Field(min_length=1), AfterValidator(_distinct)]
    base: Annotated[list[_Name], AfterValidator(_distinct)]
    elsewhere: Annotated[list[_Name], AfterValidator(_distinct)]
    tensors: TensorFile


def text_of(about: About) -> str:
    """Return the JSON, sealed."""
    plain = {**about.model_dump(mode="json", exclude={"config"}), "config": asdict(about.config)}
    return json.dumps({**plain, "sha256": _seal(json.loads(json.dumps(plain)))}, indent=2) + "\n"


def read_about(path: Path) -> About:
    """Read and check it. Raises ValueError, with the path and what to do, for anything else than ``text_of`` made."""
    try:
        found = files.parse_json(files.read_bytes(path))
    except FileNotFoundError:
        raise ValueError(f"{path} not found; save_adapter writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise _damaged(path, f"it is no JSON: {fault}") from None
    except OSError as fault:
        raise ValueError(f"{path} cannot be read: {fault.strerror or fault}; make it readable") from None
    if not isinstance(found, dict):
        raise _damaged(path, f"expected a JSON object, found {_short(found)}")
    version = found.get("format")
    if isinstance(version, int) and not isinstance(version, bool) and version != FORMAT:
        fix = "update meft-ds" if version > FORMAT else "save the adapter again with this version"
        raise ValueError(f"{path}: format {version}, this version reads {FORMAT}; {fix}")
    told = found.pop("sha256", None)
    try:
        # by way of text, because only then a strict model takes a list for a tuple
        about = About.model_validate_json(json.dumps(found))
    except ValidationError as fault:
        raise _damaged(path, "; ".join(map(_described, fault.errors(include_url=False)))) from None
    if set(found["config"]) != (known := {f.name for f in fields(ResolvedSparseAdapter)}):
        raise _damaged(path, f"config: keys {sorted(set(found['config']) ^ known)} are too many or missing")
    if told != _seal(found):
        raise _damaged(path, "its content is not what its checksum was made of")
    return about


def _seal(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged or was changed: {why}; copy or save the adapter again")


def _described(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] in ("missing", "value_error") else f", got {_short(error['input'])}"
    return f"{'.'.join(map(str, error['loc']))}: {message}{got}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
