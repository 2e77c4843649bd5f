# SPDX-License-Identifier: Apache-2.0
"""Which parameters of a model belong to heads, and which were added by PEFT: what is small and made for one task."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from meft_ds.offload.model.discover import output_heads
from meft_ds.offload.model.weights import numel_of

_HEADS = re.compile(
    r"score|classifier|pre_classifier|classification_head|(qa|span)_(outputs|classifier)|(v|value|values|reward|"
    r"regression|classifier|critic|multiple_choice|mc|rank|ranking)_head|(sequence_)?summary|logits_proj|"
    r"answer_class|(start|end)_logits|seq_relationship"
)
_TASKS = re.compile(
    r"For\w*(Classification|Answering|MultipleChoice|Regression|Reward|Value|NextSentence|Prediction|Detection|"
    r"Segmentation|XVector|Retrieval)"
)


def head_parameters(model: nn.Module) -> set[int]:
    """Return ids of the parameters of heads for classification, regression, questions, choices, rewards and values.

    A head is known by its name. It is also what a model for such a task has outside its base, or what a program has
    put around a pretrained model.
    """
    outer = pretrained(model)
    found = {
        id(p)
        for name, module in model.named_modules()
        if _HEADS.fullmatch(_own_name(name)) and not any(part.isdigit() for part in name.split("."))
        for p in module.parameters()
    }
    for _, inner in outer:
        base = inner.base_model
        if base is not inner and _TASKS.search(type(inner).__name__):
            found |= _outside(inner, [base])
    inside = [module for _, module in outer if module is not model]
    if inside:
        around = _outside(model, inside)
        if 2 * sum(numel_of(p) for p in model.parameters() if id(p) in around) < sum(map(numel_of, model.parameters())):
            found |= around
    return found - vocabulary_parameters(model) - peft_parameters(model)


def vocabulary_parameters(model: nn.Module) -> set[int]:
    """Return ids of the parameters of output heads over a vocabulary, and of what is tied to them."""
    modules = {*output_heads(model), *(m for name, m in model.named_modules() if name.split(".")[-1] == "lm_head")}
    return {id(p) for module in modules for p in module.parameters()}


def peft_parameters(model: nn.Module) -> set[int]:
    """Return ids of the parameters that PEFT added: those of its modules outside the ones that they wrap."""
    found: set[int] = set()

    def walk(module: nn.Module) -> None:
        peft = type(module).__module__.partition(".")[0] == "peft"
        if peft:
            found.update(id(p) for p in module._parameters.values() if p is not None)
        for name, child in module.named_children():
            if peft and name not in ("base_layer", "original_module", "base_model", "model"):
                found.update(id(p) for p in child.parameters())
            else:
                walk(child)

    walk(model)
    return found


def peft_layer(model: nn.Module) -> str | None:
    """Name of the first layer that PEFT has put an adapter on; None where there is none."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # if not imported, no model has a layer of it
    if peft is None:
        return None
    return next((name for name, module in model.named_modules() if isinstance(module, peft.BaseTunerLayer)), None)


def pretrained(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the outermost of transformers' models in `model`, with their names."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return []

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
        if isinstance(module, transformers.PreTrainedModel):
            yield name, module
            return
        for key, child in module.named_children():
            yield from walk(f"{name}.{key}" if name else key, child)

    return list(walk("", model))


def _own_name(name: str) -> str:
    """Return the last part of a module's name, and that of the wrapper where a module is compiled.

    PEFT's `modules_to_save` keeps a head under the head's own name.
    """
    return name.removesuffix("._orig_mod").rpartition(".")[2]


def _outside(module: nn.Module, parts: Sequence[nn.Module]) -> set[int]:
    inside = {id(p) for part in parts for p in part.parameters()}
    return {id(p) for p in module.parameters()} - inside
