# SPDX-License-Identifier: Apache-2.0
"""README and docs are true where a machine can tell: links lead somewhere, code runs, commands name what is there."""

from __future__ import annotations

import ast
import inspect
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import meft_ds
from meft_ds.config import MeftConfig, parse_config
from meft_ds.plugin.engine import MeftEngine

ROOT = Path(__file__).resolve().parent.parent
API = ROOT / "docs" / "reference" / "python-api.md"
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*.md"),
        *(ROOT / folder / "README.md" for folder in ("benchmarks", "examples", "tests")),
    ]
)
PAGES = [page for page in PAGES if page.exists()]
FENCE = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n *)?```(?P<kind>\w*)\n(?P<text>.*?)\n *```", re.DOTALL)
BLOCKS = {
    "adapter": {
        "sparse_adapter": {"rows": 40, "experts": 7, "experts_per_token": 3, "keys_per_token": 9},
    },
    "tiles": {"sparse_matrix": {"density": 0.2, "block_size": 8, "score": "magnitude"}},
    "": {"subspace": {"nonzeros": 2}},
}
"""What engine an example marked `run: NAME` works on; `run` alone takes the last."""
PROGRAMS = (
    "python",
    "deepspeed",
    "pytest",
    "meft-ds",
    "pip",
    "git",
    "make",
    "mkdocs",
    "pre-commit",
    "ruff",
    "mypy",
    ".ci/run",
    "benchmarks/gpu_check.sh",
)


def fences(page: Path, *kinds: str) -> list[tuple[str, str]]:
    """(mark, text) of a page's code blocks of these kinds; the mark is the comment on the line before."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [(m["mark"] or "", inspect.cleandoc("\n" + m["text"])) for m in found if m["kind"] in kinds]


def test_the_page_of_keys_says_what_the_models_say() -> None:
    run = runpy.run_path(str(ROOT / "docs" / "write_configuration.py"))
    assert run["PAGE"].read_text(encoding="utf-8") == run["page"](), "run: python docs/write_configuration.py"


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """As GitHub and MkDocs make them of headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
        elif ROOT / "docs" in page.parents and ROOT / "docs" not in target.parents:
            broken.append(f"{link} (outside docs/, which the site does not have: name the file in backticks)")
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_blocks_of_json_pass_the_config_model(page: Path) -> None:
    for _, text in fences(page, "json"):
        config = json.loads(text if text.startswith("{") else f"{{{text}}}")
        if "meft_offload" in config:
            parse_config(config["meft_offload"])
    for block in re.findall(r"\| `(\{\"(?:subspace|sparse_adapter|sparse_matrix)\".*?\})`", page.read_text("utf-8")):
        parse_config(json.loads(block))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_name_programs_and_files_that_are_there(page: Path) -> None:
    for mark, text in fences(page, "bash"):
        for command in re.split(r"&&|\n", text.replace("\\\n", " ")):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if not words:
                continue
            assert words[0] in PROGRAMS, command
            files = [w for w in words if re.search(r"\.(py|json|txt|toml)$", w.partition("::")[0])]
            for file in files:
                made_by_a_run = mark or file.startswith(("out/", "gpu_step"))
                assert made_by_a_run or (ROOT / file).exists(), command
            if "-m" in words[:2]:
                module = ROOT / Path(*words[2].split("."))
                assert module.with_suffix(".py").exists() or words[2] == "pytest", command
            if words[0] in ("python", "deepspeed") and files and files[0].endswith(".py"):
                known = (ROOT / files[0]).read_text(
                    encoding="utf-8"
                ) + "--deepspeed --num_gpus --max_steps --output_dir"
                for option in (w for w in words if w.startswith("--")):
                    name = option.removeprefix("--")
                    assert option in known or re.search(rf"\b{name}:", known), (option, command)


