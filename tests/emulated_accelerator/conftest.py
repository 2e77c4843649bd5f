# SPDX-License-Identifier: Apache-2.0
"""The process that forks ranks which train on the emulated accelerator."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
import torch

from tests.forked import Forge


@pytest.fixture(scope="session")
def emulated_forge() -> Iterator[Forge]:
    """A forge whose ranks have the emulated accelerator, one for each worker of pytest-xdist."""
    for program in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(program) is None:
            pytest.skip(f"the emulated accelerator is built with {program}, which is not here")
    if torch.__version__ < "2.13":
        pytest.skip(f"the emulated accelerator needs torch 2.13, this is {torch.__version__}")
    with Forge("tests.emulated_accelerator.preload:preload") as made:
        yield made
