# SPDX-License-Identifier: Apache-2.0
"""A fourth method that only the tests have: single elements of the weights train, drawn at random.

It shows what a method room needs: this folder, one line in the registry, one field in the config (`installed` makes
both for as long as an engine is made), and one line in the table of tests/methods.py. Reading order: config, unit,
method.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated
from unittest import mock

from pydantic import BeforeValidator

from meft_ds import config as block
from meft_ds.plugin import registry
from tests.fourth_method.config import RandomMaskConfig
from tests.fourth_method.method import RandomMaskMethod


class Block(block.MeftConfig):
    """The block with one more field."""

    random_mask: Annotated[RandomMaskConfig | None, BeforeValidator(block.settings_object)] = None


@contextmanager
def installed() -> Iterator[None]:
    """Let blocks name the method."""
    methods = (*registry._METHODS, RandomMaskMethod)
    with mock.patch.object(block, "MeftConfig", Block), mock.patch.object(registry, "_METHODS", methods):
        yield
