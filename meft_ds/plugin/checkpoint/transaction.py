# SPDX-License-Identifier: Apache-2.0
"""A save that happens on all ranks or on none. No file of an older checkpoint changes before the new one is complete.

Every file is written beside its final name, as `.<name>.meft-<generation>`. The manifest names the generation. The
moment in which the manifest is replaced is the one in which the new checkpoint takes the place of an older one of the
same tag. All other files get their final names after it. A process killed before that moment leaves the old checkpoint
as it was. One killed after it leaves names that the next save or load puts right (`finish`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from meft_ds import files
from meft_ds.offload.host.memory import in_units
from meft_ds.offload.ranks import Ranks

FOLDER = "meft"
MANIFEST = "meft_state.json"
_MARK = "meft-"  # in the suffix of files of a save in progress


class FileEntry(files.Fingerprint, total=False):
    """One of our files: a rank's slice of a unit's state, items [lo, hi) of `total`.

    Without `lo` it is what all ranks share of a unit or a method, and is read whole.
    """

    unit: str
    lo: int
    hi: int
    total: int


class Manifest(TypedDict):
    """What is in a checkpoint: files by their names, numbers of units and of methods by theirs."""

    format: int
    about: dict[str, Any]
    counters: dict[str, Any]
    units: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    files: dict[str, FileEntry]
    deepspeed: dict[str, files.Fingerprint]
    trained_base: NotRequired[list[str]]
    generation: NotRequired[str]
    sha256: NotRequired[str]


class Saving:
    """One save. Put work that may fail into `attempt`; `agree` then raises on every rank if it failed on any.

    Making one is collective.

    Args:
        save_dir: as given to `save_checkpoint`.
        tag: as given to `save_checkpoint`.
        ranks: who saves.

    Raises:
        RuntimeError: on every rank, when the folders cannot be made.
    """

    def __init__(self, save_dir: Path, tag: str, ranks: Ranks) -> None:
        self.save_dir, self.tag, self.ranks = save_dir, tag, ranks
        self.folder = save_dir / tag / FOLDER
        self._problem: str | None = None
        self._cause: Exception | None = None
        self._written: list[Path] = []
        self._complete = False
        self.of_deepspeed: dict[str, files.Fingerprint] = {}
        with self.attempt(self.folder):
            if ranks.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                finish(self.folder)
                unfinished = [*self.folder.glob(".*tmp*"), *save_dir.glob(".latest.*.tmp")]
                for path in [*unfinished, *_staged(self.folder, "*")]:  # of a save that was killed
                    with contextlib.suppress(OSError):  # somebody else's: it takes no name that this save needs
                        path.unlink()
        self.generation: str = self.agree(secrets.token_hex(8))[0]

    @contextlib.contextmanager
    def attempt(self, path: Path) -> Iterator[None]:
        """Keep what the work inside raises for `agree`. `path` is the file that it is about."""
        try:
            yield
        except Exception as e:
            if self._problem is None:
                self._problem = f"rank {self.ranks.rank} could not write {path}: {_reason(e)}; {_room(path)}"
                self._cause = e

    def agree(self, item: Any = None) -> list[Any]:
        """Return every rank's `item` when all work so far has succeeded on all ranks. Collective.

        Raises:
            RuntimeError: on every rank, naming the file, when some work failed; files of this save are removed before.
        """
        gathered = self.ranks.gather((self._problem, self._complete, item))
        problems = [problem for problem, _, _ in gathered if problem is not None]
        if not problems:
            return [item for _, _, item in gathered]
        complete = any(complete for _, complete, _ in gathered)
        if not complete:
            self._remove()
        end = "it can be loaded by its tag" if complete else "nothing of it is left"
        raise RuntimeError(
            f"meft-ds: checkpoint {self.tag!r} is not saved as it should be: {problems[0]}. Make room there, choose "
            f"another save_dir or mend what is named, and save again. {end[0].upper()}{end[1:]}, and checkpoints saved "
            "before are as they were."
        ) from self._cause

    def write(self, path: Path, writer: Callable[[Path], Any]) -> files.Fingerprint:
        """Write the file that will be `path`, and return its size and SHA-256. After a failure, write nothing."""
        found = files.Fingerprint()
        if self._problem is not None:
            return found
        staged = path.with_name(f".{path.name}.{_MARK}{self.generation}")
        self._written.append(staged)
        with self.attempt(path):
            with files.named(path):
                files.write_new(staged, writer)
            found = files.fingerprint(staged)
        return found

    def write_of_deepspeed(self, path: Path, writer: Callable[[Path], Any]) -> None:
        """Do what `write` does for a file that DeepSpeed expects in the checkpoint's folder."""
        self.of_deepspeed[str(path.relative_to(self.folder.parent))] = self.write(path, writer)

    def complete(self, manifest: Manifest) -> None:
        """Make this the checkpoint of its tag. Call it on the rank that has gathered what all wrote."""
        with self.attempt(self.folder / MANIFEST):
            manifest["generation"] = self.generation
            content = sealed(manifest)
            # a power cut must not lose the names that the manifest relies on: <tag>/meft, <tag>, save_dir's own
            for folder in (self.folder, *self.folder.parents[:3]):
                files.sync_names(folder)
            text = json.dumps(content, indent=1, sort_keys=True)
            files.write_text(self.folder / MANIFEST, text, replaced=self._is_complete)
            finish(self.folder)
            for path in self.folder.glob("*.safetensors"):  # of another number of ranks, or of other units
                if path.name not in manifest["files"]:
                    path.unlink()

    def _is_complete(self) -> None:
        self._complete = True  # whatever fails from now on, the manifest already names this save's files

    def latest(self) -> None:
        """Let `latest` name this checkpoint."""
        with self.attempt(self.save_dir / "latest"):
            files.write_text(self.save_dir / "latest", self.tag)

    def _remove(self) -> None:
        for path in self._written:
            with contextlib.suppress(OSError):  # never there, or out of reach: the next save tries again
                path.unlink()
        self.ranks.barrier()
        if self.ranks.rank == 0:
            for folder in (self.folder, self.folder.parent):
                with contextlib.suppress(OSError):  # not empty: an older checkpoint
                    folder.rmdir()
        self.ranks.barrier()


