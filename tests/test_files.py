# SPDX-License-Identifier: Apache-2.0
"""Files are whole or not there, have the umask's mode, follow no link that somebody planted, and are read only if they
are files. Every kind of file that we write and read takes part."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from meft_ds import files
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.schedule.timing import WindowTimes
from meft_ds.offload.schedule.trace import Trace
from meft_ds.plugin.checkpoint import state
from meft_ds.plugin.checkpoint.transaction import Saving, finish
from meft_ds.sparse_adapter.files import JSON_NAME, read_adapter, write_adapter
from meft_ds.sparse_matrix.choice.choice import Choice, Tile
from meft_ds.sparse_matrix.files import SavedTiles, apply_tiles, read_tiles, write_tiles
from tests.offload.test_trace import two_micro_batches
from tests.sparse_adapter.tiny import attach_device_rows, tiny_model

CHOICE = Choice(tiles=(Tile("w", None, (0, 2), (0, 2), "q", 0),), shapes={"w": (4, 4)}, total=16, made_by={})
TILES = SavedTiles(
    digest="d",
    shapes={"w": (4, 4)},
    tiles={"w": [(None, (0, 2), (0, 2))]},
    values={"w": torch.ones(4)},
    originals={"w": torch.zeros(4)},
)


def write_trace(path: Path) -> None:
    trace = Trace(str(path), windows=1)
    for _ in range(3):
        times: WindowTimes = two_micro_batches()
        trace.add(times)


def write_checkpoint(folder: Path) -> None:
    saving = Saving(folder, "t", Ranks())
    state.save(saving, [], counters={}, about={}, methods={"m": ({}, {"t": torch.ones(3000)})})
    saving.latest()
    saving.agree()


def write_an_adapter(folder: Path) -> None:
    model = tiny_model("llama")
    attach_device_rows(model, values=0.5)
    write_adapter(folder, model)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "choice": lambda folder: CHOICE.save(folder / "choice.json"),
    "tiles": lambda folder: write_tiles(folder / "tiles.safetensors", TILES),
    "trace": lambda folder: write_trace(folder / "trace.json"),
    "checkpoint": write_checkpoint,
    "adapter": write_an_adapter,
}


@contextlib.contextmanager
def masked(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file may become longer than `most` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def in_time(work: Callable[[], Any]) -> Exception | None:
    """What `work` raised; fails if it waits, as for somebody who writes into a FIFO."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as e:
            raised.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive(), "it waits for ever"
    return raised[0] if raised else None


# Writing


@pytest.mark.parametrize("what", WRITERS)
def test_files_get_the_mode_that_the_umask_asks_for(what: str, tmp_path: Path) -> None:
    with masked(0o027):
        WRITERS[what](tmp_path)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert found and set(found.values()) == {0o640}, found


