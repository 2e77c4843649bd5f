# SPDX-License-Identifier: Apache-2.0
"""The example through the real `deepspeed` launcher, with every ready ds_config, unchanged."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import REPO, free_port


def launch(config: str, folder: Path, *args: str, ranks: int = 1) -> dict[str, Any]:
    """Two steps on eight facts; returns the last line, which is JSON."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", str(ranks), "--master_port", str(free_port())]
    command += [str(REPO / "examples" / "finetune.py"), "--deepspeed", str(REPO / "ds_configs" / config)]
    command += ["--num_facts", "8", "--max_steps", "2", "--output_dir", str(folder), *args]
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        pytest.param("meft.json", 1, marks=pytest.mark.slow),
        pytest.param("meft.json", 2, marks=pytest.mark.slow),
        ("lsp.json", 1),
        pytest.param("lsp.json", 2, marks=pytest.mark.slow),
    ],
)
def test_example_runs_with_the_block_and_reports_its_traffic(tmp_path: Path, config: str, ranks: int) -> None:
    result = launch(config, tmp_path, ranks=ranks)
    assert result["task"] == "facts" and result["steps"] == 2 and result["world_size"] == ranks
    assert result["bytes_down_per_step"] > 0 and result["bytes_up_per_step"] > 0
    assert result["host_bytes"] > 0 and result["device_bytes"] > 0
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.slow
def test_example_scores_tiles_then_trains_them_and_nothing_else(tmp_path: Path) -> None:
    # 20 steps score, so two train
    result = launch("smt.json", tmp_path, "--max_steps", "22")
    choice = json.loads((tmp_path / "out" / "tiles.json").read_text())
    assert result["steps"] == 22 and result["bytes_down_per_step"] > 0
    ranges = [(*tile["rows"], *tile["cols"]) for tile in choice["tiles"]]
    trained = sum((hi - lo) * (right - left) for lo, hi, left, right in ranges)
    assert result["trainable_parameters"] == trained < 0.21 * choice["total"]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param("zero2_offload.json", marks=pytest.mark.slow),
        pytest.param("zero3.json", marks=pytest.mark.slow),
        pytest.param("zero3_offload.json", marks=pytest.mark.slow),
    ],
)
def test_the_same_program_runs_with_each_baseline_config(tmp_path: Path, config: str) -> None:
    result = launch(config, tmp_path)
    assert result["steps"] == 2 and result["exact_match_before"] <= 0.02
    assert not result.get("bytes_down_per_step")
