# SPDX-License-Identifier: Apache-2.0
"""One compressed matrix: its two projectors, and where its S lies in a unit's flat vector."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from meft_ds.ops.projector import Projector


@dataclass(eq=False)
class Side:
    """One side of one or more matrices: the projector in use, and while a window is undecided the one before it."""

    name: str
    projector: Projector
    before: Projector | None = None
    users: int = 0


@dataclass(eq=False)
class Matrix:
    """One m x n matrix W and where its S lies.

    `left` is P, over W's first dimension, `right` is Q, over its second; with `input_first` W is [in, out], so that P
    sketches the input, else Q does. `expert` selects from a 3-D parameter.
    """

    name: str
    param: int
    left: Side
    right: Side
    offset: int
    input_first: bool = False
    expert: int | None = None
    fitted: bool = False
    bias: dict[str, float] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Of S."""
        return self.left.projector.dim, self.right.projector.dim

    @property
    def input(self) -> Side:
        return self.left if self.input_first else self.right

    @property
    def output(self) -> Side:
        return self.right if self.input_first else self.left

    @property
    def numel(self) -> int:
        """Elements of S."""
        return self.left.projector.dim * self.right.projector.dim

    def part(self, flat: Tensor) -> Tensor:
        """Return the matrix's S in a flat vector over the unit."""
        return flat[self.offset : self.offset + self.numel].view(self.shape)

    def adam_scale(self) -> float:
        """Return sqrt(m n) / d: P dS Q^T has the RMS of dS times the inverse of this, when columns have length 1."""
        (m, n), (d1, d2) = (self.left.projector.m, self.right.projector.m), self.shape
        return math.sqrt(m * n / (d1 * d2))
