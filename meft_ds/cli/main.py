# SPDX-License-Identifier: Apache-2.0
"""The commands of `meft-ds`, and what they exit with: 0 fine, 1 a finding or a failure, 2 wrong input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from meft_ds import __version__, files

_WRONG_INPUT = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)

app = typer.Typer(
    name="meft-ds",
    help="Tools for fine-tuning with meft-ds. Exit codes: 0 fine, 1 a finding or a failure, 2 wrong input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")]


def main() -> None:
    """Run a command. A fault of the input is one line on stderr."""
    try:
        app()
    except _WRONG_INPUT as fault:
        _end(fault, 2)
    except (OSError, RuntimeError) as fault:
        _end(fault, 1)


def _end(fault: Exception, code: int) -> None:
    print(f"meft-ds: {fault}", file=sys.stderr)
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = (
        False
    ),
) -> None:
    pass


@app.command()
def schema(
    ds_config: Annotated[bool, typer.Option("--ds-config", help="The schema of a whole ds_config.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write it to this file instead of stdout.")] = None,
    as_json: Json = False,
) -> None:
    """Print the JSON schema of the "meft_offload" block, for editors.

    It is JSON with and without --json.

    Example: meft-ds schema --ds-config --out ds_config.schema.json
    """
    from meft_ds.cli import schema as made

    text = made.text(made.ds_config_schema() if ds_config else made.block_schema())
    if out is None:
        typer.echo(text, nl=False)
    else:
        files.check_writable(out)
        files.write_text(out, text)
