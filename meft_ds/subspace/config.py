# SPDX-License-Identifier: Apache-2.0
"""The ``subspace`` settings of the ``meft_offload`` block."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from meft_ds.options import Settings, count, not_negative, patterns, positive, size_or_fraction, whole

_LEAST_GAIN = 1.5
"""Values of a matrix for each of its S, or learning through S saves next to nothing."""
_THIN, _FEW = 8, 2**21
"""A matrix whose sides are that different keeps less than 1 of 32 of its values in S (at half of the shorter side); one
with so few values costs at most 24 MiB uncompressed."""


class SubspaceConfig(Settings):
    """Settings of learned subspace projectors (LSP-Offload, arXiv 2406.10181). Letters: W is m x n, S is d x d."""

    dim: Annotated[int | float, BeforeValidator(size_or_fraction)] = Field(
        0.5,
        description="d, the side of the compressed gradient: a whole number, or a fraction of a matrix's smaller side. "
        "What d would not make smaller trains uncompressed, and at a fraction also what gains too little: d below 2 "
        "nonzeros, S more than two thirds of the matrix, or a longer side over 8 times the shorter in at most "
        "2,097,152 values (routers, low-rank factors). Default: half (the paper's 2,048 of 4,096).",
    )
    nonzeros: Annotated[int, BeforeValidator(count)] = Field(
        4, description="k, nonzeros in each row of a projector. The paper: 4 to 16."
    )
    gradient_side: Literal["activation", "weight"] = Field(
        "activation",
        description='Where S comes from. "activation": from sketches of the layer\'s input and output gradient; no '
        'm x n gradient is ever computed. "weight": from the gradient that autograd computed. Same S up to rounding.',
    )
    projectors: Literal["learned", "random"] = Field(
        "learned",
        description="learned: fitted to gradients, as in the paper. random: only drawn, and drawn anew every "
        "refit_interval steps; cheaper, and better or far worse depending on the task (benchmarks/README.md).",
    )
    refit_interval: Annotated[int, BeforeValidator(whole)] = Field(
        1000,
        description="Optimizer steps between checks of the projectors; 0 = never after the first. The paper: 100 to "
        "1,000. Default: its upper end, because a refit at step 100 cost accuracy (benchmarks/README.md).",
    )
    refit_threshold: Annotated[float, BeforeValidator(not_negative)] = Field(
        0.3,
        description="A check keeps projectors whose relative bias on fresh gradients is at most this. The paper: 0.3.",
    )
    fit_steps: Annotated[int, BeforeValidator(whole)] = Field(
        50, description="Most Adam steps of one matrix's fit. The paper: up to 100."
    )
    fit_lr: Annotated[float, BeforeValidator(positive())] = Field(
        0.5,
        description="Learning rate of the fit, relative to the RMS of the values. Default: measured "
        "(benchmarks/README.md).",
    )
    fit_seconds: Annotated[float, BeforeValidator(not_negative)] = Field(
        600.0,
        description="Most seconds that one check of all matrices may spend on fitting; those left then keep what they "
        "have. A fit cut short depends on the clock and is warned of.",
    )
    scale: Annotated[float | Literal["adam"], BeforeValidator(positive("adam"))] = Field(
        "adam",
        description='Factor on every update. "adam": sqrt(m n) / d, so that a step moves W by about as much as AdamW '
        "with the same learning rate would.",
    )
    rounding: Literal["stochastic", "residual"] = Field(
        "stochastic",
        description="How updates reach bf16 and fp16 weights. stochastic: rounded up or down at random, right on "
        "average. residual: to nearest, with what is lost kept in fp32 on the device (4 bytes per parameter).",
    )
    state_device: Literal["auto", "cpu", "accelerator"] = Field(
        "auto",
        description="Where the moments of S live. auto = on the accelerator when they take at most a twentieth of its "
        "memory, else on the host.",
    )
    target_modules: Annotated[tuple[str, ...] | None, BeforeValidator(patterns)] = Field(
        None,
        description="Regular expression(s) for whole names of the modules to compress. null = all linear layers and "
        "expert tensors except embeddings, heads, PEFT's, tied weights and matrices too small to gain. Heads and what "
        "PEFT added are never compressed; small matrices are when they are named here.",
    )
    seed: Annotated[int, BeforeValidator(whole)] = Field(
        0, description="Seed of positions, signs and rounding; independent of the global random state."
    )

    def dim_of(self, m: int, n: int) -> int:
        """Return d for an m x n matrix; 0 when compressing it would not pay.

        A whole number and a matrix that `target_modules` names are what the user asked for, so there it only has to
        be possible.
        """
        short, long = min(m, n), max(m, n)
        d = self.dim if isinstance(self.dim, int) else round(self.dim * short)
        if not self.nonzeros <= d < short:
            return 0
        if isinstance(self.dim, int) or self.target_modules is not None:
            return d
        thin = long > _THIN * short and m * n <= _FEW
        return 0 if thin or d < 2 * self.nonzeros or _LEAST_GAIN * d * d > m * n else d
