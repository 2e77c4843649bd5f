# SPDX-License-Identifier: Apache-2.0
"""Runs a module's tests with the C++ kernels and without them, where the adapter takes its batched torch form."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from meft_ds import ops


@pytest.fixture(params=["cpp", "torch"], scope="module")
def ops_path(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEFT_DS_OPS", "torch" if request.param == "torch" else "")
        if ops.backend() != request.param:
            pytest.skip("the C++ kernels cannot be built here")
        yield str(request.param)
