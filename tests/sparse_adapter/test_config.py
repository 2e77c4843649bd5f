# SPDX-License-Identifier: Apache-2.0
"""Settings of the sparse adapter: defaults, "auto", and what is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from meft_ds.sparse_adapter.config import SparseAdapterConfig


def test_auto_follows_the_paper() -> None:
    at_7b = SparseAdapterConfig(rows=8464).resolve(4096)
    assert (at_7b.experts, at_7b.experts_per_token, at_7b.keys_per_token, at_7b.slice_size) == (368, 8, 64, 23)
    auto = SparseAdapterConfig().resolve(512, 0.01)
    assert (auto.rows, auto.experts, auto.cache_rows, auto.init_std) == (1024, 128, 1024, 0.01)
    assert SparseAdapterConfig().resolve(4096).cache_rows == 4096
    assert SparseAdapterConfig(router_scale="paper").resolve(64).router_scale == 50
    assert SparseAdapterConfig(router_scale=2).resolve(64).router_scale == 2.0
    assert 1.0 < at_7b.router_scale < 2.5


def test_every_field_is_described() -> None:
    assert all(field.description for field in SparseAdapterConfig.model_fields.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": 32}, "keys_per_token: 64 is more than rows = 32"),
        ({"rows": 100, "experts": 101}, "experts: 101 is more than rows = 100"),
        ({"experts": 4}, "experts_per_token: 8 is more than experts = 4"),
        ({"rows": 100, "experts": 4}, "experts_per_token: 8 is more than experts = 4"),
        ({"gate": False, "balance_loss": 0.1}, "balance_loss"),
        ({"rows": 0}, 'at least 1 or "auto"'),
        ({"rows": True}, "rows"),
        ({"rows": 64.0}, "rows"),
        ({"rows": "64"}, "rows"),
        ({"experts": -1}, "experts"),
        ({"keys_per_token": 0}, "at least 1"),
        ({"experts_per_token": 0}, "at least 1"),
        ({"experts_per_token": True}, "at least 1"),
        ({"gate": 1}, "gate"),
        ({"scope": "sentence"}, "scope"),
        ({"balance_loss": -0.1}, "at least 0"),
        ({"balance_loss": float("nan")}, "at least 0"),
        ({"router_scale": 0}, "above 0"),
        ({"router_scale": "big"}, '"unit" or "paper"'),
        ({"init_std": float("inf")}, "above 0"),
        ({"cache_rows": 0}, "cache_rows"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"target_modules": []}, "target_modules"),
        ({"seed": -1}, "seed"),
        ({"rovs": 1}, "rovs"),
    ],
)
def test_impossible_settings_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SparseAdapterConfig(**given)


def test_sizes_that_only_fail_for_a_hidden_size_are_refused_then() -> None:
    with pytest.raises(ValueError, match="hidden size 16.*keys_per_token: 64 is more than rows = 32"):
        SparseAdapterConfig().resolve(16)


def test_all_cross_faults_come_at_once() -> None:
    with pytest.raises(ValidationError) as fault:
        SparseAdapterConfig(rows=10, experts=20, experts_per_token=30, gate=False, balance_loss=1.0)
    assert all(name in str(fault.value) for name in ("keys_per_token", "experts:", "experts_per_token", "balance_loss"))


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        SparseAdapterConfig().rows = 3  # type: ignore[misc]
