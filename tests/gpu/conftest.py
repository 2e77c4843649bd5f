# SPDX-License-Identifier: Apache-2.0
"""Tests that need an accelerator: skipped, with the reason said, where PyTorch sees no CUDA device."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(skip)


@pytest.fixture
def cuda() -> torch.device:
    """The first CUDA device."""
    return torch.device("cuda", 0)
