# SPDX-License-Identifier: Apache-2.0
"""The command as a whole: every part has an example, wrong input is one line and exit code 2, torch never pays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import typer.main

from meft_ds.cli.main import app

RunPython = Callable[..., subprocess.CompletedProcess[str]]


def commands() -> list[str]:
    return sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", commands())
def test_a_command_has_an_example_and_json(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    for leaf in getattr(command, "commands", {name: command}).values():
        assert f"Example: meft-ds {name}" in (leaf.help or ""), leaf.name
        assert any("--json" in option.opts for option in leaf.params), leaf.name


def test_the_package_and_the_hook_do_not_import_it(run_python: RunPython) -> None:
    run_python("import meft_ds, sys; assert not {'typer', 'rich', 'meft_ds.cli'} & {*sys.modules}")


def test_python_m_runs_it(run_python: RunPython) -> None:
    code = "import runpy, sys; sys.argv = ['meft-ds', '--version']; runpy.run_module('meft_ds', run_name='__main__')"
    import meft_ds

    assert run_python(code).stdout == f"{meft_ds.__version__}\n"


def test_the_script_is_an_entry_point() -> None:
    tomllib = pytest.importorskip("tomllib")
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"meft-ds": "meft_ds.cli.main:main"}


def test_wrong_input_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from meft_ds.cli.main import main

    monkeypatch.setattr(sys, "argv", ["meft-ds", "schema", "--out", "/no/such/folder/file.json"])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    assert end.value.code == 2
    assert told.out == ""
    assert told.err.startswith("meft-ds: ") and told.err.count("\n") == 1 and "/no/such/folder" in told.err
