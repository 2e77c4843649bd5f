# SPDX-License-Identifier: Apache-2.0
"""What the installed distribution promises: entry point, version, licence, data files, configs, README commands."""

import json
import re
import sys
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest

import meft_ds

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def test_entry_point_is_in_torchs_autoload_group() -> None:
    ours = {e.value for e in entry_points(group="torch.backends") if e.name == "meft_ds"}
    assert ours == {"meft_ds.autoload:arm"}, 'install the package first: pip install -e ".[test]"'


def test_metadata_agrees_with_the_package() -> None:
    metadata = distribution("meft-ds").metadata
    assert metadata["Version"] == meft_ds.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"


def test_package_is_marked_as_typed() -> None:
    assert (Path(meft_ds.__file__).parent / "py.typed").is_file()


def test_every_source_file_names_its_licence() -> None:
    sources = [p for folder in ("meft_ds", "benchmarks", "examples", "tests") for p in (ROOT / folder).rglob("*")]
    for path in sources:
        if path.suffix in (".py", ".cpp", ".h"):
            head = path.read_text(encoding="utf-8").splitlines()[:2]
            assert any("SPDX-License-Identifier: Apache-2.0" in line for line in head), path


def test_all_promised_configs_are_there() -> None:
    names = {path.stem for path in CONFIGS}
    assert names >= {"meft", "lsp", "smt", "meft_lsp", "zero2_offload", "zero3", "zero3_offload", "zenflow"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_let_the_program_decide_sizes_and_learning_rate(path: Path) -> None:
    config = json.loads(path.read_text())
    sizes = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"]
    assert [config[key] for key in sizes] == ["auto"] * 4
    assert set(config["optimizer"]["params"].values()) == {"auto"}
    assert ("meft_offload" in config) == path.stem.startswith(("meft", "lsp", "smt"))


def test_readme_holds_the_test_command_that_ci_runs() -> None:
    commands = re.findall(r"<!-- test command.*-->\n```bash\n(.*)\n```", (ROOT / "README.md").read_text())
    assert len(commands) == 1
    assert re.search(r"pip install .*constraints\.txt.*\[test\].*&& .*pytest", commands[0])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_constraints_satisfy_the_declared_ranges() -> None:
    import tomllib
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {r.name: r for r in map(Requirement, project["dependencies"] + project["optional-dependencies"]["test"])}
    for name in ("constraints.txt", "constraints-2025.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        pinned = {r.name: str(r.specifier).removeprefix("==") for r in map(Requirement, lines)}
        for package, version in pinned.items():
            if package in declared:
                assert declared[package].specifier.contains(version), (name, package, version)
        assert set(pinned) >= {"torch", "deepspeed", "transformers", "accelerate"}
