# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from meft_ds.offload.host import cgroup
from meft_ds.offload.host.memory import check_host_memory, check_shared_memory, free_host_bytes

GIB = 2**30
KNOBS = ('lower "sparse_adapter.rows"',)


def test_too_little_memory_names_needed_free_and_the_knobs() -> None:
    with pytest.raises(
        ValueError, match=r"needs 8\.00 GiB .*only 2\.00 GiB are free.*sparse_adapter\.rows.*moments_dtype"
    ):
        check_host_memory(8 * GIB, 2 * GIB, limit_gb="auto", detail="rows", knobs=KNOBS)


def test_the_users_own_limit_counts_even_when_more_is_free() -> None:
    with pytest.raises(ValueError, match=r"needs 8\.00 GiB.*host_memory_gb allows 4\.00 GiB"):
        check_host_memory(8 * GIB, 64 * GIB, limit_gb=4.0, detail="rows", knobs=KNOBS)
    check_host_memory(8 * GIB, 64 * GIB, limit_gb=8.0, detail="rows", knobs=KNOBS)


def test_small_shared_memory_file_system_is_an_error_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"1\.00 GiB .*64\.0 MiB free.*--shm-size.*sparse_adapter\.rows"):
        check_shared_memory(GIB, 64 * 2**20, knobs=KNOBS)


def test_a_cgroup_limit_on_any_ancestor_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = tmp_path / "job" / "task"
    leaf.mkdir(parents=True)
    (leaf / "memory.max").write_text("max\n")
    (leaf / "memory.current").write_text("1000\n")
    (tmp_path / "job" / "memory.max").write_text("10000000\n")
    (tmp_path / "job" / "memory.current").write_text("4000000\n")
    (tmp_path / "job" / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    (tmp_path / "membership").write_text("4:memory:/elsewhere\n0::/job/task\n")
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    assert free_host_bytes() == 10_000_000 - 4_000_000 + 500_000


def test_without_cgroups_the_machines_free_memory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "absent")
    assert GIB // 4 < free_host_bytes() < 2**50
