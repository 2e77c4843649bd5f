# SPDX-License-Identifier: Apache-2.0
"""Faults on two ranks: each ends in a clear error on every rank or in correct continuation, and checkpoints live on.

Kills are in tests/stress and in test_ranks.py. Ranks are forked (tests/forked.py) and run what is in fault_ranks.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Forge
from tests.ranks import REPO, SHM, free_port

RANKS = "tests.plugin.fault_ranks:"


def test_a_disk_that_is_full_at_any_byte_is_an_error_on_every_rank_and_harms_nothing(
    forge: Forge, tmp_path: Path
) -> None:
    limits = [(0, 0), (0, 38000), (1, 100), (1, 8200)]  # (rank, bytes that a file of its may have)
    one, other = forge.results(RANKS + "full_disk", tmp_path, limits=limits)
    assert one == other
    for limit, victim, message in one["found"]:
        expected = {"meft_state.json": "meft_state.json: No space left", "latest": "latest: No space left"}.get(
            limit, r"mp_rank_00_model_states.pt: |\.safetensors: .*File too large"
        )
        assert re.search(f"rank {victim} could not write .*({expected}).*[KMG]iB are free there. Make room", message), (
            limit
        )
        assert ("can be loaded by its tag" if limit == "latest" else "of it is left") in message


def test_client_state_that_cannot_be_saved_is_an_error_on_every_rank(forge: Forge, tmp_path: Path) -> None:
    for message in forge.results(RANKS + "unpicklable", tmp_path):
        assert re.search(r"rank 0 could not write .*mp_rank_00_model_states\.pt: .*pickle.*mend what is named", message)
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("rank")] == []


@pytest.mark.parametrize("pattern", ["mp_rank_00_model_states.pt", "meft/layer0.rows.00001*", "meft/meft_state.json"])
def test_a_flipped_bit_is_refused_on_every_rank_before_anything_changes(
    forge: Forge, tmp_path: Path, pattern: str
) -> None:
    for found in forge.results(RANKS + "flipped", tmp_path, pattern=pattern):
        assert found["before"] == found["after"]
        assert "is damaged" in found["message"] and "load an earlier checkpoint" in found["message"]
        assert pattern.split("/")[-1].rstrip("*") in found["message"]


@pytest.mark.parametrize("mode", ["exact", pytest.param("serial", marks=pytest.mark.long)])
def test_a_loss_that_is_nan_on_one_rank_for_a_step_is_as_if_the_step_had_not_been(
    forge: Forge, tmp_path: Path, mode: str
) -> None:
    for found in forge.results(RANKS + "not_a_number", tmp_path, mode=mode):
        assert found["weights"] == found["skipped"], "weights and moments must be untouched"
        assert found["overflowed"] == found["plain"]


def test_a_slow_rank_gives_the_same_bits(forge: Forge, tmp_path: Path) -> None:
    for found in forge.results(RANKS + "slow", tmp_path):
        assert found["slow"] == found["plain"]


def test_a_rank_that_raises_in_forward_ends_all(forge: Forge, tmp_path: Path) -> None:
    kept, raised = forge.run(RANKS + "raises", tmp_path)
    assert (kept.code, raised.code) == (1, 1) and max(kept.seconds, raised.seconds) < 120
    assert "ValueError: planted" in raised.log
    assert "resume from the last checkpoint" in kept.log or "Connection closed by peer" in kept.log


@pytest.mark.long
def test_a_rank_that_raises_under_the_launcher_ends_all_with_an_exit_code(tmp_path: Path) -> None:
    before, port = set(SHM.glob("meft-ds-*")), free_port()
    command = [str(Path(sys.executable).with_name("deepspeed")), "--no_local_rank", "--num_gpus", "2"]
    command += ["--master_port", str(port)]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("adapter_ranks.py")), "raises", str(tmp_path)],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    for path in SHM.glob(f"deepspeed_allreduce_buffer_*_{port}_*"):  # DeepSpeed's own, which it leaves
        path.unlink()
    assert done.returncode != 0 and "planted" in done.stderr + done.stdout
    assert set(SHM.glob("meft-ds-*")) <= before


@pytest.mark.parametrize("how", ["flag", "handler"])
def test_a_save_on_sigterm_is_gone_on_with_bit_for_bit(forge: Forge, tmp_path: Path, how: str) -> None:
    """The handler sets a flag that ranks look at after each step, or saves at once, between two steps."""
    assert [rank.code for rank in forge.run(RANKS + "told_to_end", tmp_path, how=how)] == [0, 0]
    for found in forge.results(RANKS + "goes_on", tmp_path):
        assert found["at"] >= 4 and found["resumed"] == found["plain"]


def test_a_save_in_the_middle_of_a_step_is_refused(forge: Forge, tmp_path: Path) -> None:
    (found,) = forge.results(RANKS + "saves_inside_a_step", tmp_path, world=1)
    assert "in the middle of a step" in found["exact"] and "set a flag" in found["exact"]
    assert "in the middle of a step" in found["eager"]


def test_the_first_rank_alone_tells_what_is_active_and_what_is_skipped(forge: Forge, tmp_path: Path) -> None:
    first, second = forge.run(RANKS + "settings_without_effect", tmp_path)
    assert first.code == second.code == 0, first.log + second.log
    told = [line for line in first.log.splitlines() if line.startswith("meft-ds: ")]
    assert [line.split(" is skipped")[0] for line in told if " is skipped" in line] == [
        "meft-ds: zero_optimization.offload_optimizer",
        "meft-ds: prescale_gradients",
        "meft-ds: optimizer.params.nesterov",
    ]
    assert sum("version " in line for line in told) == 1
    assert "meft" not in second.log


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (
            "seen by one rank",
            r"one store of [\d.]+ KiB .* only [\d.]+ KiB free.*--shm-size.*lower \"sparse_adapter.rows",
        ),
        ("full after the check", r"could not take .* No space left on device; .* [KMG]iB are free now.*--shm-size"),
        ("a limit after the check", r"could not take .* File too large; .*ulimit"),
        ("no mapping", r"could not take .* Cannot allocate memory"),
    ],
)
def test_too_little_shared_memory_is_the_same_clear_error_on_every_rank(
    forge: Forge, tmp_path: Path, what: str, told: str
) -> None:
    messages: list[Any] = forge.results(RANKS + "little_shared_memory", tmp_path, what=what)
    assert messages[0] == messages[1] and re.search(told, messages[0])


@pytest.mark.parametrize("mode", ["same tag", pytest.param("another tag", marks=pytest.mark.long)])
def test_a_save_that_dies_at_any_of_its_steps_leaves_the_old_checkpoint_or_the_new_one(
    forge: Forge, tmp_path: Path, mode: str
) -> None:
    (outcomes,) = forge.results(RANKS + "killed_at_every_step_of_a_save", tmp_path, world=1, mode=mode)
    assert outcomes["old"] > 10 and outcomes["new"] >= (10 if mode == "same tag" else 1)
