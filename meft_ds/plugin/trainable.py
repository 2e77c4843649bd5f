# SPDX-License-Identifier: Apache-2.0
"""What trains beside a method that leaves the base alone: heads, what the checkpoint did not bring, PEFT's parameters,
what a program left trainable when it froze most of the model, and what the block's "train" names."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from meft_ds.offload.matrices import listed, output_heads
from meft_ds.offload.method import Method
from meft_ds.offload.weights import numel_of

_logger = logging.getLogger("meft_ds")
_FROZEN = "_meft_frozen"  # names of what an engine froze, on the model that it was given
_HEADS = re.compile(
    r"score|classifier|pre_classifier|classification_head|(qa|span)_(outputs|classifier)|(v|value|values|reward|"
    r"regression|classifier|critic|multiple_choice|mc|rank|ranking)_head|(sequence_)?summary|logits_proj|"
    r"answer_class|(start|end)_logits|seq_relationship"
)
_TASKS = re.compile(
    r"For\w*(Classification|Answering|MultipleChoice|Regression|Reward|Value|NextSentence|Prediction|Detection|"
    r"Segmentation|XVector|Retrieval)"
)
_WHY = {"peft": "PEFT", "head": "a head", "fresh": "not in the checkpoint", "left": "left trainable", "train": "train"}


def settle(model: nn.Module, train: Sequence[str] | None, methods: Sequence[Method], *, tells: bool) -> dict[str, str]:
    """Freeze the base but for what is to train.

    Where no method trains the base itself, or where `train` is given, these stay trainable if the program left them so:
    heads, tensors that the checkpoint did not bring, and PEFT's. So does all that a program left trainable in a model
    of which it froze most. What a pattern of `train` matches trains on top; an empty `train` freezes all of the base.

    Args:
        model: with the methods' own parameters in it.
        train: regular expressions; None where the block has no such key.
        methods: prepared.
        tells: whether this rank logs what else trains, and what is frozen that the program may have meant to train.

    Returns:
        Why each tensor of the base trains, by its name; empty where methods train the base and nothing was decided.

    Raises:
        ValueError: for a pattern that matches nothing, naming it.
    """
    thaw(model)
    alone = all(method.freezes_base for method in methods)
    if train is None and not alone:
        return {}
    own = {id(p) for method in methods for p in method.own_parameters()}
    named = [(name, p) for name, p in model.named_parameters() if id(p) not in own]
    matched = _matched(train or (), [name for name, _ in named])
    peft, fresh, heads = peft_parameters(model), fresh_parameters(model), head_parameters(model)
    left = {id(p) for name, p in named if p.requires_grad}
    tiled = {i for method in methods for i in method.candidates()}
    kept: dict[int, str] = {}
    if train is None or train:
        base = [p for _, p in named if id(p) not in peft]
        if alone and _mostly_frozen(base):
            kept |= dict.fromkeys(left - tiled, "left")
        kept |= dict.fromkeys(left & fresh, "fresh") | dict.fromkeys(left & heads, "head")
        kept |= dict.fromkeys(left & peft, "peft")
    trains = {
        name: "train" if name in matched else kept[id(p)] for name, p in named if name in matched or id(p) in kept
    }
    if tells and (train is None or train):
        chosen = any(not p.requires_grad for _, p in named)
        lost = [name for name, p in named if alone and chosen and id(p) in left - tiled and name not in trains]
        _tell(trains, lost, [name for name, p in named if id(p) in fresh - left and name not in trains], methods)
    for name, p in named:
        if p.is_floating_point() or p.is_complex():
            p.requires_grad_(name in trains)
    froze = [name for name, p in named if id(p) in left and name not in trains]
    setattr(model, _FROZEN, froze)
    return trains


def thaw(model: nn.Module) -> None:
    """Let train again what engines before froze, so that it is as the program left it."""
    for module in model.modules():
        names = module.__dict__.pop(_FROZEN, ())
        named = dict(module.named_parameters()) if names else {}
        for name in names:
            if name in named:
                named[name].requires_grad_(True)


def _matched(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    idle = []
    for pattern in patterns:
        search = re.compile(pattern).search
        matching = {name for name in names if search(name)}
        found |= matching
        if not matching:
            idle.append(pattern)
    if idle:
        raise ValueError(
            f"meft_offload.train: {', '.join(map(repr, idle))} matches no parameter; "
            f"names look like {', '.join(names[:6])}"
        )
    return found


def _mostly_frozen(params: Sequence[nn.Parameter]) -> bool:
    frozen = sum(numel_of(p) for p in params if not p.requires_grad)
    return 2 * frozen > sum(numel_of(p) for p in params)


def _tell(trains: dict[str, str], lost: list[str], fresh: list[str], methods: Sequence[Method]) -> None:
    told = " and ".join(method.name for method in methods)
    unasked = [f"{name} ({_WHY[why]})" for name, why in trains.items() if why != "train"]
    if unasked:
        _logger.info('meft-ds: beside %s train %s; "train": [] freezes them', told, listed(unasked))
    if lost:
        _logger.info(
            'meft-ds: %s freezes what the program left trainable: %s; "train": [...] in the meft_offload block takes '
            "regular expressions for names that shall train",
            told,
            listed(lost),
        )
    if fresh:
        _logger.warning(
            "meft-ds: %s not from the checkpoint, and the program froze it: it stays at its random values; "
            '"train": [...] in the meft_offload block takes regular expressions for names that shall train',
            listed(fresh),
        )


# -- which parameters are what -----------------------------------------------------------------------------------------


def peft_parameters(model: nn.Module) -> set[int]:
    """ids of the parameters that PEFT added: those of its modules outside the ones that they wrap."""
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


def fresh_parameters(model: nn.Module) -> set[int]:
    """ids of the parameters that transformers made because the checkpoint did not have them, as far as it tells.

    It marks what it loads (5.x always, 4.57 under ZeRO-3), and marks nothing in models without a checkpoint.
    """
    aside = _vocabulary(model) | peft_parameters(model)
    found: set[int] = set()
    for _, inner in _pretrained(model):
        params = [p for p in inner.parameters() if id(p) not in aside]
        unmarked = [p for p in params if not getattr(p, "_is_hf_initialized", False)]
        # more than half: marks were lost, because the program put tensors of its own in
        if 2 * sum(map(numel_of, unmarked)) < sum(map(numel_of, params)):
            found.update(map(id, unmarked))
    return found


def head_parameters(model: nn.Module) -> set[int]:
    """ids of the parameters of heads for classification, regression, questions, choices, rewards and values: by name,
    or what a model for such a task has outside its base, or what a program has put around a pretrained model."""
    outer = _pretrained(model)
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
    return found - _vocabulary(model) - peft_parameters(model)


def _own_name(name: str) -> str:
    """PEFT's `modules_to_save` keeps a head under a name of its own, as do wrappers of compiled modules."""
    return name.removesuffix("._orig_mod").rpartition(".")[2]


def _outside(module: nn.Module, parts: Sequence[nn.Module]) -> set[int]:
    inside = {id(p) for part in parts for p in part.parameters()}
    return {id(p) for p in module.parameters()} - inside


def _pretrained(model: nn.Module) -> list[tuple[str, Any]]:
    """The outermost of transformers' models in `model`, by their names."""
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


def _vocabulary(model: nn.Module) -> set[int]:
    """ids of the parameters of output heads over a vocabulary, and of what is tied to them."""
    modules = {*output_heads(model), *(m for name, m in model.named_modules() if name.split(".")[-1] == "lm_head")}
    return {id(p) for module in modules for p in module.parameters()}
