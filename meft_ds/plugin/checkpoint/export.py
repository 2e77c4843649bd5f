# SPDX-License-Identifier: Apache-2.0
"""`save_adapter` and `save_tiles`, and HF's `save_pretrained` of a training model: plain weights of the base."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import deepspeed
from torch import Tensor, nn

from meft_ds.offload import update_gates
from meft_ds.offload.method import Extras, Method
from meft_ds.offload.ranks import Ranks
from meft_ds.plugin import registry

_logger = logging.getLogger("meft_ds")


def save_adapter(model_or_engine: nn.Module, directory: str | Path) -> None:
    """Write the adapter of an engine or model to `directory`, for `load_adapter`.

    That is fp32 master rows [r, 2 d] and routers [N, d] of each layer, settings, and the base's tensors that were
    trained beside them. What `subspace` or tiles train of the base is not in it.

    Any one rank may call it, because a node's ranks share the master rows. Under ZeRO-3 all ranks call it, because
    routers are partitioned, and the first rank writes.

    Args:
        model_or_engine: the engine that `deepspeed.initialize` returned, or the model inside it.
        directory: made when missing. Adapter files in it are replaced atomically.

    Raises:
        ValueError: when the model has no adapter.
        OSError: when the files cannot be written; under ZeRO-3 on every rank.
        RuntimeError: in the middle of a step, where a signal handler may have called it.

    Example:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config="meft.json")
        ...  # train
        meft_ds.save_adapter(engine, "adapter")
    """
    model = getattr(model_or_engine, "module", model_or_engine)
    present = _present(model)
    if not present:
        raise ValueError(
            f"{type(model).__name__} has no meft-ds adapter; pass the engine that deepspeed.initialize returned for a "
            'config with a "meft_offload" block'
        )
    runtime: Any = getattr(model_or_engine, "_meft", None)  # a bare model knows of no step
    if runtime is not None:
        runtime.refuse_inside_step("save_adapter")
    update_gates.flush(model)  # rows wait for their update by themselves, routers do not
    if any(is_partitioned(p) for extras in present for p in extras.needed(model).values()):
        write_extras(directory, model, Ranks.everyone())
    else:
        for extras in present:
            extras.write(Path(directory), model)


def write_extras(directory: str | Path, model: nn.Module, ranks: Ranks, *, beside_base: bool = False) -> None:
    """Write what methods have put into `model` on the first rank, if there is anything. Collective.

    Parameters may be partitioned, and nothing may be under way. `beside_base`: as in `Extras.write`.
    """
    for extras in _present(model):
        state: dict[str, Tensor] = {}
        for name, p in extras.needed(model).items():
            # one after another: what was trained of the base may be large
            with deepspeed.zero.GatheredParameters([p]) if is_partitioned(p) else contextlib.nullcontext():
                if ranks.rank == 0:
                    state[name] = p.detach().cpu().clone()
        with first_writes(directory, ranks):
            if ranks.rank == 0:
                extras.write(Path(directory), model, state, beside_base=beside_base)


@contextlib.contextmanager
def first_writes(path: str | Path, ranks: Ranks) -> Iterator[None]:
    """Inside, the first rank writes `path`: when it fails there, every rank raises, and none waits for it for ever.
    Collective.

    Raises:
        OSError: on the other ranks, saying what happened on the first one.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as e:
        fault = e
    told = ranks.from_first(lambda: None if fault is None else f"{type(fault).__name__}: {fault}")
    if fault is not None:
        raise fault
    if told is not None:
        raise OSError(f"the first rank could not write {path}: {told}")


def save_tiles(engine: Any, path: str | Path) -> None:
    """Write the tiles that sparse matrix tuning trains, and what they were before, for `apply_tiles` and
    `revert_tiles`.

    Collective: all ranks call it, and the file is complete when it returns. Base weights that the block's "train" names
    are no tiles and are not in the file.

    Args:
        engine: what `deepspeed.initialize` returned (with HF's Trainer: `trainer.deepspeed`).
        path: of the safetensors file; replaced atomically.

    Raises:
        ValueError: when the engine trains no tiles, or still scores them.
        OSError: when the file cannot be written.

    Example:
        trainer.train()
        meft_ds.save_tiles(trainer.deepspeed, "tiles.safetensors")
    """
    runtime: Any = getattr(engine, "_meft", None)
    if runtime is not None:
        engine.meft_flush()
    methods = () if runtime is None else runtime.methods
    # gathered here and not below: of partitioned weights it takes all ranks
    write = next((found for method in methods if (found := method.export()) is not None), None)
    if write is None:
        raise ValueError(
            f"this {type(engine).__name__} trains no tiles; pass the engine that deepspeed.initialize returned for a "
            'config with a "sparse_matrix" object in its "meft_offload" block'
        )
    with first_writes(path, runtime.run.ranks):
        if runtime.is_first:
            write(path)


def begin(model: nn.Module, dense: Sequence[str], methods: Sequence[Method]) -> None:
    """Let whoever saves `model` or a part of it know what an engine trains.

    Where methods leave the base alone, `save_pretrained` then writes the base's weights without tensors of ours, and
    an adapter beside them.

    Args:
        model: of the engine.
        dense: names of the tensors that train whole.
        methods: of the engine.
    """
    for extras in registry.EXTRAS:
        others = [method.name for method in methods if method.extras is not extras]
        extras.remember(model, [name for name in dense if not extras.owns(name)], others)
    if any(method.freezes_base for method in methods) and hasattr(model, "save_pretrained"):
        # a method, so that copies of the model save themselves
        model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[assignment]


def _save_pretrained(model: Any, directory: Any, *args: Any, **kwargs: Any) -> Any:
    state: dict[str, Tensor] | None = kwargs.pop("state_dict", None)
    if state is None:
        _refuse_partitioned(model)
        state = model.state_dict()
    kwargs["state_dict"] = plain_weights(state)
    result = type(model).save_pretrained(model, directory, *args, **kwargs)
    for extras in _present(model) if kwargs.get("is_main_process", True) else ():
        missing = [name for name in extras.needed(model) if name not in state]
        if missing and any(is_partitioned(p) for p in model.parameters()):
            _logger.warning("no adapter is written to %s: the state dict lacks %s", directory, missing[0])
            return result
        update_gates.flush(model)
        # the given state's, because this one rank could not gather the model's
        extras.write(Path(directory), model, None if missing else state, beside_base=True)
    return result


def plain_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the base's own tensors of a state dict."""
    return {name: t for name, t in state.items() if not any(extras.owns(name) for extras in registry.EXTRAS)}


def trained_beside(model: nn.Module) -> list[str]:
    """Return names of the base's tensors that files of methods' own, such as an adapter's, hold too."""
    return [name for extras in _present(model) for name in extras.needed(model) if not extras.owns(name)]


def _present(model: nn.Module) -> list[Extras]:
    return [extras for extras in registry.EXTRAS if extras.present(model)]


def is_partitioned(p: Tensor) -> bool:
    """Return whether a parameter is one of ZeRO-3."""
    return hasattr(p, "ds_id")


def _refuse_partitioned(model: nn.Module) -> None:
    if any(is_partitioned(p) for p in model.parameters()):
        raise ValueError(
            "save_pretrained of a model under ZeRO-3 needs whole weights: pass "
            "state_dict=engine._zero3_consolidated_16bit_state_dict(), which all ranks must call (accelerate: "
            "accelerator.get_state_dict(model)), or use engine.save_16bit_model or Trainer.save_model"
        )