@pytest.mark.parametrize("what", WRITERS)
def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names cannot be guessed; here somebody has, and every name that is opened for writing is taken by a link."""
    (folder := tmp_path / "out").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    real = os.open

    def planted(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT and not os.path.lexists(path):
            os.symlink(victim, path)
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", planted)
    with contextlib.suppress(OSError, RuntimeError):
        WRITERS[what](folder)
    assert victim.read_text() == "mine"


def test_temporary_names_cannot_be_foreseen(tmp_path: Path) -> None:
    names: list[str] = []

    def writer(part: Path) -> None:
        names.append(part.name)
        part.write_text("x")

    for _ in range(2):
        files.write_whole(tmp_path / "a", writer)
    assert names[0] != names[1] and all(str(os.getpid()) not in name.split(".") for name in names)


@pytest.mark.parametrize("what", ["choice", "tiles", "adapter"])
def test_a_full_disk_raises_an_oserror_with_the_path_and_leaves_nothing_half_done(what: str, tmp_path: Path) -> None:
    with full_disk(100), pytest.raises(OSError, match=str(tmp_path)) as e:
        WRITERS[what](tmp_path)
    assert e.value.strerror == "File too large" and list(tmp_path.iterdir()) == []
    WRITERS[what](tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        WRITERS[what](tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_adapter_whose_json_cannot_be_written_leaves_no_tensors_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_text", fail)
    with pytest.raises(OSError, match="No space"):
        write_an_adapter(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_interrupted_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def interrupted(part: Path) -> None:
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_whole(path, interrupted)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_safetensors_own_errors_carry_the_path(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with full_disk(100), pytest.raises(OSError, match=str(path)):
        files.write_whole(path, lambda part: save_file({"t": torch.ones(1000)}, part))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["", "a\0b", "\ud800", "/"])
def test_what_cannot_be_the_path_of_a_file_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="expected a path|expected the path of a file"):
        files.write_text(path, "x")


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_tiles_and_adapters_need_a_path(path: str) -> None:
    model = tiny_model("llama")
    attach_device_rows(model, values=0.5)
    for write in (lambda: write_tiles(path, TILES), lambda: write_adapter(path, model)):
        with pytest.raises(ValueError, match="expected a path"):
            write()


def test_an_adapter_with_values_that_are_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model("llama")
    attach_device_rows(model, values=float("nan"))
    write_adapter(tmp_path, model)
    with pytest.raises(ValueError, match=r"layers\.0\.rows holds NaN or infinite values"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tiles_with_values_that_are_not_finite_are_not_applied(value: float, tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(4, 4))
    write_tiles(path := tmp_path / "t", replace(TILES, values={"w": torch.full((4,), value)}))
    with pytest.raises(ValueError, match="NaN or infinite values in tiles of w"):
        apply_tiles(model, path)
    assert not model.w.any()


def test_a_device_or_a_fifo_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(fifo := tmp_path / "fifo")
    for path, kind in ((fifo, "FIFO"), (Path("/dev/null"), "device"), (tmp_path, "folder")):
        with pytest.raises(ValueError, match=f"{path} is a {kind}"):
            files.write_text(path, "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and stat.S_ISFIFO(fifo.stat().st_mode)


# Reading


def _latest(folder: Path) -> Any:
    return state.latest_tag(folder)


def _verify(folder: Path) -> Any:
    return state.verify(folder / "t" / "meft", [], Ranks(), about={})


READERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "choice": ("choice", "choice.json", lambda folder: Choice.load(folder / "choice.json")),
    "tiles": ("tiles", "tiles.safetensors", lambda folder: read_tiles(folder / "tiles.safetensors")),
    "adapter": ("adapter", JSON_NAME, read_adapter),
    "rows": ("adapter", "*.safetensors", read_adapter),
    "latest": ("checkpoint", "latest", _latest),
    "manifest": ("checkpoint", "t/meft/meft_state.json", _verify),
    "state": ("checkpoint", "t/meft/*.safetensors", _verify),
}


def _planted(kind: str, path: Path, elsewhere: Path) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to a fifo":
        os.mkfifo(elsewhere)
        path.symlink_to(elsewhere)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["fifo", "link to a fifo", "link to a device", "folder"])
@pytest.mark.parametrize("what", READERS)
def test_what_is_no_file_is_refused_by_name_and_not_read(what: str, kind: str, tmp_path: Path) -> None:
    written, name, read = READERS[what]
    (folder := tmp_path / "out").mkdir()
    WRITERS[written](folder)
    (path,) = folder.glob(name)
    assert in_time(lambda: read(folder)) is None
    path.unlink()
    _planted(kind, path, tmp_path / "elsewhere")
    fault = in_time(lambda: read(folder))
    assert isinstance(fault, ValueError) and str(path) in str(fault) and "expected a regular file" in str(fault)


def test_a_manifest_that_is_a_fifo_stops_no_save(tmp_path: Path) -> None:
    folder = tmp_path / "t" / "meft"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "meft_state.json")
    assert in_time(lambda: finish(folder)) is None
    fault = in_time(lambda: write_checkpoint(tmp_path))
    assert isinstance(fault, RuntimeError) and "meft_state.json is a FIFO" in str(fault)


DEEP = "[" * 10_000 + "]" * 10_000
DEEP_OBJECT = '{"format": 1, "a": ' * 5_000 + "1" + "}" * 5_000


@pytest.mark.parametrize("what", ["choice", "adapter", "manifest"])
@pytest.mark.parametrize("text", [DEEP, DEEP_OBJECT], ids=["lists", "objects"])
def test_json_that_is_nested_too_deeply_is_refused_by_name(what: str, text: str, tmp_path: Path) -> None:
    written, name, read = READERS[what]
    WRITERS[written](tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=Path(name).name):
        read(tmp_path)


def test_deep_json_in_the_header_of_tiles_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, path := tmp_path / "t", metadata={"meft_tiles": DEEP})
    with pytest.raises(ValueError, match="damaged.*nested too deeply"):
        read_tiles(path)


def test_a_manifest_of_somebody_else_with_a_right_checksum_is_refused_by_name(tmp_path: Path) -> None:
    from meft_ds.plugin.checkpoint.transaction import sealed

    write_checkpoint(tmp_path)
    manifest = tmp_path / "t" / "meft" / "meft_state.json"
    whole = json.loads(manifest.read_text())
    for changes in ({"files": None}, {"files": {"../../latest": {}}}, {"about": 1}, {"methods": {"m": 1}}):
        manifest.write_text(json.dumps(sealed({**whole, **changes})))
        with pytest.raises(ValueError, match=r"meft_state\.json is damaged"):
            _verify(tmp_path)
    manifest.write_text(json.dumps(sealed({**whole, "generation": "*"})))
    (stray := tmp_path / "t" / ".a.meft-0").touch()
    finish(manifest.parent)
    assert stray.exists()


def test_what_is_left_of_others_in_the_folder_stops_no_save(tmp_path: Path) -> None:
    (tmp_path / "t" / "meft" / ".stray.tmp").mkdir(parents=True)
    (tmp_path / "t" / ".stray.meft-1").mkdir()
    write_checkpoint(tmp_path)
    _verify(tmp_path)
