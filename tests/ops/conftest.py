# SPDX-License-Identifier: Apache-2.0
"""Runs tests on the C++ path and on the plain torch path."""

from __future__ import annotations

import pytest

from meft_ds import ops


@pytest.fixture(params=["cpp", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MEFT_DS_OPS", "torch" if request.param == "torch" else "")
    if ops.backend() != request.param:
        pytest.skip("the C++ kernels cannot be built here")
    return str(request.param)
