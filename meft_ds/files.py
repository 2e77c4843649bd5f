# SPDX-License-Identifier: Apache-2.0
"""Writes files whole or not at all, with the mode that the umask asks for, and reads nothing but regular files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError

from meft_ds.options import shown

_KINDS = {
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


# -- writing -----------------------------------------------------------------------------------------------------------


def write_whole(
    path: str | Path, writer: Callable[[Path], Any], *, sync: bool = True, replaced: Callable[[], None] = lambda: None
) -> None:
    """Let `writer` write a file beside `path`, then rename it to `path`. Readers see the old one or the new one.

    Args:
        path: in a folder that exists. A link in this place is replaced; what it points to stays as it is.
        writer: called with the path to write to.
        sync: whether file and name are on disk before this returns.
        replaced: called after the rename, before anything else can fail.

    Raises:
        ValueError: when `path` names no file, or is a folder, a FIFO or a device.
        OSError: with `path`, when it cannot be written. Nothing half-done is left.
    """
    path = checked_target(path)
    # long names leave no room for more; nobody can guess the rest and put a link there
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    try:
        with named(path):
            write_new(part, writer, sync=sync)
            os.replace(part, path)
        replaced()
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    if sync:
        sync_names(path.parent)


def write_text(path: str | Path, text: str, *, sync: bool = True, replaced: Callable[[], None] = lambda: None) -> None:
    """Write a text in UTF-8 as `write_whole` does."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"), sync=sync, replaced=replaced)


def write_new(path: Path, writer: Callable[[Path], Any], *, sync: bool = True) -> None:
    """Create the file `path` and let `writer` write it. Nothing may be there before.

    The file gets the mode that the umask, or the folder's default ACL, gives new files. So it does if `writer` puts a
    file of its own there: safetensors does, and only this user could read that one.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
    finally:
        os.close(fd)
    writer(path)
    os.chmod(path, mode)
    if sync:
        _to_disk(path)


def sync_names(folder: Path) -> None:
    """Put the names in `folder` on disk, where the file system can do that."""
    with contextlib.suppress(OSError):  # some network file systems refuse it, which is no reason to give up a save
        _to_disk(folder)


def checked_target(path: str | Path) -> Path:
    """Return `path` if it can be the path of a file to write.

    Raises:
        ValueError: when it is empty, has a NUL in it, or is something that is no regular file.
    """
    _check_name(path)
    path = Path(path)
    if not path.name:
        raise ValueError(f"expected the path of a file, got {str(path)!r}; add a file name")
    with contextlib.suppress(OSError):  # nothing is there, or nothing that we may look at; the write will tell
        _check_kind(os.lstat(path).st_mode, path)
    return path


def checked_folder(path: str | Path) -> Path:
    """Return `path` if it can be that of a folder. Raise ValueError when it is empty or has a NUL in it."""
    _check_name(path)
    return Path(path)


def check_writable(path: str | Path) -> None:
    """Raise now if a file could not be written to `path` later.

    Raises:
        ValueError: as `checked_target`, and when its folder does not exist or cannot be written to.
    """
    path = checked_target(path)
    folder = path.absolute().parent
    probe = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # a name that is too long is one that exists nowhere, too
        write_new(probe, lambda _: None, sync=False)
    except OSError as e:
        name = shown(str(folder))
        fix = f"make the folder {name} writable" if folder.is_dir() else f"create the folder {name}"
        raise ValueError(
            f"expected a file in an existing, writable folder, got {shown(str(path))} ({e.strerror}); {fix} or choose "
            "another"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Inside, let errors of the file system name `path`, which the user knows. Those of safetensors become OSErrors."""
    try:
        yield
    except OSError as e:
        if e.errno is None:
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e
    except SafetensorError as e:
        found = re.search(r"\(os error (\d+)\)", str(e))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from e


# -- reading -----------------------------------------------------------------------------------------------------------


def check_file(path: str | Path) -> os.stat_result:
    """Return the state of a regular file, or of the one that a link leads to.

    Call it before a read: a read of a FIFO waits for ever.

    Raises:
        FileNotFoundError, PermissionError: when there is none, or none to be seen.
        ValueError: naming what is in its place.
    """
    _check_name(path)
    found = os.stat(path)
    _check_kind(found.st_mode, path)
    return found


def read_bytes(path: str | Path, most: int = -1) -> bytes:
    """Return what is in a file, or its first `most` bytes. Raise as `check_file`."""
    check_file(path)
    with open(path, "rb") as file:
        return file.read(most)


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text says. Raise ValueError, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None


class Fingerprint(TypedDict, total=False):
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


def fingerprint(path: str | Path) -> Fingerprint:
    """Read a file for its size and SHA-256. Raise as `check_file`."""
    size, digest = check_file(path).st_size, hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _check_name(path: str | Path) -> None:
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ValueError(f"expected a path, got {text!r}; it must not be empty, and must have no NUL in it")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError(f"expected a path, got {text!r}, which no file system can store; choose another") from None


def _check_kind(mode: int, path: str | Path) -> None:
    kind = _KINDS.get(stat.S_IFMT(mode))
    if kind is not None:
        raise ValueError(f"{path} is {kind}, expected a regular file; move it away, or choose another path")


def _to_disk(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
