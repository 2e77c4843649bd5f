# SPDX-License-Identifier: Apache-2.0
"""What runs when a program ends without having taken its engines down: updates under way must land, and the lanes'
threads must stop, before the interpreter takes modules and tensors away.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol


class Finishes(Protocol):
    """Something with work under way."""

    def finish_at_exit(self) -> None:
        """End it within a bounded time. Must not raise."""


def finish_at_exit(thing: Finishes) -> weakref.finalize[[weakref.ref[Any]], Any]:
    """Have `thing` finish when the interpreter exits, if it still lives then; `detach()` the result to cancel that.

    The last one registered finishes first, and lanes stop themselves in the same order: register after what `thing`
    needs was made.
    """
    return weakref.finalize(thing, _finish, weakref.ref(thing))


def _finish(thing: weakref.ref[Any]) -> None:
    if (alive := thing()) is not None:  # else it was collected long before the exit
        alive.finish_at_exit()
