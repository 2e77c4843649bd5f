# SPDX-License-Identifier: Apache-2.0
"""Choosing and building the C++ path: in fresh processes, with compilers that work and that do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meft_ds import ops
from meft_ds.ops import build

PROGRAM = """
import torch
from meft_ds import ops
from meft_ds.ops.adam import AdamHyper
hyper = AdamHyper(lr=.1, beta1=.9, beta2=.99, eps=1e-8, weight_decay=0.)
p, m, v = torch.ones(4, 3), torch.zeros(4, 3), torch.zeros(4, 3)
for step in (1, 2):
    ops.adamw_(p, m, v, torch.ones(4, 3), hyper, step=step)
torch.testing.assert_close(p, torch.full((4, 3), 0.8), rtol=1e-5, atol=0)
out = torch.zeros(2, 3)
ops.gather_rows(torch.arange(12.).view(4, 3), torch.tensor([3, 0]), out)
assert out.tolist() == [[9, 10, 11], [0, 1, 2]]
print(ops.backend())
"""


def _run(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    # Warnings of unrelated imports are off; ours comes through logging.
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "MEFT_DS_OPS": "", **env}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)


def test_broken_compiler_gives_one_warning_and_right_results(tmp_path: Path) -> None:
    done = _run(tmp_path, CXX="/bin/false")
    assert done.stdout.strip() == "torch"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "C++ host kernels could not be built" in lines[0]


def test_environment_chooses_torch_without_a_word(tmp_path: Path) -> None:
    done = _run(tmp_path, MEFT_DS_OPS="torch")
    assert done.stdout.strip() == "torch" and done.stderr == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(ops.backend() != "cpp", reason="the C++ kernels cannot be built here")
def test_ranks_that_start_together_and_a_dead_builder_do_no_harm(tmp_path: Path) -> None:
    """Two processes build at once, in a folder where a killed build left torch's lock; then a third only loads."""
    folder = tmp_path / f"meft_ds_ops_{build._fingerprint()}"
    folder.mkdir()
    (folder / "lock").touch()
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "MEFT_DS_OPS": ""}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    ranks = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=600)
        assert (out.strip(), err) == ("cpp", "")
    # The compiler and ninja are not needed any more.
    assert _run(tmp_path, PATH="/nowhere").stdout.strip() == "cpp"


def test_every_source_counts_for_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = build._fingerprint()
    for source in build._CSRC.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "_CSRC", tmp_path)
    assert build._fingerprint() == before
    (tmp_path / "adam.h").write_text("// changed\n")
    assert build._fingerprint() != before
