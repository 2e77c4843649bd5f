# SPDX-License-Identifier: Apache-2.0
"""Several nodes, emulated: ranks that share no memory, each node with a store of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meft_ds.plugin.build import by_node
from tests.forked import Forge
from tests.plugin import nodes_ranks
from tests.ranks import REPO, free_port

Run = Callable[[int, list[dict[str, Any]]], list[list[dict[str, Any]]]]


@pytest.fixture
def run(forge: Forge, tmp_path: Path) -> Run:
    """Trains on a number of ranks; returns results by case, then by rank."""

    def run(world: int, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        found = forge.results(nodes_ranks.trainings, tmp_path / "ranks", world=world, cases=cases)
        return list(map(list, zip(*found, strict=True)))

    return run


def assert_equal_nodes(ranks: list[dict[str, Any]]) -> None:
    """All ranks of a case ended with the same stores and weights, bit for bit."""
    assert len({rank["digest"] for rank in ranks}) == 1 and len({rank["norm"] for rank in ranks}) == 1


def assert_same_training(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a["losses"], b["losses"], atol=1e-5, rtol=0)
        assert abs(a["norm"] - b["norm"]) < 1e-5 * b["norm"]


def test_two_nodes_train_as_one_and_a_checkpoint_of_either_resumes_on_the_other(run: Run, tmp_path: Path) -> None:
    one, two, again, whole, moved, back = run(
        2,
        [
            {"block": "dense", "layout": "00", "save": str(tmp_path / "one")},
            {"block": "dense", "layout": "01", "save": str(tmp_path / "two")},
            {"block": "dense", "layout": "01"},
            {"block": "dense", "layout": "00", "steps": 6},
            {"block": "dense", "layout": "01", "load": str(tmp_path / "one"), "from": 4, "steps": 2},
            {"block": "dense", "layout": "00", "load": str(tmp_path / "two"), "from": 4, "steps": 2},
        ],
    )
    assert_equal_nodes(two)
    assert_same_training(one, two)
    assert [rank["digest"] for rank in two] == [rank["digest"] for rank in again]  # from run to run
    for resumed in (moved, back):
        assert_equal_nodes(resumed)
        for a, b in zip(resumed, whole, strict=True):
            torch.testing.assert_close(a["losses"], b["losses"][4:], atol=1e-5, rtol=0)
    # each node's rows are the same, so one of them writes
    assert sum("rows" in name for name in two[0]["files"]) == 2
    assert two[0]["host_bytes"] < one[0]["host_bytes"]  # of a node: the rows once, as before, and half the dense state


@pytest.mark.long
def test_ranks_laid_out_on_nodes_in_any_way_train_alike(run: Run) -> None:
    layouts = ("0000", "0011", "0101", "0123")
    blocks = ("dense", "lazy", "compress", "subspace", "sparse_matrix")
    found = run(4, [{"block": block, "layout": layout} for block in blocks for layout in layouts])
    for index in range(0, len(found), len(layouts)):
        for ranks in found[index : index + len(layouts)]:
            assert_equal_nodes(ranks)
            assert_same_training(found[index], ranks)


@pytest.mark.long
def test_overlap_over_nodes_equals_the_serial_order_bit_for_bit(run: Run) -> None:
    cases = [{"block": "dense", "layout": "0011", "mode": mode} for mode in ("serial", "exact")]
    serial, exact = run(4, cases)
    assert [rank["digest"] for rank in serial] == [rank["digest"] for rank in exact]


def can_unshare() -> bool:
    """Whether this user may give a process a /dev/shm of its own."""
    trial = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/dev/shm"]
    return shutil.which("unshare") is not None and subprocess.run(trial, capture_output=True).returncode == 0


@pytest.mark.long
@pytest.mark.skipif(not can_unshare(), reason="needs the right to mount in a namespace of its own")
def test_ranks_that_have_a_dev_shm_each_are_nodes_without_being_told(run: Run) -> None:
    case, own = json.dumps([{"block": "dense"}]), "mount -t tmpfs none /dev/shm && exec"
    port, processes = str(free_port()), []
    for rank in range(2):
        env = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        command = ["unshare", "--mount", "sh", "-c", f"{own} {sys.executable} {nodes_ranks.__file__} '{case}'"]
        processes.append(subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, text=True))
    try:
        lines = [process.communicate(timeout=240)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    apart = [json.loads(line[7:])[0] for output in lines for line in output if line.startswith("RESULT ")]
    (told,) = run(2, [{"block": "dense", "layout": "01"}])
    assert [rank["digest"] for rank in apart] == [rank["digest"] for rank in told]
    assert [rank["moments"] for rank in apart] == [rank["moments"] for rank in told]  # each node's own, whole


@pytest.mark.long
def test_store_and_moments_of_a_node_do_not_grow_with_its_ranks(run: Run) -> None:
    held = {}
    for world in (1, 2, 4):
        (ranks,) = run(world, [{"block": "dense", "layout": "0" * world, "steps": 1}])
        assert len({rank["store"] for rank in ranks}) == 1  # one, which all ranks of the node see
        held[world] = ranks[0]["store"] + sum(rank["moments"] for rank in ranks)
        assert ranks[0]["host_bytes"] >= held[world]
    assert held[1] > 0 and all(abs(bytes_ - held[1]) <= 0.05 * held[1] for bytes_ in held.values())


def test_nodes_with_different_numbers_of_ranks_are_refused() -> None:
    assert by_node([0, 1, 2, 3], ["a:x", "b:x", "a:x", "b:x"]) == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="same number of ranks on every node, but there are a: 2, b: 1; start equally"):
        by_node([0, 1, 2], ["a:x", "a:x", "b:x"])