def test_pages_that_code_names_are_there() -> None:
    folders = ("meft_ds", "tests", "benchmarks", "examples")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    missing = {
        f"{path.relative_to(ROOT)}: {page}"
        for path in sources
        for page in re.findall(r"\b(?:docs|benchmarks|examples)/[\w/.-]*\.md", path.read_text(encoding="utf-8"))
        if not (ROOT / page).exists()
    }
    assert missing == set()


def test_every_public_name_stands_in_the_page_with_an_example() -> None:
    page = API.read_text(encoding="utf-8")
    names = [name for name in meft_ds.__all__ if name != "__version__"]
    for heading in [*names, "engine.meft_stats", "engine.meft_flush"]:
        section = re.search(rf"^## `{re.escape(heading)}`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        assert section, f"{heading} has no section"
        last = heading.rpartition(".")[2]
        assert last in "".join(m["text"] for m in FENCE.finditer(section[1]) if m["kind"] == "python"), heading
    assert "`meft_ds.__version__`" in page


DOCUMENTED: dict[str, Any] = {name: getattr(meft_ds, name) for name in meft_ds.__all__ if name != "__version__"}
DOCUMENTED |= {name: getattr(MeftEngine, name) for name in ("meft_stats", "meft_flush")}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_public_name_has_a_docstring_with_an_example(name: str) -> None:
    text = inspect.getdoc(DOCUMENTED[name]) or ""
    found = re.search(r"^Example:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    assert found, text
    example = inspect.cleandoc("\n" + found[1])
    ast.parse(example)
    assert name in example


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {meft_ds.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


# -- examples ----------------------------------------------------------------------------------------------------------

EXAMPLES = [(page, n, mark, text) for page in PAGES for n, (mark, text) in enumerate(fences(page, "python"))]


def test_every_example_is_marked_to_run_or_says_why_not() -> None:
    marks = {(named(page), n): mark for page, n, mark, _ in EXAMPLES}
    wrong = {at: mark for at, mark in marks.items() if not re.match(r"run(: (adapter|tiles))?$|not run: \S", mark)}
    assert wrong == {}
    for _, _, _, text in EXAMPLES:
        ast.parse(text)


@pytest.fixture
def names(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What examples may use: engine, model, base, batch, data, ds_config, input_ids."""
    from tests.toy import batch, ds_config, make_engine, tiny_llama, train

    monkeypatch.chdir(tmp_path)
    config = ds_config(block=BLOCKS[request.param])
    model = tiny_llama()
    found = {"model": model, "base": tiny_llama(), "batch": batch(0), "data": [batch(1), batch(2)]}
    found |= {"ds_config": config, "input_ids": batch(0)["input_ids"][:1, :4]}
    engine = make_engine(config, model)
    train(engine, 1)
    yield found | {"engine": engine}
    for made in {id(e): e for e in (engine, found.get("engine"), *_engines(found)) if e is not None}.values():
        made.destroy()


def _engines(found: dict[str, Any]) -> list[Any]:
    return [value for value in found.values() if isinstance(value, MeftEngine)]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        pytest.param(mark.removeprefix("run").removeprefix(": "), text, id=f"{named(page)}-{n}")
        for page, n, mark, text in EXAMPLES
        if mark.startswith("run")
    ],
    indirect=["names"],
)
def test_examples_run(names: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM)
    try:
        torch.manual_seed(0)
        exec(compile(text, "example", "exec"), names)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("names", BLOCKS, indirect=True)
def test_the_page_of_statistics_has_every_key(names: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "reference" / "statistics.md").read_text(encoding="utf-8")
    stats = names["engine"].meft_stats()
    keys = {*stats, *stats["bytes"], *(key for name in MeftConfig.methods() for key in stats.get(name, ()))}
    assert [key for key in keys if f"`{key.removeprefix('eval_')}`" not in page] == []
    for name in (name for name in MeftConfig.methods() if name in stats):
        assert f", under `{name}`\n" in page
