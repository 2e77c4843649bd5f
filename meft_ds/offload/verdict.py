# SPDX-License-Identifier: Apache-2.0
"""What ranks agree on before a step: the gradient's norm, whether anything came late, and how long the window took."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from meft_ds.offload.partition import Ranks, all_reduce_sum
from meft_ds.offload.tuner import Tuner
from meft_ds.offload.window import Entry


def agree(entries: Sequence[Entry], tuner: Tuner, device: torch.device, ranks: Ranks) -> tuple[float, list[Entry]]:
    """The sum of squares over units and ranks, and the units that must be sent again, because on some rank a gradient
    came after they had been sent, or because what was sent has been forgotten. Collective.

    Units with late gradients, or that a backward left unfinished on some rank, are `reliable` no longer; the tuner
    learns the ranks' mean times.
    """
    n = len(entries)
    learning = any(entry.ready for entry in entries)
    values = [entry.sq_norm for entry in entries]
    values += [float(entry.late) for entry in entries]
    values += [float(learning and not entry.ready) for entry in entries]
    values += [float(entry.again) for entry in entries]
    values += tuner.report()
    values = all_reduce_sum(values, device, ranks)
    late = [entry for entry, flag in zip(entries, values[n : 2 * n], strict=True) if flag]
    unfinished = [entry for entry, flag in zip(entries, values[2 * n : 3 * n], strict=True) if flag]
    again = [entry for entry, flag in zip(entries, values[3 * n : 4 * n], strict=True) if flag and entry not in late]
    for entry in [*late, *unfinished]:
        entry.reliable = False
    if not (late or again):
        tuner.agreed([value / ranks.world for value in values[4 * n :]])
    return sum(values[:n]), late + again
