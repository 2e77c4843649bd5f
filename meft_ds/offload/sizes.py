# SPDX-License-Identifier: Apache-2.0
"""Bytes as people read them."""

from __future__ import annotations


def in_units(nbytes: float) -> str:
    """ "1.50 GiB", "3.2 MiB", "12.0 KiB" or "7 bytes", the largest unit of which there is at least one."""
    for unit, size, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if nbytes >= size:
            return f"{nbytes / size:.{digits}f} {unit}"
    return f"{nbytes:.0f} bytes"
