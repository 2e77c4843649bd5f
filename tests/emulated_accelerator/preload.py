# SPDX-License-Identifier: Apache-2.0
"""What a process does before it forks ranks that train on the emulated accelerator; a forge calls it."""

from __future__ import annotations


def preload() -> None:
    """Build the backend, make the emulated device DeepSpeed's accelerator, and import what ranks need.

    Nothing here may touch the device: the threads of its streams would not survive a fork.
    """
    from tests.emulated_accelerator import accelerator

    accelerator.install()

    from tests import forked

    forked.preload()
