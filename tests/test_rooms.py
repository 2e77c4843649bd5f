# SPDX-License-Identifier: Apache-2.0
"""The rules of the house (docs/explanation/architecture.md), read from the import statements of `meft_ds`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "meft_ds"
METHODS = ("sparse_adapter", "subspace", "sparse_matrix")
LONGEST = 400

# From top to bottom; a file may import files of its own level and of those below. The longest prefix that fits counts.
LEVELS = [
    ["__init__", "__main__", "autoload"],
    ["cli"],
    ["plugin"],
    ["config"],
    [*METHODS],
    ["offload", "offload.update_gates", "offload.pipeline", "offload.method"],
    ["offload.schedule"],
    ["offload.unit", "offload.flat_unit", "offload.master_unit", "offload.dense_unit", "offload.waiting"],
    ["offload.host", "offload.model", "offload.ranks"],
    ["ops", "options", "files"],
]
LEVEL = {room: depth for depth, rooms in enumerate(LEVELS) for room in rooms}


def modules() -> dict[str, Path]:
    """Name within the package -> file; a package's `__init__` goes by the package's name."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports anywhere, in functions too, with their lines; modules where they are modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                inside = whole.removeprefix("meft_ds.") in MODULES
                yield (whole if inside else str(node.module), node.lineno)


MODULES = modules()
OURS = {
    name: [(of.removeprefix("meft_ds").lstrip("."), line) for of, line in imports(path) if of.startswith("meft_ds")]
    for name, path in MODULES.items()
}


def room(name: str) -> str:
    return max((r for r in LEVEL if name == r or name.startswith(r + ".")), key=len)


def in_plugin() -> Iterator[tuple[str, Path]]:
    """The plugin's files that must not know a method: all but the registry."""
    return ((name, path) for name, path in MODULES.items() if room(name) == "plugin" and name != "plugin.registry")


@pytest.mark.parametrize("name", MODULES)
def test_a_room_imports_only_rooms_that_lie_below_it(name: str) -> None:
    upward = [
        f"line {line}: {of}"
        for of, line in OURS[name]
        if of and LEVEL[room(of)] < LEVEL[room(name)] and name != "autoload"
    ]
    assert not upward, f"meft_ds.{name} imports upward: {', '.join(upward)}"


def test_no_file_imports_itself_by_a_detour() -> None:
    TopologicalSorter({name: {of for of, _ in found if of} for name, found in OURS.items()}).prepare()  # CycleError


def test_a_method_imports_no_other_method() -> None:
    met = [(name, of) for name in MODULES for of, _ in OURS[name] if {room(name), room(of or "plugin")} <= {*METHODS}]
    assert [(name, of) for name, of in met if room(name) != room(of)] == []


def test_only_the_plugin_imports_deepspeed() -> None:
    outside = {name: path for name, path in MODULES.items() if room(name) != "plugin"}
    assert [name for name, path in outside.items() if any(of.startswith("deepspeed") for of, _ in imports(path))] == []


def test_the_plugin_names_no_method_outside_the_registry() -> None:
    named = [
        f"{name}:{line} imports {of}" for name, _ in in_plugin() for of, line in OURS[name] if of.startswith(METHODS)
    ]
    for name, path in in_plugin():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_name = isinstance(node, ast.Constant) and node.value in METHODS
            if is_name or (isinstance(node, ast.Attribute) and node.attr in METHODS):
                named.append(f"{name}:{node.lineno} names a method")
    assert named == []


def test_the_plugin_asks_no_unit_for_its_class() -> None:
    asked = [
        f"{name}:{node.lineno}"
        for name, path in in_plugin()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        if any(isinstance(part, ast.Name) and part.id.endswith("Unit") for part in ast.walk(node.args[1]))
    ]
    assert asked == []


@pytest.mark.parametrize("name", MODULES)
def test_a_file_is_short(name: str) -> None:
    lines = MODULES[name].read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST, f"meft_ds.{name} has {lines} lines: give it one reason to change"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/**/__init__.py")), ids=lambda p: p.parent.name)
def test_a_rooms_tour_names_its_files(path: Path) -> None:
    words = set(re.findall(r"\w+", ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""))
    here = {p.stem for p in path.parent.glob("*.py")} | {p.parent.name for p in path.parent.glob("*/__init__.py")}
    assert here - {"__init__"} <= words, f"name them in the docstring of {path.relative_to(PACKAGE)}"
