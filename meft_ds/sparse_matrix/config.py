# SPDX-License-Identifier: Apache-2.0
"""The ``sparse_matrix`` settings of the ``meft_offload`` block."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from meft_ds.options import Settings, compiled, count, count_or_auto, file_name, fraction, patterns, shown, whole

PAPER_ROLES = ("q", "k", "v")
LARGEST_SIDE = 256
"""Of tiles, unless the user asks for larger ones: the paper's."""
_LEAST_SIDE = 4
WITHOUT_GRADIENTS = ("random", "magnitude")
"""Scores that need no window: they are known from the weights alone."""
_MAKE_THE_CHOICE = (
    *("density", "budget", "preset", "score", "normalize", "block_size", "warmup_steps"),
    *("target_modules", "choice_out", "seed"),
)


def _budget(value: Any) -> str | dict[str, float] | None:
    if value is None or value in ("global", "per_module"):
        return None if value is None else str(value)
    if not isinstance(value, dict) or not value or not all(isinstance(role, str) for role in value):
        raise ValueError(
            'expected null, "global", "per_module" or an object of fractions by role such as {"q": 0.02}, '
            f"got {shown(value)}"
        )
    found = {}
    for role, share in value.items():
        try:
            found[role] = fraction(share)
        except ValueError as fault:
            raise ValueError(f"{shown(role)[1:-1]}: {fault}") from None
    return found


def _segments(value: Any) -> dict[str, list[int]]:
    if not isinstance(value, dict):
        raise ValueError(f'expected an object such as {{".*\\\\.qkv": [4096, 1024, 1024]}}, got {shown(value)}')
    for pattern, sizes in value.items():
        patterns([pattern])
        if not isinstance(sizes, list | tuple) or not sizes:
            raise ValueError(f"{shown(pattern)[1:-1]}: expected a list of the parts' sizes, got {shown(sizes)}")
        for size in sizes:
            count(size)
    return {pattern: list(sizes) for pattern, sizes in value.items()}


