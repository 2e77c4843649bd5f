# SPDX-License-Identifier: Apache-2.0
"""Doctor finds what is planted, judges a ds_config as the engine does, and every finding has a fix."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.utils.file_baton import FileBaton
from typer.testing import CliRunner

from meft_ds.cli import config_checks, doctor
from meft_ds.cli.main import app, main
from meft_ds.plugin import build_locks
from tests.toy import ds_config, make_engine

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An extension folder of this test's own."""
    folder = tmp_path / "extensions"
    folder.mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    return folder


def planted(cache: Path) -> Path:
    (cache / "some op").mkdir()
    (cache / "some op" / "lock").touch()
    return cache / "some op" / "lock"


# -- the config --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_right(path: Path) -> None:
    config = config_checks.read(path)
    levels = [line.level for line in config_checks.judged(config)]
    assert levels[0] == ("fine" if "meft_offload" in config else "note")
    assert "finding" not in levels


def test_all_faults_are_told_at_once_as_the_engine_tells_them() -> None:
    config = ds_config(block={"subspace": {"dims": 3}, "train": 7})
    config |= {"gradient_clipping": -1, "prescale_gradients": True}
    config["optimizer"]["params"]["weight_decay"] = -1
    with pytest.raises(ValueError) as told:
        make_engine(config)
    fault, passed = config_checks.judged(config)
    assert fault.level == "finding" and fault.text == str(told.value)
    assert "4 faults" in fault.text
    assert passed.level == "note" and "prescale_gradients is skipped" in passed.text


def test_a_misspelt_block_is_found() -> None:
    (line,) = config_checks.judged({"meft_ofload": {}})
    assert line.level == "finding" and "meft_ofload" in line.text and "rename" in line.fix


def test_a_config_with_faults_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_host_speed", lambda measured: [])
    monkeypatch.setattr(config_checks, "started", lambda *_: pytest.fail("started"))
    lines, _ = doctor.examine({"meft_offload": {"subspaces": {}}})
    assert [line.text for line in lines if line.subject == "engine"] == [
        "no toy engine was started, because the config has faults"
    ]


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_what_is_no_config_is_one_line(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["meft-ds", "doctor", "--config", str(path)])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    assert end.value.code == 2 and told.out == ""
    assert str(path) in told.err and told.err.count("\n") == 1


# -- the machine -------------------------------------------------------------------------------------------------------


def test_findings_have_fixes_and_make_the_exit_code(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = planted(cache)
    monkeypatch.setattr(doctor, "_host_speed", lambda measured: [])  # would build the kernels anew
    result = CliRunner().invoke(app, ["doctor", "--no-start", "--json"])
    assert result.exit_code == 1
    about = json.loads(result.stdout)
    found = [line for line in about["checks"] if line["level"] == "finding"]
    assert about["findings"] == len(found) and all(line["fix"] for line in found)
    (ours,) = [line for line in found if line["subject"] == "build locks"]
    assert ours["fix"] == f"run: rm '{lock}'" and str(lock) in ours["text"]
    assert f"-> run: rm '{lock}'" in CliRunner().invoke(app, ["doctor", "--no-start"]).stdout


def test_the_hosts_speed_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SECONDS", 0.01)
    measured: dict[str, Any] = {}
    (line,) = doctor._host_speed(measured)
    assert line.level == "note"
    assert 1e6 < measured["host_adamw_params_per_s"] < 1e11 and 1e8 < measured["host_copy_bytes_per_s"] < 1e13


def test_nothing_to_find_is_exit_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda config, start: ([doctor.fine("all", "fine")], {}))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0


def test_what_the_environment_switches_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    monkeypatch.setenv("MEFT_DS_OPS", "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(doctor, "allowed_cpus", lambda: (0, 1, 2))
    monkeypatch.setattr(doctor, "cpu_quota", lambda: None)
    monkeypatch.setattr(doctor, "free_shared_bytes", lambda: 2**26)
    monkeypatch.setattr(doctor.checks, "version_warnings", lambda: ["deepspeed 9 is outside"])
    checks = [doctor._autoload, doctor._compiler, doctor._cpus, doctor._memory, doctor._versions]
    assert [sum(line.level == "finding" for line in check()) for check in checks] == [1] * 5


# -- locks -------------------------------------------------------------------------------------------------------------


def test_a_lock_that_a_process_holds_is_no_finding(cache: Path) -> None:
    lock = planted(cache)
    (cache / "meft_ds_ops_0").mkdir()
    (cache / "meft_ds_ops_0" / "lock").touch()  # our own build removes it
    assert [found.held for found in build_locks.find()] == [False]
    with open(lock):
        assert [found.held for found in build_locks.find()] == [True]
        assert [line.level for line in doctor._locks()] == ["note"]
    lock.unlink()
    assert [line.level for line in doctor._locks()] == ["fine"]


def test_a_start_that_waits_for_a_lock_says_so(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert build_locks.watch(0.1) is None, "no thread where there is no lock"
    lock = planted(cache)
    waiting = threading.Thread(target=FileBaton(str(lock), wait_seconds=0.01).wait)
    with caplog.at_level(logging.WARNING, logger="meft_ds"):
        watching = build_locks.watch(0.2)
        assert watching is not None and watching.daemon
        watching.join(0.5)
        assert watching.is_alive() and not caplog.messages, "nobody waits yet"
        waiting.start()
        watching.join(20)
    lock.unlink()
    waiting.join(20)
    assert len(caplog.messages) == 1
    assert str(lock) in caplog.messages[0] and f"rm '{lock}'" in caplog.messages[0]


# -- the engine --------------------------------------------------------------------------------------------------------


def test_the_toys_config_leaves_nothing_open() -> None:
    for path in CONFIGS:
        config: dict[str, Any] = config_checks.read(path)
        if "meft_offload" in config:
            made = config_checks.for_toy(config)
            assert '"auto"' not in json.dumps({k: v for k, v in made.items() if k != "meft_offload"})
            assert config == config_checks.read(path), "the given one stays"
            assert config_checks.judged(made)[0].level == "fine"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["meft_lsp", "lsp", "smt"])
def test_a_toy_engine_really_starts(name: str) -> None:
    line = config_checks.started(config_checks.read(ROOT / "ds_configs" / f"{name}.json"), 200)
    assert line.level == "fine" and "MeftEngine" in line.text, line


@pytest.mark.slow
def test_an_engine_that_the_hook_did_not_take_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    line = config_checks.started({"meft_offload": {}}, 200)
    assert line.level == "finding" and "DeepSpeedEngine" in line.text and "BACKEND_AUTOLOAD" in line.text


@pytest.mark.slow
def test_an_engine_that_does_not_start_is_a_finding() -> None:
    os.environ.pop("MASTER_ADDR", None)
    assert config_checks.started({"meft_offload": {}}, 0.1).level == "finding"
    line = config_checks.started({"meft_offload": {"schedule": {"mode": "exakt"}}}, 200)
    assert line.level == "finding" and "exakt" in line.text
