# SPDX-License-Identifier: Apache-2.0
"""The `"meft_offload"` block of a ds_config as one strict model, and one error that lists every fault in it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from meft_ds.offload.schedule.config import ScheduleConfig
from meft_ds.options import MOST_LISTED, Settings, listed, patterns, positive, shown
from meft_ds.sparse_adapter.config import SparseAdapterConfig
from meft_ds.sparse_matrix.config import SparseMatrixConfig
from meft_ds.subspace.config import SubspaceConfig

BLOCK = "meft_offload"
_OBJECT = "expected an object of settings (it may be empty: {})"


def _train(value: Any) -> tuple[str, ...] | None:
    return () if value in ([], ()) else patterns(value)


def settings_object(value: Any) -> Any:
    """Refuse null where the key names a method: the field of each method has this validator."""
    if value is None:
        raise ValueError(f"{_OBJECT}, got null; remove the key to turn it off")
    return value


class MeftConfig(Settings):
    """Hold the whole block. A block that names no method means the sparse adapter with its defaults.

    `parse_config` checks a block and gives the better errors.

    Example:
        meft_ds.MeftConfig.model_json_schema()["properties"]  # every key with its description
    """

    sparse_adapter: Annotated[SparseAdapterConfig | None, BeforeValidator(settings_object)] = Field(
        None, description="MEFT: large sparse adapters whose rows live on the host."
    )
    subspace: Annotated[SubspaceConfig | None, BeforeValidator(settings_object)] = Field(
        None, description="LSP-Offload: all linear layers train through gradients compressed by sparse projectors."
    )
    sparse_matrix: Annotated[SparseMatrixConfig | None, BeforeValidator(settings_object)] = Field(
        None, description="SMT: only the tiles of the linear layers with the largest gradients train."
    )
    schedule: ScheduleConfig = Field(
        default_factory=lambda: ScheduleConfig.model_validate({}),
        description="How updates and transfers overlap with compute.",
    )
    train: Annotated[tuple[str, ...] | None, BeforeValidator(_train)] = Field(
        None,
        description="Regular expressions over names of the base model's parameters: those that match train, beside "
        "heads, PEFT's tensors and what the checkpoint did not bring; all others are frozen. "
        "[]: all of the base is. Default: nothing else under the sparse adapter and tiles; "
        "with subspace, all that the program left trainable.",
    )
    moments_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Dtype of AdamW's two moments on the host. bf16 halves them; a second moment rounded to bf16 "
        "barely moves with beta2 = 0.999, so lower beta2 to about 0.98. Default: fp32, as DeepSpeed.",
    )
    grad_dtype: Literal["auto", "fp32"] = Field(
        "auto",
        description="Dtype of compressed and row gradients on the bus: auto = the compute dtype, fp32 = twice the "
        "bytes in bf16.",
    )
    host_memory_gb: Annotated[
        float | Literal["auto"], BeforeValidator(positive("auto", what="GiB as a number above 0"))
    ] = Field(
        "auto",
        description="GiB of host memory per node that the offloaded state may take. auto = what is free at the start.",
    )

    @classmethod
    def methods(cls) -> list[str]:
        """Return the keys that name a method; a block without any means the first."""
        return [name for name, field in cls.model_fields.items() if BeforeValidator(settings_object) in field.metadata]

    @model_validator(mode="before")
    @classmethod
    def _some_method(cls, block: Any) -> Any:
        if isinstance(block, dict) and not any(block.get(method) is not None for method in cls.methods()):
            first = cls.methods()[0]
            return {**block, first: block.get(first, {})}
        return block

    @model_validator(mode="after")
    def _one_owner_of_the_base(self) -> MeftConfig:
        if self.subspace is not None and self.sparse_matrix is not None:
            raise ValueError("subspace and sparse_matrix both train the base's linear layers; keep one")
        return self


def parse_config(
    block: Any,
    extra_faults: list[str] | None = None,
    conflicts: Callable[[MeftConfig], list[str]] = lambda config: [],
) -> MeftConfig:
    """Check the block and return it.

    Args:
        block: value of the top-level key "meft_offload".
        extra_faults: faults found elsewhere in the ds_config, to be listed in the same error.
        conflicts: gives faults of a block whose keys are right by themselves, to be listed too.

    Raises:
        ValueError: one message that lists all faults, each with the key's path, what was expected and what to do.

    Example:
        config = meft_ds.parse_config({"subspace": {"dim": 0.25}})
        config.subspace.dim  # 0.25
    """
    faults = list(extra_faults or [])
    config = None
    if not isinstance(block, Mapping):
        faults.append(
            f'{BLOCK}: expected an object such as {{"sparse_adapter": {{"rows": 4096}}}}, got '
            f"{'null' if block is None else shown(block)}; remove the key to train without meft-ds"
        )
    else:
        config, found = _validate(dict(block))
        faults += found
        faults += [] if config is None else conflicts(config)
    if faults:
        lines = listed([f"{n}. {fault}" for n, fault in enumerate(faults, 1)], MOST_LISTED, "\n  ")
        plural = "fault" if len(faults) == 1 else "faults"
        raise ValueError(f"the ds_config's {BLOCK!r} block has {len(faults):,} {plural}:\n  {lines}")
    assert config is not None
    return config


def _validate(block: dict[str, Any]) -> tuple[MeftConfig | None, list[str]]:
    """Return the block's settings without its wrong keys, None if nothing is left of it, and its faults.

    Checks across keys run only on keys that are right, so wrong ones are dropped and the rest is checked again.
    """
    faults: dict[str, None] = {}  # in order, each once
    while True:
        try:
            config = MeftConfig.model_validate(block)
            return config, list(faults)
        except ValidationError as e:
            before, errors = len(faults), e.errors(include_url=False)
            faults |= dict.fromkeys(map(_describe, errors))
            if len(faults) == before or not _drop(block, [error["loc"] for error in errors]):
                return None, list(faults)


def _describe(error: Any) -> str:
    # pydantic names the branch of a union in the path; users know only keys and list positions
    path = _key_path(error["loc"])
    where = ".".join([BLOCK, *(shown(str(part))[1:-1] for part in path)])
    if error["type"] == "extra_forbidden":
        valid = sorted(_model_at(path[:-1]).model_fields)
        near = difflib.get_close_matches(str(path[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
        return f"{where}: unknown key; {hint}"
    message = _OBJECT if error["type"] == "model_type" else error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] == "value_error" else f", got {shown(error['input'])}"
    return f"{where}: {message}{got}"


def _key_path(loc: tuple[int | str, ...]) -> list[int | str]:
    path: list[int | str] = []
    model: type[BaseModel] | None = MeftConfig
    for part in loc:
        if isinstance(part, int):
            path.append(part)
        elif model is not None:
            path.append(part)
            field = model.model_fields.get(part)
            model = _settings(field.annotation) if field else None
    return path


def _model_at(path: list[int | str]) -> type[BaseModel]:
    model: type[BaseModel] = MeftConfig
    for part in path:
        found = _settings(model.model_fields[str(part)].annotation)
        assert found is not None
        model = found
    return model


def _settings(annotation: Any) -> type[BaseModel] | None:
    """The model among a field's possible types."""
    kinds = get_args(annotation) or (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _drop(block: dict[str, Any], locations: list[tuple[int | str, ...]]) -> bool:
    """Remove faulty keys from the block (a copy level by level); False when nothing could be removed."""
    dropped = False
    for loc in locations:
        path = [part for part in _key_path(loc) if isinstance(part, str)]
        holder: Any = block
        for part in path[:-1]:
            if not isinstance(holder.get(part), dict):
                break
            holder[part] = dict(holder[part])
            holder = holder[part]
        else:
            if path and path[-1] in holder:
                del holder[path[-1]]
                dropped = True
    return dropped