def finish(folder: Path) -> None:
    """Give the files of a complete save their final names, if a kill kept that save from doing so."""
    try:
        manifest = read_sealed(folder / MANIFEST)
    except (ValueError, FileNotFoundError):
        return
    generation = str(manifest.get("generation"))
    # no pattern that reaches other files, whoever wrote the manifest
    for path in _staged(folder, generation) if generation.isalnum() else ():
        with contextlib.suppress(FileNotFoundError):  # somebody else who loads was quicker
            os.replace(path, path.with_name(path.name[1 : -len(f".{_MARK}{generation}")]))


def sealed(manifest: Manifest) -> Manifest:
    """Return the manifest as JSON gives it back, with a checksum of its own."""
    plain = json.loads(json.dumps({k: v for k, v in manifest.items() if k != "sha256"}))
    return cast(Manifest, {**plain, "sha256": _seal(plain)})


def read_sealed(path: Path) -> Manifest:
    """Read a manifest whose checksum holds.

    Raises:
        ValueError: saying what is wrong with it.
        FileNotFoundError: when there is none.
    """
    content = files.read_bytes(path)
    if not content.strip():
        raise ValueError("it is empty")
    manifest: Any = files.parse_json(content)
    if not isinstance(manifest, dict):
        raise ValueError("it is no JSON object")
    if "sha256" not in manifest:
        raise ValueError("it has no checksum")
    if _seal({k: v for k, v in manifest.items() if k != "sha256"}) != manifest["sha256"]:
        raise ValueError("its content is not what its checksum was made of")
    return cast(Manifest, manifest)


def _seal(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _staged(folder: Path, generation: str) -> list[Path]:
    pattern = f".*.{_MARK}{generation}"
    return [*folder.glob(pattern), *folder.parent.glob(pattern)]


def _reason(e: Exception) -> str:
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    if isinstance(e.__context__, Exception):  # torch fails again while it closes the file
        return _reason(e.__context__)
    return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"


def _room(path: Path) -> str:
    for folder in path.parents:
        with contextlib.suppress(OSError):
            return f"{in_units(shutil.disk_usage(folder).free)} are free there"
    return "its folder cannot be read"
