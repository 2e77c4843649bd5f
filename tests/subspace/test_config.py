# SPDX-License-Identifier: Apache-2.0
"""The "subspace" settings."""

from __future__ import annotations

from meft_ds.config import parse_config


def test_every_setting_can_be_given() -> None:
    given = {"dim": 0.25, "nonzeros": 8, "seed": 3, "scale": 1.0, "projectors": "random", "refit_interval": 0}
    config = parse_config({"subspace": given}).subspace
    assert config is not None and given.items() <= config.model_dump().items()
    assert parse_config({"subspace": config.model_dump()}).subspace == config
