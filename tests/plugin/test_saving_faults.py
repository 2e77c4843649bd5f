# SPDX-License-Identifier: Apache-2.0
"""What breaks on one rank while files are saved and loaded; ranks together are in test_faults.py."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from meft_ds import files
from tests.toy import ADAPTER, ds_config, make_engine, state_of, tiny_llama, train


def engine(seed: int = 0, **extra: Any) -> Any:
    return make_engine(ds_config(block={"sparse_adapter": dict(ADAPTER)}, **extra), tiny_llama(seed))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def saved_once(folder: Path) -> Any:
    """An engine that has saved `last`, and trained on."""
    ours = engine()
    train(ours, 1)
    ours.save_checkpoint(str(folder), tag="last")
    train(ours, 1)
    return ours


@pytest.mark.parametrize("refused", ["open", "fsync"])
def test_a_file_system_that_cannot_sync_folders_takes_a_checkpoint_over_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    ours = saved_once(tmp_path)
    real = getattr(os, refused)

    def fail(what: Any, *args: Any, **kwargs: Any) -> Any:
        if os.path.isdir(what) if refused == "open" else stat.S_ISDIR(os.fstat(what).st_mode):
            raise OSError(22, "Invalid argument")
        return real(what, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, refused, fail)
        assert ours.save_checkpoint(str(tmp_path), tag="last")
    _holds(tmp_path, state_of(ours))


def test_an_error_after_the_manifest_was_replaced_leaves_the_new_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = saved_once(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_names", _after(tmp_path / "last" / "meft", files.sync_names))
        with pytest.raises(RuntimeError, match="planted.*It can be loaded by its tag"):
            ours.save_checkpoint(str(tmp_path), tag="last")
    _holds(tmp_path, state_of(ours))
    train(ours, 1)
    ours.save_checkpoint(str(tmp_path), tag="last")
    _holds(tmp_path, state_of(ours))


def _after(folder: Path, real: Any) -> Any:
    """Fails at the second call for `folder`, the one that follows the rename."""
    seen: list[Path] = []

    def fail(path: Path) -> None:
        seen.append(path)
        if seen.count(folder) == 2:
            raise TimeoutError("planted")  # by a signal handler, say: not of the kind that a file system raises
        real(path)

    return fail


def _holds(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    other = engine(seed=9)
    assert other.load_checkpoint(str(folder))[0] is not None
    assert same(state_of(other), expected)
    assert not [path for path in folder.rglob(".*")], "nothing temporary may be left"


def test_names_of_files_and_folders_are_on_disk_before_a_manifest_relies_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        log.append(os.readlink(f"/proc/self/fd/{fd}"))
        sync(fd)

    def rename(a: Any, b: Any) -> None:
        log.append(f"rename {b}")
        replace(a, b)

    ours, save_dir = engine(), tmp_path / "new" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", rename)
        ours.save_checkpoint(str(save_dir), tag="t")
    before = log[: log.index(f"rename {save_dir}/t/meft/meft_state.json")]
    staged = max(index for index, path in enumerate(before) if ".meft-" in path)
    for folder in (save_dir / "t" / "meft", save_dir / "t", save_dir, save_dir.parent):
        assert str(folder) in before[staged:], folder


def test_a_writer_that_a_program_puts_into_the_engine_is_refused_before_it_writes(tmp_path: Path) -> None:
    class Other:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was used")

    ours = engine()
    own, ours.checkpoint_engine = ours.checkpoint_engine, Other()
    with pytest.raises(ValueError, match="checkpoint_engine is Other, expected DeepSpeed's own TorchCheckpointEngine"):
        ours.save_checkpoint(str(tmp_path), tag="t")
    ours.checkpoint_engine = own
    assert ours.save_checkpoint(str(tmp_path), tag="t")


@pytest.mark.parametrize("zipped", [True, False])
def test_loading_maps_the_weights_and_keeps_nothing_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    settings = {"checkpoint": {"checkpoint_serialization": zipped}}
    ours, other = engine(**settings), engine(seed=9, **settings)
    train(ours, 1)
    ours.save_checkpoint(str(tmp_path), tag="t", client_state={"kept": {"of": [torch.arange(3)]}})
    mapped = []
    take = type(other).load_module_state_dict

    def watched(self: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> None:
        mapped.append("mp_rank_00_model_states.pt" in Path("/proc/self/maps").read_text())
        take(self, checkpoint, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(other), "load_module_state_dict", watched)
        _, state = other.load_checkpoint(str(tmp_path))
    assert mapped == [zipped], "torch's older format cannot be mapped"
    assert "mp_rank_00_model_states.pt" not in Path("/proc/self/maps").read_text()
    assert torch.equal(state["kept"]["of"][0], torch.arange(3)) and same(state_of(ours), state_of(other))


def test_a_latest_that_names_another_checkpoint_loads_that_one(tmp_path: Path) -> None:
    """It has no checksum, being DeepSpeed's file; docs/explanation/faults.md says so."""
    ours, other = engine(), engine(seed=9)
    for tag in ("a", "b"):
        train(ours, 1)
        ours.save_checkpoint(str(tmp_path), tag=tag)
    (tmp_path / "latest").write_text("a")
    other.load_checkpoint(str(tmp_path))
    assert other.global_steps == 1
