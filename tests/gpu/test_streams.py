# SPDX-License-Identifier: Apache-2.0
"""Engines on an accelerator: the same bits however late its streams are, and the losses and weights of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.gpu.runs import CASES, Result, assert_close, differing, result_of


@pytest.mark.parametrize("name", CASES)
def test_streams_that_are_late_change_no_bit_and_the_cpu_agrees(
    name: str, make_streams_late: Callable[[Any, int], None], on_cpu: Callable[[str], Result]
) -> None:
    case = CASES[name]
    in_order = result_of(case, case.twin, inline=True)
    late = result_of(case, case.mode, prepare=lambda engine: make_streams_late(engine, seed=1))
    assert differing(in_order, late) == []
    if case.precision == "fp32":
        assert_close(case, in_order, on_cpu(name))
