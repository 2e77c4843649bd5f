# SPDX-License-Identifier: Apache-2.0
"""The quality benchmark: every method takes steps on equal terms, and its last line says what a reader needs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("full", "lsp_random_fixed", "lora", "lora_only", "galore")
TILES = ("lora_equal", "smt", "smt_per_module", "smt_mean_abs", "smt_paper", "smt_magnitude", "smt_random")


@pytest.mark.slow
def test_methods_start_alike_and_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), "--methods", *METHODS, "--lrs", "1e-3", "2e-3"]
    options = ["--tune-seed", "0", "--seeds", "0", "--steps", "2", "--num-eval", "4", "--log", str(tmp_path / "log")]
    results = [result([*command, *options]) for _ in range(2)]
    assert results[0]["table"] == results[1]["table"]
    assert len((tmp_path / "log").read_text().splitlines()) == len(results[0]["runs"]) == 2 * len(METHODS)
    first = {run["method"]: run for run in results[0]["runs"] if run["lr"] == 1e-3}
    losses = [run["losses"][0] for run in first.values()]
    assert max(losses) - min(losses) < 0.1 * min(losses)  # the mean over the first step, which is the same, and another
    assert max(first[m]["state"] for m in METHODS[1:3]) < 0.4 * first["full"]["state"]
    equal = [first[method]["compressed"] for method in METHODS[1:]]
    assert max(equal) < 1.02 * min(equal)


@pytest.mark.slow
def test_tiles_and_the_adapter_they_are_compared_with_train_equally_many_values() -> None:
    pytest.importorskip("peft")
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), "--methods", *TILES, "--lrs", "8e-3"]
    # the 20 steps that score, and two that train
    runs = {r["method"]: r for r in result([*command, "--seeds", "0", "--steps", "22", "--num-eval", "2"])["runs"]}
    assert len({runs[method]["state"] for method in TILES}) == 1
    assert all(runs[method]["compressed"] == runs[method]["state"] for method in TILES)
    assert [runs[method]["scoring_steps"] for method in TILES[1:]] == [20, 20, 20, 20, 0, 0]
    assert runs["smt"]["losses"][:2] == runs["smt_paper"]["losses"][:2] != runs["smt_random"]["losses"][:2]
    assert runs["smt"]["losses"][2] != runs["smt_paper"]["losses"][2]


def result(command: list[str]) -> dict[str, Any]:
    """The last line of a run that went well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
