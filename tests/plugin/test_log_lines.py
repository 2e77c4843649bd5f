# SPDX-License-Identifier: Apache-2.0
"""What users see of our log: each line once, on one rank, by one name, past progress bars."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

import meft_ds
from meft_ds.offload.host.memory import in_units
from meft_ds.plugin import ds_config
from meft_ds.plugin.console import show_log

LINE = "version 0.0: rows train"
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@contextlib.contextmanager
def unconfigured() -> Iterator[io.StringIO]:
    """As in a process where nobody has configured logging, pytest neither; gives what goes to stderr."""
    ours, stream = logging.getLogger("meft_ds"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.root, "handlers", [])
        patch.setattr(ours, "handlers", [])
        patch.setattr(sys, "stderr", stream)
        level = ours.level
        ours.setLevel(logging.NOTSET)
        yield stream
        ours.setLevel(level)


@pytest.mark.parametrize("configured", ["never", "before", "after"])
def test_a_line_shows_once_whenever_the_program_configures_logging(configured: str) -> None:
    with unconfigured() as stderr:
        if configured == "before":
            logging.basicConfig(stream=stderr)
        for _ in range(2):  # one per engine
            show_log()
        if configured == "after":
            logging.basicConfig(stream=stderr)
        logging.getLogger("meft_ds").info(LINE)
        assert stderr.getvalue() == (f"meft-ds: {LINE}\n" if configured == "never" else f"INFO:meft_ds:{LINE}\n")


def test_a_program_that_has_set_up_our_logger_keeps_its_settings() -> None:
    with unconfigured() as stderr:
        logger, seen = logging.getLogger("meft_ds"), io.StringIO()
        logger.addHandler(logging.StreamHandler(seen))
        logger.setLevel(logging.WARNING)
        show_log()
        logger.info("quiet")
        logger.warning(LINE)
        assert seen.getvalue() == f"{LINE}\n" and stderr.getvalue() == ""


def test_a_line_goes_between_progress_bars() -> None:
    with unconfigured() as stderr:
        show_log()
        with tqdm(total=4, file=sys.stderr, mininterval=0.0) as bar:
            bar.update(1)
            logging.getLogger("meft_ds.offload").warning(LINE)
            bar.update(1)
        # after the last return of the carriage: nothing of the bar
        (line,) = [line for line in stderr.getvalue().split("\n") if LINE in line]
        assert line.rpartition("\r")[2] == f"meft-ds: {LINE}"
        assert "2/4" in stderr.getvalue().rpartition("\n")[0].rpartition("\r")[2]


def test_no_message_names_the_package_which_the_loggers_name_does() -> None:
    call = re.compile(r"log(?:ger)?\.(?:debug|info|warning|error)\(\s*f?[\"']meft[-_ ]ds[: ]")
    sources = Path(meft_ds.__file__).parent.rglob("*.py")
    assert [str(path) for path in sources if path.name != "autoload.py" and call.search(path.read_text())] == []


def test_an_optimizer_offload_is_no_warning_and_other_skips_are(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="meft_ds"):
        ds_config.tell({**OFFLOAD, "prescale_gradients": True})
    found = [(record.levelname, record.getMessage().partition(" is skipped")[0]) for record in caplog.records]
    assert found == [("INFO", "zero_optimization.offload_optimizer"), ("WARNING", "prescale_gradients")]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (7, "7 bytes"),
        (1536, "1.5 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (2**30 - 1, "1024.0 MiB"),
        (3 * 2**29, "1.50 GiB"),
    ],
)
def test_small_sizes_are_not_given_as_zero_gib(nbytes: int, text: str) -> None:
    assert in_units(nbytes) == text
