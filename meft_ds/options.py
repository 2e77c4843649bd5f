# SPDX-License-Identifier: Apache-2.0
"""Validators that the settings of several rooms share; each error says what was expected."""

from __future__ import annotations

import functools
import math
import os
import re
import reprlib
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import regex
from pydantic import BaseModel, ConfigDict

LARGEST = 2**31 - 1
"""The largest whole number that a setting may be."""
MOST_LISTED = 20
"""Names or faults in an error."""
_SECONDS = 10.0
_MOST_REPEATS = 10_000
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120
_REPR.maxlong, _REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 40, 3, 8, 8, 8


class Settings(BaseModel):
    """Settings of a block, or of an object in it: no other keys, no other types, and they stay as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def shown(value: Any) -> str:
    """`value` as an error shows it: its repr, cut where it is long or deep."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return f"{type(value).__name__} of more than 4,300 digits"


def listed(items: Sequence[str], most: int = 8, between: str = "; ") -> str:
    """Return the first of them, and how many more there are, for a message."""
    more = len(items) - most
    return between.join(items[:most]) + (f"{between}and {more:,} more" if more > 0 else "")


def is_whole(value: Any, least: int, most: int = LARGEST) -> TypeGuard[int]:
    """Whether it is a whole number in this range; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number that a float can hold, not NaN and not infinite; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def number(
    what: str, low: float, high: float = math.inf, *, whole: bool = False, words: tuple[str, ...] = ()
) -> Callable[[Any], Any]:
    """Return a validator of finite numbers from `low` to `high`.

    It gives a whole number as it is (with `whole` it takes no others), others as a float, and one of `words` as it is.

    Args:
        what: the number without its upper limit, as an error names it: "a whole number of at least 1".
    """

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in words:
            return value
        if is_number(value) and low <= value <= high and (isinstance(value, int) or not whole):
            return value if whole else float(value)
        limit = f" and at most {high}" if high < LARGEST or (isinstance(value, int) and value > high) else ""
        named = "".join(f' or "{word}"' for word in words)
        raise ValueError(f"expected {what}{limit}{named}, got {shown(value)}")

    return check


def positive(*words: str, what: str = "a finite number above 0", high: float = math.inf) -> Callable[[Any], Any]:
    """Return a validator of finite numbers above 0, or one of `words`."""
    return number(what, math.nextafter(0, 1), high, words=words)


count = number("a whole number of at least 1", 1, LARGEST, whole=True)
count_or_auto = number("a whole number of at least 1", 1, LARGEST, whole=True, words=("auto",))
whole = number("a whole number of at least 0", 0, LARGEST, whole=True)
not_negative = number("a finite number of at least 0", 0)
fraction = positive(what="a fraction above 0", high=1)


def size_or_fraction(value: Any) -> int | float:
    """A whole number from 1, or a fraction above 0 and below 1."""
    if not is_number(value) or value <= 0 or value > LARGEST:
        raise ValueError(f"expected a whole number of at least 1, or a fraction below 1, got {shown(value)}")
    if isinstance(value, float) and value >= 1:
        raise ValueError(f"expected a fraction below 1 or a whole number without a decimal point, got {value!r}")
    return value


def file_name(value: Any) -> str | None:
    """None, or what can be the path of a file."""
    if value is None:
        return None
    try:
        if isinstance(value, str) and value and "\0" not in value and os.fsencode(value):
            return value
    except UnicodeEncodeError:
        pass
    raise ValueError(f"expected null or the path of a file, got {shown(value)}")


def patterns(value: Any) -> tuple[str, ...] | None:
    """None, a regular expression, or a list of them."""
    if value is None:
        return None
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(p, str) and p for p in listed):
        raise ValueError(f"expected null, a regular expression or a list of them, got {shown(value)}")
    for pattern in listed:
        compiled(pattern)
    return tuple(listed)


class Pattern:
    """A user's regular expression, for names of modules and parameters.

    Python's own `re` takes time that doubles with every letter for some expressions, and no other thread of the process
    runs meanwhile. So matching has an engine that is rarely that slow, and an end.

    Raises:
        ValueError: when it is no regular expression; from `search` and `fullmatch`, when it takes too long.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        counts = [max(int(n) for n in found if n) for found in re.findall(r"\{(\d{1,9}),?(\d{0,9})\}", pattern)]
        try:
            if math.prod(counts) > _MOST_REPEATS:  # they are written out one by one
                raise ValueError(f"it repeats something {math.prod(counts):,} times; {_MOST_REPEATS:,} is the most")
            re.compile(pattern)  # this is what users know
            self._compiled = regex.compile(pattern)
        except (re.error, regex.error, OverflowError, RecursionError, ValueError) as fault:
            why = "it is nested too deeply" if isinstance(fault, RecursionError) else fault
            raise ValueError(
                f"{shown(pattern)} is not a regular expression ({why}); escape special characters"
            ) from None
        self._left = _SECONDS

    def search(self, name: str) -> bool:
        """Whether it matches somewhere in `name`."""
        return self._matches(self._compiled.search, name)

    def fullmatch(self, name: str) -> bool:
        """Whether it matches all of `name`."""
        return self._matches(self._compiled.fullmatch, name)

    def _matches(self, match: Any, name: str) -> bool:
        start = time.monotonic()
        try:
            return match(name, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            raise ValueError(
                f"the regular expression {shown(self.pattern)} takes longer than {_SECONDS:g} s to match names such as "
                f"{shown(name)}; write it without repeats inside repeats, such as (a+)+"
            ) from None
        finally:
            self._left -= time.monotonic() - start


@functools.cache
def compiled(pattern: str) -> Pattern:
    """The `Pattern`; one for all who ask, so that its time is bounded however often they match."""
    return Pattern(pattern)
