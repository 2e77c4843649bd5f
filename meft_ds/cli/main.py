# SPDX-License-Identifier: Apache-2.0
"""The commands of `meft-ds`, and what they exit with: 0 fine, 1 a finding or a failure, 2 wrong input."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

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


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of save_checkpoint, of a tag, or Trainer's checkpoint-N.")],
    out: Annotated[Path, typer.Argument(help="What to write; it must not exist.")],
    base: Annotated[Path | None, typer.Option(help="Folder with config.json and tokenizer, if not beside it.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: as in the checkpoint.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Most bytes of one file of weights, as 5GB or 500MB.")] = "5GB",
    method_files: Annotated[bool, typer.Option("--method-files", help="Only the adapter, or only the tiles.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Generate from both and compare; takes the memory.")] = False,
    as_json: Json = False,
) -> None:
    """Write plain transformers weights from a checkpoint, without ranks or a GPU, in little memory.

    Example: meft-ds export out/checkpoint-500 trained --dtype bfloat16 --verify
    """
    from meft_ds.cli import export as made

    if dtype is not None and dtype not in made.DTYPES:
        raise ValueError(f"--dtype: expected {', '.join(made.DTYPES)}, got {dtype!r}")
    if verify and method_files:
        raise ValueError("--verify compares models, and --method-files writes none; leave one out")
    about = made.export(
        checkpoint,
        out,
        base=base,
        dtype=None if dtype is None else made.DTYPES[dtype],
        shard_bytes=_bytes(shard_size),
        method_files_only=method_files,
    )
    fine = True
    if verify:
        from meft_ds.cli.verify import compare

        about |= (found := compare(checkpoint, out))
        fine = found["logits_equal"] if dtype is None else found["logits_relative_difference"] < 0.05
    _tell(about, as_json)
    if not fine:
        raise RuntimeError(f"{out} is written, but it does not compute what the checkpoint does; do not use it")


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Option(help="A ds_config to judge and to start a toy engine with.")] = None,
    start: Annotated[bool, typer.Option(help="Start an engine on a toy model in a child process.")] = True,
    as_json: Json = False,
) -> None:
    """Look at this machine, this interpreter and a ds_config, and say what to change.

    Exits with 1 if there is a finding. Each finding has a fix. It measures for a few seconds.

    Example: meft-ds doctor --config ds_configs/lsp.json
    """
    from meft_ds.cli import config_checks

    ds_config = None if config is None else config_checks.read(config)
    from meft_ds.cli.doctor import examine

    lines, measured = examine(ds_config, start=start)
    findings = sum(line.level == "finding" for line in lines)
    if as_json:
        found = [{k: v for k, v in vars(line).items() if v} for line in lines]
        typer.echo(json.dumps({"findings": findings, "checks": found, "measured": measured}))
    else:
        for line in lines:
            mark = {"fine": "ok  ", "note": "    ", "finding": "FIX "}[line.level]
            typer.echo(f"{mark} {line.subject}: {line.text}" + (f"\n       -> {line.fix}" if line.fix else ""))
        typer.echo(f"{findings} finding{'' if findings == 1 else 's'}")
    raise typer.Exit(1 if findings else 0)


tiles = typer.Typer(help="Look into files of tiles, and put tiles into model folders.", no_args_is_help=True)
app.add_typer(tiles, name="tiles")
_File = Annotated[Path, typer.Argument(help="What meft_ds.save_tiles or meft-ds export --method-files wrote.")]
_Model = Annotated[Path, typer.Argument(help="Folder of a model in safetensors, in the dtype of its training.")]
_Out = Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")]


@tiles.command()
def show(file: _File, as_json: Json = False) -> None:
    """Say which weights the tiles of a file belong to, and how much they changed.

    Example: meft-ds tiles show tiles.safetensors
    """
    from meft_ds.cli.tiles import show as shown

    about = shown(file)
    if as_json:
        _tell(about, as_json)
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("weight", overflow="fold"), "shape", "dtype", "tiles", "share", "largest change")
    for name, found in about["weights"].items():
        numbers = f"{found['tiles']:,}", f"{found['share']:.2%}", f"{found['largest_change']:.3g}"
        table.add_row(name, " x ".join(map(str, found["shape"])), found["dtype"], *numbers)
    Console().print(table)


@tiles.command()
def apply(file: _File, model: _Model, out: _Out, as_json: Json = False) -> None:
    """Write a copy of a model folder with the tiles in it.

    Example: meft-ds tiles apply tiles.safetensors base trained
    """
    from meft_ds.cli.tiles import swap

    _tell(swap(file, model, out, back=False), as_json)


@tiles.command()
def revert(file: _File, model: _Model, out: _Out, as_json: Json = False) -> None:
    """Write a copy of a model folder with the tiles taken out: bit for bit what they were before training.

    Example: meft-ds tiles revert tiles.safetensors trained base
    """
    from meft_ds.cli.tiles import swap

    _tell(swap(file, model, out, back=True), as_json)


def _bytes(size: str) -> int:
    found = re.fullmatch(r"([1-9][0-9]{0,8}) ?(KB|MB|GB)", size)
    if found is None:
        raise ValueError(f"--shard-size: expected a size such as 5GB or 500MB, got {size!r}")
    return int(found[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]]


def _tell(about: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(about))
        return
    for key, value in about.items():
        typer.echo(f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
