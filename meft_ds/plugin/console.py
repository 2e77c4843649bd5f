# SPDX-License-Identifier: Apache-2.0
"""Shows our log lines to users whose program does not configure logging."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

_logger = logging.getLogger("meft_ds")


def show_log() -> None:
    """Show lines of level INFO once: by the program's own handlers if it has any, otherwise on stderr."""
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
    if not _logger.handlers:
        _logger.addHandler(_Console())


class _Console(logging.Handler):
    """Writes to stderr, between progress bars, unless the root logger has handlers, which then show the same line."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("meft-ds: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:  # asked here, as programs configure logging before us or after us
            return
        try:
            tqdm.write(self.format(record) + "\n", file=sys.stderr, end="")
        except Exception:
            self.handleError(record)
