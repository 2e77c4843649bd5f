# SPDX-License-Identifier: Apache-2.0
"""What trains beside a method that leaves the base alone.

That is heads, tensors that the checkpoint did not bring, PEFT's parameters, what a program left trainable when it froze
most of the model, and what the block's "train" names.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from meft_ds.offload.method import Method
from meft_ds.offload.model.heads import head_parameters, peft_parameters, pretrained, vocabulary_parameters
from meft_ds.offload.model.weights import numel_of
from meft_ds.options import compiled, listed

_logger = logging.getLogger("meft_ds")
_FROZEN = "_meft_frozen"  # names of what an engine froze, on the model that it was given
_WHY = {"peft": "PEFT", "head": "a head", "fresh": "not in the checkpoint", "left": "left trainable", "train": "train"}


def freeze(model: nn.Module, train: Sequence[str] | None, methods: Sequence[Method], *, tells: bool) -> None:
    """Freeze the base apart from what is to train.

    Without `train`, nothing is frozen when a method trains the base itself. Otherwise these stay trainable if the
    program left them so: heads, tensors that the checkpoint did not bring, and PEFT's. In a model of which the program
    froze most, all that it left trainable stays so. Patterns of `train` add to that; an empty `train` freezes all.

    Args:
        model: with the methods' own parameters in it; `thaw` has undone what an engine before froze.
        train: regular expressions; None where the block has no such key.
        methods: prepared.
        tells: whether this rank logs what else trains, and what is frozen that the program may have meant to train.

    Raises:
        ValueError: for a pattern that matches nothing, naming it.
    """
    alone = all(method.freezes_base for method in methods)
    if train is None and not alone:
        return
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


def thaw(model: nn.Module) -> None:
    """Let train again what engines before froze, so that the model is as the program left it."""
    for module in model.modules():
        names = module.__dict__.get(_FROZEN, ())
        named = dict(module.named_parameters()) if names else {}
        for name in names:
            if name in named:
                named[name].requires_grad_(True)
        module.__dict__.pop(_FROZEN, None)  # last: what fails half way is done again by the next engine


def _matched(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    idle = []
    for pattern in patterns:
        search = compiled(pattern).search
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
        _logger.info('beside %s train %s; "train": [] freezes them', told, listed(unasked))
    if lost:
        _logger.info(
            '%s freezes what the program left trainable: %s; "train": [...] in the meft_offload block takes '
            "regular expressions for names that shall train",
            told,
            listed(lost),
        )
    if fresh:
        _logger.warning(
            "%s not from the checkpoint, and the program froze it: it stays at its random values; "
            '"train": [...] in the meft_offload block takes regular expressions for names that shall train',
            listed(fresh),
        )


def fresh_parameters(model: nn.Module) -> set[int]:
    """Return the ids of parameters that transformers made because the checkpoint lacks them, as far as it tells.

    It marks what it loads (5.x always, 4.57 under ZeRO-3), and marks nothing in models without a checkpoint.
    """
    aside = vocabulary_parameters(model) | peft_parameters(model)
    found: set[int] = set()
    for _, inner in pretrained(model):
        params = [p for p in inner.parameters() if id(p) not in aside]
        unmarked = [p for p in params if not getattr(p, "_is_hf_initialized", False)]
        # more than half: marks were lost, because the program put tensors of its own in
        if 2 * sum(map(numel_of, unmarked)) < sum(map(numel_of, params)):
            found.update(map(id, unmarked))
    return found
