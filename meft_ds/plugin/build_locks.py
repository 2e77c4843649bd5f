# SPDX-License-Identifier: Apache-2.0
"""Locks of extension builds: torch waits for a file `lock` without a word, and a build that was killed leaves one.

DeepSpeed builds its extensions so, on a CPU before there is an engine. Ours have a lock that ends with its holder. This
file is small, because every DeepSpeed program imports it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger("meft_ds")
_PATIENCE = 30.0


@dataclass(frozen=True)
class Lock:
    """A lock of a build, how many seconds old it is, and whether a process that we may look at holds it."""

    path: Path
    age: float
    held: bool

    def told(self) -> str:
        """Return what it does."""
        who = "a running build holds it" if self.held else "no process that can be seen from here holds it"
        return f"{self.path} ({self.age:,.0f} s old; {who}) makes every start that needs {self.path.parent.name} wait"

    def fix(self) -> str:
        """Return the command that ends it."""
        remove = f"rm {shlex.quote(str(self.path))}"
        return f"wait for that build; if it hangs, end it and run: {remove}" if self.held else f"run: {remove}"


def find() -> list[Lock]:
    """Return the locks in torch's extension folder, but for those that our own build removes."""
    found = [lock for path in _paths() if (lock := _look(path)) is not None]
    return sorted(found, key=lambda lock: lock.path)


def watch(patience: float = _PATIENCE) -> threading.Thread | None:
    """If there is a lock now, say what this process waits for once it has waited for it that long.

    Where there is none, as nearly always, nothing is started. A build that begins later is no killed one.
    """
    if not _paths():
        return None
    thread = threading.Thread(target=_watch, args=(patience,), name="meft-ds build locks", daemon=True)
    thread.start()
    return thread


def _watch(patience: float) -> None:
    since: dict[str, float] = {}
    while _paths():
        now, waited_for = time.monotonic(), _waited_for()
        since = {path: since.get(path, now) for path in waited_for}
        late = next((path for path, begin in since.items() if now - begin >= patience), None)
        if late is not None:
            lock = _look(Path(late))
            if lock is not None:
                from meft_ds.plugin.console import show_log

                show_log()
                _log.warning("the start has waited for %.0f s: %s; %s", patience, lock.told(), lock.fix())
            return
        time.sleep(min(1.0, patience / 4))


def _waited_for() -> set[str]:
    """Return the locks that threads of this process wait for, inside torch's `FileBaton.wait`."""
    found = set()
    for frame in sys._current_frames().values():
        at = frame
        while at is not None:
            if at.f_code.co_name == "wait" and at.f_code.co_filename.endswith("file_baton.py"):
                found.add(str(at.f_locals["self"].lock_file_path))
            at = at.f_back  # type: ignore[assignment]
    return found


def _paths() -> list[Path]:
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        root = Path(given)
    else:
        from torch._appdirs import user_cache_dir  # as torch.utils.cpp_extension, which is slow to import

        root = Path(user_cache_dir(appname="torch_extensions"))
    paths = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    return [path for path in paths if not path.parent.name.startswith("meft_ds_ops_")]


def _look(path: Path) -> Lock | None:
    try:
        state = path.stat()
    except OSError:  # the build has ended meanwhile
        return None
    held = False
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # another user's, or gone
            opened = link.stat()
            held |= (opened.st_dev, opened.st_ino) == (state.st_dev, state.st_ino)
    return Lock(path, time.time() - state.st_mtime, held)
