# SPDX-License-Identifier: Apache-2.0
"""What `meft-ds doctor` says: facts, notes, and findings, each of which has a fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """One line. `fix` is what to do, and only findings have it."""

    subject: str
    level: Literal["fine", "note", "finding"]
    text: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert bool(self.fix) == (self.level == "finding"), self


def fine(subject: str, text: str) -> Check:
    """Return what is as it should be."""
    return Check(subject, "fine", text)


def note(subject: str, text: str) -> Check:
    """Return what is good to know."""
    return Check(subject, "note", text)


def finding(subject: str, text: str, fix: str) -> Check:
    """Return what should be changed."""
    return Check(subject, "finding", text, fix)
