# SPDX-License-Identifier: Apache-2.0
"""The ``sparse_adapter`` settings of the ``meft_offload`` block, and the numbers that "auto" becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from meft_ds.options import Settings, count, count_or_auto, not_negative, patterns, positive, size_or_fraction, whole

__all__ = ["PAPER_ROUTER_SCALE", "CompressConfig", "ResolvedCompress", "ResolvedSparseAdapter", "SparseAdapterConfig"]

PAPER_ROUTER_SCALE = 50.0
"""What the authors of MEFT multiply the mean key of an expert by (their training code)."""


_Auto = Literal["auto"]
_IntOrAuto = Annotated[int | _Auto, BeforeValidator(count_or_auto)]


class CompressConfig(Settings):
    """Settings of the compression of row gradients (LSP-Offload, arXiv 2406.10181, on one side only)."""

    dim: Annotated[int | float, BeforeValidator(size_or_fraction)] = Field(
        0.5,
        description="d', what the d values of a key's or a value's gradient become: a whole number below d, or a "
        "fraction of d. Default: half, as the LSP-Offload paper's 2,048 of 4,096.",
    )
    nonzeros: Annotated[int, BeforeValidator(count)] = Field(
        4, description="k, nonzeros in each row of Q. The LSP-Offload paper: 4 to 16."
    )
    scale: Annotated[float | Literal["adam"], BeforeValidator(positive("adam"))] = Field(
        "adam",
        description='Factor on every update. "adam": sqrt(d / d\'), so that a step moves a row by about as much as '
        "AdamW with the same learning rate would.",
    )

    def resolve(self, d: int) -> ResolvedCompress:
        """Return the numbers for rows of two halves of ``d`` values. Raises ValueError when that ``d`` cannot work."""
        dim = self.dim if isinstance(self.dim, int) else round(self.dim * d)
        prefix = f"sparse_adapter.compress at hidden size {d}: "
        if dim >= d:
            raise ValueError(f"{prefix}dim: {dim} is not below {d} and would save nothing; lower dim")
        if self.nonzeros > dim:
            raise ValueError(f"{prefix}nonzeros: {self.nonzeros} is more than dim = {dim}; lower nonzeros or raise dim")
        return ResolvedCompress(
            dim=dim, nonzeros=self.nonzeros, scale=math.sqrt(d / dim) if self.scale == "adam" else float(self.scale)
        )


class SparseAdapterConfig(Settings):
    """Settings of the sparse adapter (MEFT, arXiv 2406.04984). Letters: d = hidden size, r = rows per layer.

    ``SparseAdapterConfig()`` is the published setting. ``resolve`` turns every "auto" into a number.
    """

    rows: _IntOrAuto = Field(
        "auto",
        description="r, key/value rows per layer. auto = 2 d (the paper: 8,464 at d = 4,096, about 2.07 d).",
    )
    experts: _IntOrAuto = Field(
        "auto",
        description="N, experts per layer; each owns a contiguous slice of r/N rows (sizes differ by at most one). "
        "auto = round(4 sqrt(r)), the paper's rule, at least experts_per_token and at most rows.",
    )
    experts_per_token: Annotated[int, BeforeValidator(count)] = Field(
        8, description="E, experts whose keys a token looks at. Default from the paper."
    )
    keys_per_token: Annotated[int, BeforeValidator(count)] = Field(
        64, description="K, most rows that a token uses. Default from the paper."
    )
    gate: bool = Field(
        True,
        description="Multiply each key's score by its expert's router logit (the authors' training code). false is the "
        "paper's Algorithm 1: the router only picks experts and gets no gradient.",
    )
    scope: Literal["token", "batch"] = Field(
        "token",
        description='"token": a token uses its own K rows, so a sentence does not depend on its batch neighbours. '
        "\"batch\" is the paper's Algorithm 1: every token uses the union of all tokens' rows; a different function.",
    )
    selection: Literal["host", "device"] = Field(
        "host",
        description='Where key scores are computed. "host": inputs travel down, device memory does not grow with r. '
        '"device": a copy of the keys (r d values per layer) stays on the device and only needed rows travel up.',
    )
    optimizer: Literal["dense", "lazy"] = Field(
        "dense",
        description='"dense": AdamW moves every row at every step (published accuracy). "lazy": only rows that were '
        "active in the window, with a step count per row and exact catch-up of weight decay.",
    )
    compress: CompressConfig | None = Field(
        None,
        description="Row gradients cross the bus, and meet AdamW, as products with a sparse random projector: fewer "
        "bytes down, smaller moments. null = off.",
    )
    cache_rows: _IntOrAuto = Field(
        "auto",
        description="Most rows per layer held on the device at once (rows of 2 d values). auto = min(r, 4096). A "
        "micro-batch that needs more is computed in several passes; nothing is dropped.",
    )
    balance_loss: Annotated[float, BeforeValidator(not_negative)] = Field(
        0.0,
        description="Weight of a Switch-style load-balance loss on the router (arXiv 2101.03961, eq. 4), added to the "
        "gradient only. Default 0 as in the MEFT paper.",
    )
    router_scale: Annotated[float | Literal["unit", "paper"], BeforeValidator(positive("unit", "paper"))] = Field(
        "unit",
        description='Factor on the router\'s first value (mean key of the expert). "unit": selected gates start at '
        'order 1 (see router.unit_router_scale). "paper": 50, gates near 31 at d = 4,096, overflows fp16 easily.',
    )
    init_std: Annotated[float | _Auto, BeforeValidator(positive("auto"))] = Field(
        "auto",
        description="Standard deviation of new keys (values start at 0). auto = the model's initializer_range or 0.02.",
    )
    target_modules: Annotated[tuple[str, ...] | None, BeforeValidator(patterns)] = Field(
        None,
        description="Regular expression(s) for whole module names that get an adapter. null = find the FFNs.",
    )
    seed: Annotated[int, BeforeValidator(whole)] = Field(
        0, description="Seed of keys and router; independent of the global random state."
    )

    @model_validator(mode="after")
    def _cross_checks(self) -> SparseAdapterConfig:
        faults = []
        if not self.gate and self.balance_loss > 0:
            faults.append("balance_loss: must be 0 with gate: false, because the router then gets no gradient")
        if isinstance(self.rows, int):
            faults += _size_faults(self.rows, self.experts, self.experts_per_token, self.keys_per_token)
        elif isinstance(self.experts, int) and self.experts_per_token > self.experts:
            faults.append(_too_many_per_token(self.experts_per_token, self.experts))
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def resolve(self, d: int, initializer_range: float | None = None) -> ResolvedSparseAdapter:
        """Return the numbers for a model of hidden size ``d``. Raises ValueError when that ``d`` cannot work."""
        from meft_ds.sparse_adapter.forward.router import unit_router_scale

        r = 2 * d if self.rows == "auto" else int(self.rows)
        experts_per_token = self.experts_per_token
        if self.experts == "auto":
            experts = min(r, max(experts_per_token, round(4 * math.sqrt(r))))
        else:
            experts = int(self.experts)
        init_std = (initializer_range or 0.02) if self.init_std == "auto" else float(self.init_std)
        if self.router_scale == "unit":
            router_scale = unit_router_scale(d=d, r=r, n_experts=experts, per_token=experts_per_token, std=init_std)
        else:
            router_scale = PAPER_ROUTER_SCALE if self.router_scale == "paper" else float(self.router_scale)
        unchanged = self.model_dump(exclude={"rows", "experts", "cache_rows", "router_scale", "init_std", "compress"})
        return ResolvedSparseAdapter(
            d=d,
            rows=r,
            experts=experts,
            cache_rows=min(r, 4096 if self.cache_rows == "auto" else int(self.cache_rows)),
            router_scale=router_scale,
            init_std=init_std,
            **unchanged,
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedCompress:
    """``CompressConfig`` in numbers: d', k, and the factor on updates."""

    dim: int
    nonzeros: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class ResolvedSparseAdapter:
    """``SparseAdapterConfig`` with every "auto" replaced by a number, for one hidden size ``d``."""

    d: int
    rows: int
    experts: int
    experts_per_token: int
    keys_per_token: int
    gate: bool = True
    scope: Literal["token", "batch"] = "token"
    selection: Literal["host", "device"] = "host"
    optimizer: Literal["dense", "lazy"] = "dense"
    cache_rows: int
    balance_loss: float = 0.0
    router_scale: float
    init_std: float
    target_modules: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        faults = _size_faults(self.rows, self.experts, self.experts_per_token, self.keys_per_token)
        if faults:
            raise ValueError(f"sparse_adapter at hidden size {self.d}: " + "; ".join(faults))

    @property
    def slice_size(self) -> int:
        """m, rows of the largest expert."""
        return -(-self.rows // self.experts)


def _size_faults(r: int, experts: int | str, per_token: int, keys: int) -> list[str]:
    faults = []
    if keys > r:
        faults.append(f"keys_per_token: {keys} is more than rows = {r}; lower keys_per_token or raise rows")
    if isinstance(experts, int):
        if experts > r:
            faults.append(
                f"experts: {experts} is more than rows = {r}, an expert needs at least one row; lower experts"
            )
        if per_token > experts:
            faults.append(_too_many_per_token(per_token, experts))
    elif per_token > r:
        faults.append(f"experts_per_token: {per_token} is more than rows = {r}; lower experts_per_token or raise rows")
    return faults


def _too_many_per_token(per_token: int, experts: int) -> str:
    return f"experts_per_token: {per_token} is more than experts = {experts}; lower experts_per_token or raise experts"
