# SPDX-License-Identifier: Apache-2.0
"""Validators that the settings of several rooms share; each error says what was expected."""

from __future__ import annotations

import math
import re
from typing import Any


def positive_int(value: Any) -> int:
    """A whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected a whole number of at least 1, got {value!r}")
    return value


def positive_int_or_auto(value: Any) -> int | str:
    """A whole number from 1, or "auto"."""
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f'expected a whole number of at least 1 or "auto", got {value!r}')
    return value


def size_or_fraction(value: Any) -> int | float:
    """A whole number from 1, or a fraction above 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or not math.isfinite(value):
        raise ValueError(f"expected a whole number of at least 1, or a fraction below 1, got {value!r}")
    if isinstance(value, float) and value >= 1:
        raise ValueError(f"expected a fraction below 1 or a whole number without a decimal point, got {value!r}")
    return value


def whole(value: Any) -> int:
    """A whole number from 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"expected a whole number of at least 0, got {value!r}")
    return value


def seed(value: Any) -> int:
    """A whole number from 0 to 2**31 - 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"expected a whole number from 0 to 2**31 - 1, got {value!r}")
    return value


def not_negative(value: Any) -> float:
    """A finite number from 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"expected a finite number of at least 0, got {value!r}")
    return float(value)


def positive(value: Any, words: tuple[str, ...] = ()) -> float | str:
    """A finite number above 0, or one of `words`."""
    if isinstance(value, str) and value in words:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        named = "".join(f' or "{word}"' for word in words)
        raise ValueError(f"expected a finite number above 0{named}, got {value!r}")
    return float(value)


def patterns(value: Any) -> tuple[str, ...] | None:
    """None, a regular expression, or a list of them."""
    if value is None:
        return None
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(p, str) and p for p in listed):
        raise ValueError(f"expected null, a regular expression or a list of them, got {value!r}")
    for pattern in listed:
        try:
            re.compile(pattern)
        except re.error as fault:
            raise ValueError(f"{pattern!r} is not a regular expression: {fault}") from None
    return tuple(listed)
