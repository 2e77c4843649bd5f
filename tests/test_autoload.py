# SPDX-License-Identifier: Apache-2.0
"""The import hook: it fires once, whatever is imported first, and leaves the import system as it was."""

import importlib
import importlib.util
import inspect
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any

import pytest

from meft_ds import autoload
from meft_ds.autoload import _PostImportHook

RunPython = Callable[..., CompletedProcess[str]]

NAME = "meft_ds_test_package.inner"


class Calls(list[ModuleType]):
    """A callback that records the modules it was given and whether they were complete."""

    def __call__(self, module: ModuleType) -> None:
        assert module.last_line == "done"
        self.append(module)


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def hook(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_PostImportHook]:
    """A hook, not yet armed, on a module of a small package in a temporary folder."""
    package = tmp_path / "meft_ds_test_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("import meft_ds_test_during\nlast_line = 'done'\n")
    (tmp_path / "meft_ds_test_during.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    meta_path = list(sys.meta_path)
    hook = _PostImportHook(NAME, calls)
    yield hook
    assert [f for f in sys.meta_path if not isinstance(f, _PostImportHook)] == [
        f for f in meta_path if not isinstance(f, _PostImportHook)
    ]
    if hook in sys.meta_path:
        sys.meta_path.remove(hook)
    for name in [n for n in sys.modules if n.startswith("meft_ds_test_")]:
        del sys.modules[name]


def test_hook_fires_once_after_the_module_is_complete(hook: _PostImportHook, calls: Calls) -> None:
    hook.arm()
    hook.arm()
    assert sys.meta_path.count(hook) == 1
    importlib.import_module("meft_ds_test_package")
    assert calls == []
    module = importlib.import_module(NAME)
    hook.arm()
    importlib.import_module(NAME)
    assert calls == [module]
    assert hook not in sys.meta_path


def test_hook_leaves_no_trace_on_the_module(hook: _PostImportHook, calls: Calls) -> None:
    hook.arm()
    module = importlib.import_module(NAME)
    assert type(module.__loader__) is SourceFileLoader
    assert type(module.__spec__) is ModuleSpec
    assert module.__spec__.loader is module.__loader__
    assert "last_line" in inspect.getsource(module)
    pickle.loads(pickle.dumps(module.__spec__.name))


def test_hook_fires_at_once_when_the_module_is_already_imported(hook: _PostImportHook, calls: Calls) -> None:
    module = importlib.import_module(NAME)
    hook.arm()
    hook.arm()
    assert calls == [module]
    assert hook not in sys.meta_path


def test_hook_armed_from_within_the_module_fires_at_its_end(
    hook: _PostImportHook, calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "meft_ds_test_during.py").write_text("import sys\nsys.meft_test_arm()\n")
    seen: list[int] = []

    def arm_twice() -> None:
        hook.arm()
        hook.arm()
        seen.append(len(calls))

    monkeypatch.setattr(sys, "meft_test_arm", arm_twice, raising=False)
    module = importlib.import_module(NAME)
    assert seen == [0]
    assert calls == [module]
    assert type(module.__spec__) is ModuleSpec
    assert module.__spec__._initializing is False


def test_hook_armed_from_within_a_module_that_fails_waits_for_the_next_try(
    hook: _PostImportHook, calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    during = tmp_path / "meft_ds_test_during.py"
    during.write_text("import sys\nsys.meft_test_arm()\nraise OSError('broken')\n")
    monkeypatch.setattr(sys, "meft_test_arm", hook.arm, raising=False)
    with pytest.raises(OSError, match="broken"):
        importlib.import_module(NAME)
    assert calls == []
    during.write_text("import sys\nsys.meft_test_arm()\n# a different length, so that the cached bytecode is stale\n")
    assert calls == [] and importlib.import_module(NAME) in calls


def test_failed_import_keeps_its_error_and_the_hook(hook: _PostImportHook, calls: Calls, tmp_path: Path) -> None:
    inner = tmp_path / "meft_ds_test_package" / "inner.py"
    inner.write_text("raise KeyError('mine')\n")
    hook.arm()
    with pytest.raises(KeyError, match="mine"):
        importlib.import_module(NAME)
    assert calls == [] and hook in sys.meta_path
    inner.write_text("last_line = 'done'  # a different length, so that the cached bytecode is stale\n")
    assert [importlib.import_module(NAME)] == calls


def test_find_spec_without_importing_behaves_as_before(hook: _PostImportHook, calls: Calls) -> None:
    hook.arm()
    spec = importlib.util.find_spec(NAME)
    assert spec is not None and spec.loader is not None and spec.origin is not None
    loader: Any = spec.loader
    assert spec.has_location and spec.cached and spec.origin.endswith("inner.py")
    assert loader.is_package(NAME) is False
    assert "last_line" in loader.get_source(NAME)
    assert loader.get_code(NAME) is not None
    assert loader.path == spec.origin
    assert calls == [] and hook in sys.meta_path
    assert importlib.util.find_spec("meft_ds_test_package.absent") is None


def test_module_made_from_spec_by_hand_fires(hook: _PostImportHook, calls: Calls) -> None:
    hook.arm()
    spec = importlib.util.find_spec(NAME)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    assert calls == [module]


def test_lazy_loader_fires_on_first_use(hook: _PostImportHook, calls: Calls) -> None:
    hook.arm()
    spec = importlib.util.find_spec(NAME)
    assert spec is not None and spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    assert calls == []
    assert module.last_line == "done"
    assert len(calls) == 1


def test_reload_works(hook: _PostImportHook, calls: Calls) -> None:
    hook.arm()
    module = importlib.import_module(NAME)
    assert importlib.reload(module) is module
    assert calls == [module]


def test_two_hooks_on_one_module_both_fire(hook: _PostImportHook, calls: Calls) -> None:
    others = Calls()
    other = _PostImportHook(NAME, others)
    hook.arm()
    other.arm()
    module = importlib.import_module(NAME)
    assert calls == [module] and others == [module]
    assert hook not in sys.meta_path and other not in sys.meta_path


def test_a_finder_that_asks_the_whole_meta_path_again_does_not_recurse(hook: _PostImportHook, calls: Calls) -> None:
    class Asking:
        """Like the hooks of other libraries: finds through importlib.util.find_spec, guarding against itself only."""

        busy = False

        def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
            if fullname != NAME or self.busy:
                return None
            self.busy = True
            try:
                return importlib.util.find_spec(fullname)
            finally:
                self.busy = False

    for position in (0, 1):
        asking = Asking()
        hook.arm()
        sys.meta_path.insert(position, asking)  # type: ignore[arg-type]
        try:
            module = importlib.import_module(NAME)
        finally:
            sys.meta_path.remove(asking)  # type: ignore[arg-type]
        assert calls[position:] == [module]
        del sys.modules[NAME]


def test_many_threads_fire_once(hook: _PostImportHook, calls: Calls) -> None:
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        hook.arm()
        importlib.import_module(NAME)
        hook.arm()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [sys.modules[NAME]]


def test_failing_install_is_logged_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(autoload, "last_error", None)
    monkeypatch.setitem(sys.modules, "meft_ds.plugin", None)
    autoload._install(ModuleType("engine"))
    autoload._install(ModuleType("engine"))
    assert isinstance(autoload.last_error, ImportError)
    assert len([r for r in caplog.records if "could not hook into DeepSpeed" in r.message]) == 1


def test_arm_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoload, "last_error", None)
    monkeypatch.setattr(autoload, "_hook", None)
    autoload.arm()
    assert isinstance(autoload.last_error, AttributeError)


FIRST = ["torch", "deepspeed", "deepspeed.runtime.engine", "transformers", "meft_ds", "accelerate"]

FAKE_INSTALL = """
import sys, types
plugin = types.ModuleType("meft_ds.plugin")
def install(module):
    assert hasattr(module, "DeepSpeedEngine") and hasattr(module, "MEMORY_OPT_ALLREDUCE_SIZE")
    print("installed", module.__name__)
plugin.install = install
sys.modules["meft_ds.plugin"] = plugin
"""


@pytest.mark.compat
@pytest.mark.parametrize("first", FIRST)
def test_installs_whatever_is_imported_first(run_python: RunPython, first: str) -> None:
    result = run_python(f"{FAKE_INSTALL}\nimport {first}\nimport deepspeed, meft_ds, torch\n")
    assert result.stdout.splitlines().count("installed deepspeed.runtime.engine") == 1


@pytest.mark.compat
def test_explicit_import_installs_where_autoload_is_off(run_python: RunPython) -> None:
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    without = run_python(f"{FAKE_INSTALL}\nimport torch, deepspeed\n", env=off)
    assert "installed" not in without.stdout
    for order in ("meft_ds, deepspeed", "deepspeed, meft_ds"):
        explicit = run_python(f"{FAKE_INSTALL}\nimport {order}\n", env=off)
        assert explicit.stdout.splitlines().count("installed deepspeed.runtime.engine") == 1


def test_importing_torch_loads_nothing_heavy_of_ours(run_python: RunPython) -> None:
    code = (
        "import torch, sys\n"
        "roots = ('meft_ds', 'deepspeed', 'pydantic')\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in roots))\n"
    )
    assert run_python(code).stdout.strip() == "['meft_ds', 'meft_ds.autoload']"


def test_importing_meft_ds_does_not_import_torch(run_python: RunPython) -> None:
    code = "import meft_ds, sys; print([m for m in ('torch', 'deepspeed', 'pydantic', 'numpy') if m in sys.modules])"
    assert run_python(code, env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}).stdout.strip() == "[]"


def test_broken_plugin_does_not_break_torch_or_deepspeed(run_python: RunPython) -> None:
    code = (
        "import sys; sys.modules['meft_ds.plugin'] = None\n"
        "import torch, deepspeed\n"
        "from meft_ds import autoload\n"
        "print(type(autoload.last_error).__name__, deepspeed.DeepSpeedEngine.__name__)\n"
    )
    result = run_python(code)
    assert result.stdout.splitlines()[-1] == "ModuleNotFoundError DeepSpeedEngine"
    assert result.stderr.count("meft-ds could not hook into DeepSpeed") == 1


def test_spawned_processes_arm_themselves(run_python: RunPython, tmp_path: Path) -> None:
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing, torch\n"
        "def armed():\n"
        "    import sys\n"
        "    return any(type(f).__name__ == '_PostImportHook' for f in sys.meta_path)\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(armed(), pool.apply(armed))\n"
    )
    assert run_python("", args=(str(script),)).stdout.strip() == "True True"