class SparseMatrixConfig(Settings):
    """Settings of sparse matrix tuning (SMT, arXiv 2405.15525). A tile is a rectangle of a weight as it is stored; a
    role is what a weight does in its layer: q, k, v, o, gate, up, down, or the name of its module."""

    density: Annotated[float, BeforeValidator(fraction)] = Field(
        0.01,
        description="Trained elements as a fraction of the elements of all 2-D weights of the model, embeddings and "
        "head included. The paper: 0.0071 to 0.0491 on LLaMA; default: near its lower end.",
    )
    budget: Annotated[str | dict[str, float] | None, BeforeValidator(_budget)] = Field(
        None,
        description='How density is shared out. "global": the best tiles wherever they are, as in the paper. '
        '"per_module": the same fraction of every matrix and every expert. An object such as {"q": 0.02, "v": 0.05}: '
        "that fraction of each role's own elements, nothing of roles that are not named; density then has no meaning. "
        'null: "global" with preset "paper", else "per_module", which learned far more (benchmarks/README.md).',
    )
    preset: Literal["all", "paper"] = Field(
        "all",
        description='"all": tiles of every linear layer, scores relative to their role. "paper": tiles of q, k and v '
        "only, scores as they are.",
    )
    score: Literal["abs_mean", "l2", "mean_abs", "paper", "random", "magnitude"] = Field(
        "abs_mean",
        description="What ranks tiles. abs_mean: mean |g| of a tile, summed over batches. l2: root mean square of g, "
        "likewise. mean_abs: |mean of g|, likewise; costs no weight gradient. paper: mean |g summed over the batches|, "
        "which takes two float32 copies of the scored weights on the host. random and magnitude (mean |W|): baselines "
        "without gradients. Default: abs_mean, the paper's score without those copies.",
    )
    normalize: bool | None = Field(
        None,
        description="Divide scores by the mean of their role, so that roles with larger gradients do not take all. "
        'null = with preset "all", except for score "random".',
    )
    block_size: Annotated[int | Literal["auto"], BeforeValidator(count_or_auto)] = Field(
        "auto",
        description="Side of a tile; tiles at an edge are smaller. auto = the paper's 256 where a matrix's share of "
        "the budget is at least half of such a tile (at density 0.01: from 3.3 M elements on), else the largest power "
        "of two, from 4, of which the share holds one whole tile: or small matrices would get none.",
    )
    warmup_steps: Annotated[int, BeforeValidator(whole)] = Field(
        100,
        description='Windows (optimizer steps) that only score and change no weight. The paper: 100. Scores "random" '
        'and "magnitude" need none and ignore it.',
    )
    target_modules: Annotated[tuple[str, ...] | None, BeforeValidator(patterns)] = Field(
        None,
        description="Regular expression(s) for whole names of the modules that may have tiles. null = all linear "
        "layers and expert tensors except embeddings, the output head and tied weights.",
    )
    segments: Annotated[dict[str, list[int]], BeforeValidator(_segments)] = Field(
        {},
        description="For fused layers that are not known: regular expression for whole names of modules (of "
        "parameters, for expert tensors) -> sizes of the parts along the output dimension. No tile spans two parts.",
    )
    state_device: Literal["auto", "cpu", "accelerator"] = Field(
        "auto",
        description="Where masters and moments of the tiles live. auto = on the accelerator when they take at most a "
        "twentieth of its memory, else on the host.",
    )
    choice_file: Annotated[str | None, BeforeValidator(file_name)] = Field(
        None,
        description="Train the tiles that this JSON file names, which an earlier run wrote, and score nothing. "
        "null = score first.",
    )
    choice_out: Annotated[str | None, BeforeValidator(file_name)] = Field(
        None, description="Write the chosen tiles to this JSON file as soon as they are known. null = do not."
    )
    seed: Annotated[int, BeforeValidator(whole)] = Field(
        0, description='Seed of score "random"; independent of the global random state.'
    )

    @model_validator(mode="after")
    def _cross_checks(self) -> SparseMatrixConfig:
        faults = []
        if self.choice_file is not None:
            idle = sorted(self.model_fields_set.intersection(_MAKE_THE_CHOICE))
            if idle:
                faults.append(f"choice_file: tiles are read from it, so {', '.join(idle)} would have no effect; remove")
        else:
            if isinstance(self.budget, dict) and "density" in self.model_fields_set:
                faults.append("density: the fractions of budget say how much of each role trains; remove density")
            if self.warmup_steps == 0 and self.score not in WITHOUT_GRADIENTS:
                faults.append(
                    f'warmup_steps: score "{self.score}" needs at least 1 window; raise warmup_steps, or use score '
                    '"magnitude" or "random"'
                )
        if self.preset == "paper" and isinstance(self.budget, dict) and not set(self.budget) <= set(PAPER_ROLES):
            others = ", ".join(sorted(set(self.budget) - set(PAPER_ROLES)))
            faults.append(f'budget: preset "paper" has tiles of q, k and v only, not of {others}; use preset "all"')
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def shared_out(self) -> str | dict[str, float]:
        """`budget`, or what the preset makes of null."""
        if self.budget is not None:
            return self.budget
        return "global" if self.preset == "paper" else "per_module"

    @property
    def roles(self) -> tuple[str, ...] | None:
        """Roles that may have tiles; None for all."""
        if isinstance(self.budget, dict):
            return tuple(self.budget)
        return PAPER_ROLES if self.preset == "paper" else None

    @property
    def normalized(self) -> bool:
        """Whether scores are divided by the mean of their role."""
        if self.normalize is not None:
            return self.normalize
        # the mean of a role with one tile is that tile's own score, which would no longer be drawn at random
        return self.preset == "all" and self.score != "random"

    @property
    def windows(self) -> int:
        """Optimizer steps that only score, before any training."""
        return 0 if self.choice_file is not None or self.score in WITHOUT_GRADIENTS else self.warmup_steps

    def side_of(self, elements: int, roles: Iterable[str]) -> int:
        """Return the side of the tiles of a matrix with so many elements and parts of these roles."""
        if self.block_size != "auto":
            return self.block_size
        fractions = [self.density]
        if isinstance(self.budget, dict):
            fractions = [self.budget[role] for role in roles if role in self.budget] or [1.0]
        share = math.floor(Fraction(str(min(fractions))) * elements)
        if 2 * share >= LARGEST_SIDE**2:
            return LARGEST_SIDE
        return max(1 << (math.isqrt(share).bit_length() - 1), _LEAST_SIDE) if share else _LEAST_SIDE

    def segments_of(self, name: str) -> tuple[str, list[int]] | None:
        """Return the first pattern of `segments` that matches `name`, and its sizes; None without one."""
        return next(((p, sizes) for p, sizes in self.segments.items() if compiled(p).fullmatch(name)), None)
