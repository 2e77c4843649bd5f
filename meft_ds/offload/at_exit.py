# SPDX-License-Identifier: Apache-2.0
"""What runs when a program ends without having taken its engines down: updates under way must land, and the lanes'
threads must stop, before the interpreter takes modules and tensors away.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable
from functools import partial


def call_at_exit(method: Callable[[], None]) -> Callable[[], None]:
    """Call a bound method when the interpreter exits, if its object still lives then; returns what cancels that.

    The newest call comes first, and before whatever was to end at exit already: register after what the method needs
    (lanes, writers) was made.
    """
    found = weakref.WeakMethod(method)

    def call() -> None:
        if (alive := found()) is not None:
            alive()

    atexit.register(call)
    return partial(atexit.unregister, call)
