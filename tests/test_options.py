# SPDX-License-Identifier: Apache-2.0
"""A user's regular expression is Python's own, and matching ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from meft_ds import options
from meft_ds.config import parse_config
from meft_ds.plugin import trainable
from meft_ds.sparse_adapter.discover import find_ffns
from meft_ds.sparse_matrix.discover import find_sites
from meft_ds.subspace.discover import find_matrices

NAMES = ["model.layers.3.mlp.down_proj", "lm_head", "model.norm.weight", "a" * 40 + "b", ""]
USUAL = [
    ".*mlp",
    r"layers\.[0-9]+\.mlp",
    "norm|head",
    "^model",
    "weight$",
    r"(?:[a-z]+\.)+norm",
    r"\bmlp\b",
    "[^a]{1,3}x",
]
ENDLESS = "(a|aa)+$"
LONG = "a" * 70 + "b"


@pytest.mark.parametrize("pattern", USUAL)
def test_patterns_match_what_pythons_own_do(pattern: str) -> None:
    for name in NAMES:
        ours = options.compiled(pattern)
        assert ours.search(name) == bool(re.search(pattern, name))
        assert ours.fullmatch(name) == bool(re.fullmatch(pattern, name))


def model() -> nn.Module:
    return nn.ModuleDict({LONG: nn.Linear(64, 64)})


def sites_of(find: Callable[..., Any], block: str, key: str) -> Any:
    settings = {key: {ENDLESS: [1]} if key == "segments" else ENDLESS}
    return find(model(), getattr(parse_config({block: settings}), block))


WAYS: dict[str, Callable[[], Any]] = {
    "sparse_adapter": lambda: find_ffns(model(), [ENDLESS]),
    "subspace": lambda: sites_of(find_matrices, "subspace", "target_modules"),
    "sparse_matrix": lambda: sites_of(find_sites, "sparse_matrix", "target_modules"),
    "segments": lambda: sites_of(find_sites, "sparse_matrix", "segments"),
    "train": lambda: trainable._matched([ENDLESS], [LONG]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_pattern_that_would_never_end_is_refused_by_name(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_SECONDS", 0.1)
    options.compiled.cache_clear()
    with pytest.raises(ValueError, match=re.escape(f"'{ENDLESS}' takes longer than 0.1 s")):
        WAYS[way]()
    options.compiled.cache_clear()


def test_repeats_inside_repeats_that_are_no_harm_work() -> None:
    assert options.compiled("(a+)+$").search(LONG) is False
    assert options.compiled(r"(\w+\.?)*down_proj").fullmatch(NAMES[0])


@pytest.mark.parametrize(
    "pattern", ["(?:a{9999}){9999}", "a{99999}", "(" * 5000, "a{99999999999999}", "[", "(?P<a>b)(?P<a>c)"]
)
def test_what_is_no_expression_or_too_large_is_refused_before_it_takes_memory(pattern: str) -> None:
    with pytest.raises(ValueError, match="is not a regular expression"):
        options.patterns(pattern)
