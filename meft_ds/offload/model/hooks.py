# SPDX-License-Identifier: Apache-2.0
"""`ModelHook`: what a model carries for the engine that trains it."""

from __future__ import annotations

from typing import Any


class ModelHook:
    """A hook, a forward or a method that an engine puts into a model.

    No engine trains a copy of the model, so `copy.deepcopy` and pickle make a hook that knows nobody: the class called
    with what `of_copy` returns. Subclasses keep the engine's objects by weak references, because a model may outlive
    its engine.
    """

    def of_copy(self) -> tuple[Any, ...]:
        """Return the arguments of a copy's constructor. Modules among them are copied with the model."""
        return ()

    def __reduce__(self) -> Any:
        return type(self), self.of_copy()
