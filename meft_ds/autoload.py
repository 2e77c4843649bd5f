# SPDX-License-Identifier: Apache-2.0
"""Arms the hook that lets a ds_config block turn this package on, without touching the user's program.

`import torch` calls `arm()` through the entry point group `torch.backends` (PyTorch's documented autoload mechanism,
switched off by TORCH_DEVICE_BACKEND_AUTOLOAD=0); `import meft_ds` calls it too. It runs in every process that imports
torch, so it imports nothing but small standard library modules, costs well under a millisecond
(benchmarks/import_time.py), and never raises. Once `deepspeed.runtime.engine` has been imported, it hands that
module to `meft_ds.plugin.install`.

The hook waits for that module, not for `deepspeed`: a program that imports deepspeed first has it half-loaded
by the time `import torch` runs inside it.
"""

import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["arm", "last_error"]

ENGINE_MODULE = "deepspeed.runtime.engine"

last_error: BaseException | None = None
"""Why the plugin could not be installed, or None. Logged once as a warning; imports of torch and deepspeed go on."""


def arm() -> None:
    """Make sure that `meft_ds.plugin.install` sees DeepSpeed's engine module as soon as it is there.

    Safe to call any number of times, from any thread, before, during or after the import of deepspeed. Never raises:
    a failure is kept in `last_error` and logged once.
    """
    try:
        _hook.arm()
    except Exception as error:
        _remember(error)


class _PostImportHook:
    """A finder on `sys.meta_path` that calls `callback(module)` once, right after `module_name` has been executed.

    It finds nothing itself: it asks the finders behind it and wraps the loader of the spec that they return. The
    wrapper puts the real loader back before the module's code runs, so the module shows no trace of it later,
    and the finder leaves `sys.meta_path` when its work is done. If the import fails, it stays for the next try.
    """

    def __init__(self, module_name: str, callback: Callable[[ModuleType], None]) -> None:
        self.module_name = module_name
        self._callback = callback
        self._lock = threading.RLock()
        self._searching: set[int] = set()
        self._called_with: ModuleType | None = None

    def arm(self) -> None:
        """Wait for the module, or call back at once if it is there. Do nothing when already armed or done."""
        with self._lock:
            module = sys.modules.get(self.module_name)
            if module is None and self not in sys.meta_path:
                sys.meta_path.insert(0, self)
            if module is None or module is self._called_with:
                return
            if _is_initializing(module):
                _WatchedSpec.watch(module, self.fire)
                return
        # Outside the lock: the callback imports, and would otherwise hold our lock while waiting for an import lock.
        self.fire(module)

    def fire(self, module: ModuleType) -> None:
        """Call back unless that has been done for this very module, and leave `sys.meta_path`."""
        with self._lock:
            if module is self._called_with:
                return
            self._called_with = module
            if self in sys.meta_path:
                sys.meta_path.remove(self)
        self._callback(module)

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec that the finders behind this one give for `module_name`, with its loader wrapped; else None."""
        if fullname != self.module_name:
            return None
        thread = threading.get_ident()
        if thread in self._searching:
            # Another hook of our kind asked the whole of sys.meta_path from within its own find_spec.
            return None
        self._searching.add(thread)
        try:
            spec = self._find_behind(fullname, path, target)
        finally:
            self._searching.discard(thread)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _FiringLoader(spec.loader, self.fire)  # type: ignore[assignment]
        return spec

    def _find_behind(self, fullname: str, path: Any, target: ModuleType | None) -> ModuleSpec | None:
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in behind:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is not None:
                return spec
        return None


class _FiringLoader:
    """Stands in for a real loader until the module is executed; every other attribute is the real loader's."""

    def __init__(self, loader: Any, fire: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._fire = fire

    def __getattr__(self, name: str) -> Any:
        # "_loader" itself is looked up here only while the object is being copied or unpickled.
        if name in ("_loader", "_fire"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._fire(module)


class _WatchedSpec(ModuleSpec):
    """The spec of a module that is being executed right now: calls back when the import system marks it as done.

    There is no other notice of that end, because the real loader is already inside `exec_module`. The import system
    sets `spec._initializing = False` after success and after failure; after a failure the module is no longer
    in `sys.modules`.
    """

    @classmethod
    def watch(cls, module: ModuleType, fire: Callable[[ModuleType], None]) -> None:
        spec = module.__spec__
        assert spec is not None
        if isinstance(spec, cls):
            return
        spec.__dict__["_meft_watch"] = (module, fire, type(spec))
        spec.__class__ = cls

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__.get("_initializing", False))

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if value or "_meft_watch" not in self.__dict__:
            return
        module, fire, original_class = self.__dict__.pop("_meft_watch")
        self.__class__ = original_class
        if sys.modules.get(self.name) is module:
            fire(module)


def _is_initializing(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _install(engine_module: ModuleType) -> None:
    try:
        from meft_ds.plugin import install

        install(engine_module)
    except Exception as error:
        _remember(error)


def _remember(error: Exception) -> None:
    global last_error
    first = last_error is None
    last_error = error
    if first:
        import logging

        logging.getLogger("meft_ds").warning(
            'meft-ds could not hook into DeepSpeed, so a "meft_offload" block will have no effect (%s: %s). '
            "Runs without that block are not affected.",
            type(error).__name__,
            error,
        )


_hook = _PostImportHook(ENGINE_MODULE, _install)
