# SPDX-License-Identifier: Apache-2.0
"""The `random_mask` settings of the block."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from meft_ds.options import positive, whole


class RandomMaskConfig(BaseModel):
    """Settings of the random mask."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    fraction: Annotated[float, BeforeValidator(positive())] = Field(
        0.1, le=1.0, description="Of each matrix's elements, how many train."
    )
    seed: Annotated[int, BeforeValidator(whole)] = Field(0, description="Of the mask.")
