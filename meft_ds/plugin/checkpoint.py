# SPDX-License-Identifier: Apache-2.0
"""Saves and loads the units' state beside DeepSpeed's own files, in `<save_dir>/<tag>/meft/`.

One safetensors file per unit and rank, then one JSON manifest with every file's size and SHA-256. Files are written
to a temporary name and renamed; the manifest comes last, so a folder without one is an unfinished save. Nothing needs
pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from meft_ds.offload.partition import Ranks
from meft_ds.offload.wire import Unit

FORMAT = 1
FOLDER = "meft"
MANIFEST = "meft_state.json"


MethodState = tuple[dict[str, Any], dict[str, Tensor]]
_WEIGHTS = ("master", "original")  # state that belongs to the model's weights; the rest is the optimizer's


def save(
    folder: Path,
    units: list[Unit],
    ranks: Ranks,
    *,
    counters: dict[str, Any],
    about: dict[str, Any],
    methods: dict[str, MethodState] | None = None,
) -> None:
    """Write this rank's slices and, on rank 0 and last of all, the manifest. Collective.

    Args:
        folder: `<save_dir>/<tag>/meft`.
        units: whose state to write.
        ranks: who writes.
        counters: numbers that resuming needs (JSON types).
        about: what the state belongs to (method settings, sizes); must be equal when it is loaded.
        methods: what each method keeps beside its units, by its name; tensors are the first rank's.
    """
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # from here until the new one is written this save is unfinished
    ranks.barrier()
    files = {}
    for unit in (unit for unit in units if unit.saves_state):
        lo, hi, total = unit.state_range()
        name = f"{unit.name}.{ranks.rank:05d}-of-{ranks.world:05d}.safetensors"
        tensors = {key: t.contiguous() for key, t in unit.state_tensors().items()}
        _write(folder / name, lambda path, t=tensors: save_file(t, path))  # type: ignore[misc]
        files[name] = {"unit": unit.name, "lo": lo, "hi": hi, "total": total, **_fingerprint(folder / name)}
    shared = {}
    for unit in units if ranks.rank == 0 else ():
        if tensors := {key: t.contiguous() for key, t in unit.shared_tensors().items()}:
            name = f"{unit.name}.shared.safetensors"
            _write(folder / name, lambda path, t=tensors: save_file(t, path))  # type: ignore[misc]
            shared[name] = {"unit": unit.name, **_fingerprint(folder / name)}
    of_methods: dict[str, Any] = {}
    for method, (state, kept) in (methods or {}).items() if ranks.rank == 0 else ():
        of_methods[method] = {"state": state, "file": None}
        if kept:
            name = f"{method}.method.safetensors"
            _write(folder / name, lambda path, t=kept: save_file({k: v.contiguous() for k, v in t.items()}, path))  # type: ignore[misc]
            of_methods[method] |= {"file": name, **_fingerprint(folder / name)}
    gathered = _all_gather(files, ranks)
    if ranks.rank == 0:
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "about": about,
            "counters": counters,
            "units": {unit.name: {"wire": unit.wire, "scalars": unit.scalars()} for unit in units},
            "files": {name: entry for part in gathered for name, entry in part.items()},
            "shared": shared,
            "methods": of_methods,
        }
        write_json(folder / MANIFEST, manifest)
        for path in folder.glob("*.safetensors"):  # left by an earlier save of this tag with another world size
            if path.name not in {*manifest["files"], *shared, *(entry["file"] for entry in of_methods.values())}:
                path.unlink()
    ranks.barrier()


def verify(
    folder: Path,
    units: list[Unit],
    ranks: Ranks,
    *,
    about: dict[str, Any],
    accepts: Callable[[str, Any], bool] = lambda key, saved: False,
) -> dict[str, Any]:
    """Read the manifest and check it and every file this rank needs, before anything is changed. Collective.

    `accepts`: whether another value of `about` under a key, the checkpoint's, is no fault.

    Raises:
        ValueError: on every rank, naming the file or setting, when the state is missing, unfinished, damaged or
        belongs to
            another model or configuration.
    """
    problem, manifest = None, {}
    try:
        manifest = _read_manifest(folder)
        _check_about(manifest["about"], about, folder, accepts)
        _check_files(folder, manifest, units)
    except ValueError as e:
        problem = str(e)
    problems = [p for p in _all_gather(problem, ranks) if p is not None]
    if problems:
        raise ValueError(problems[0])
    return manifest


def load(folder: Path, manifest: dict[str, Any], units: list[Unit], *, moments: bool) -> None:
    """Fill the units' host state from a verified folder; any number of ranks may have written it.

    Args:
        moments: also take moments, row steps and counters; otherwise only the weights.
    """
    for unit in units:
        lo, hi, _ = unit.state_range()
        targets = {k: t for k, t in unit.state_tensors().items() if moments or k in _WEIGHTS}
        for name, entry in manifest["files"].items():
            if entry["unit"] == unit.name and entry["lo"] < hi and lo < entry["hi"]:
                _copy_overlap(folder / name, entry["lo"], entry["hi"], targets, lo, hi)
        if moments:
            for name in _shared_files(manifest, unit):
                unit.load_shared(_read_all(folder / name))
            unit.load_scalars(manifest["units"][unit.name]["scalars"])
        unit.after_load()


def method_state(folder: Path, manifest: dict[str, Any], method: str) -> MethodState | None:
    """What `save` was given under `methods`; None if it was nothing. From a verified folder."""
    entry = manifest.get("methods", {}).get(method)
    if entry is None:
        return None
    return entry["state"], {} if entry["file"] is None else _read_all(folder / entry["file"])


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    _write(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1, sort_keys=True)))


def write_text(path: Path, content: str) -> None:
    """Write text atomically."""
    _write(path, lambda temporary: temporary.write_text(content))


def _write(path: Path, writer: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256") if hasattr(hashlib, "file_digest") else _digest(f)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _digest(f: Any) -> Any:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"{folder.parent} holds no meft_offload state: it was saved by a run without the block")
    if not path.is_file():
        raise ValueError(f"{folder} is an unfinished save ({MANIFEST} is missing); load an earlier checkpoint")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
        _ = manifest["about"], manifest["files"], manifest["units"], manifest["counters"]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({type(e).__name__}: {e}); load an earlier checkpoint") from None
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, this version of meft-ds reads {FORMAT}")
    return manifest


def _check_about(
    saved: dict[str, Any], here: dict[str, Any], folder: Path, accepts: Callable[[str, Any], bool]
) -> None:
    differing = [k for k in sorted({*saved, *here}) if saved.get(k) != here.get(k) and not accepts(k, saved.get(k))]
    if differing:
        listed = "; ".join(f"{k}: checkpoint {saved.get(k)!r}, this run {here.get(k)!r}" for k in differing)
        raise ValueError(f"{folder} belongs to another model or configuration ({listed}); make the settings equal")


def _check_files(folder: Path, manifest: dict[str, Any], units: list[Unit]) -> None:
    for unit in units:
        lo, hi, total = unit.state_range()
        mine = [(n, e) for n, e in manifest["files"].items() if e["unit"] == unit.name]
        if not mine or any(e["total"] != total for _, e in mine):
            sizes = sorted({e["total"] for _, e in mine})
            raise ValueError(
                f"{folder}: unit {unit.name} has {sizes or 'no'} items, this run has {total}; make them equal"
            )
        for name, entry in mine:
            if entry["lo"] < hi and lo < entry["hi"]:
                _check_file(folder / name, entry)
        for name in _shared_files(manifest, unit):
            _check_file(folder / name, manifest["shared"][name])
    known = {unit.name for unit in units}
    # units that come with the checkpoint (a method's choice): whole, since nobody knows yet which part is this rank's
    for name, entry in {**manifest["files"], **manifest.get("shared", {})}.items():
        if entry["unit"] not in known:
            _check_file(folder / name, entry)
    for entry in manifest.get("methods", {}).values():
        if entry["file"] is not None:
            _check_file(folder / entry["file"], entry)


def _shared_files(manifest: dict[str, Any], unit: Unit) -> list[str]:
    return [name for name, entry in manifest.get("shared", {}).items() if entry["unit"] == unit.name]


def _read_all(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f"{path} cannot be read: {e}; load an earlier checkpoint") from None


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing; load an earlier checkpoint")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(
            f"{path} is truncated or changed: {path.stat().st_size} bytes, expected {entry['bytes']}; "
            "load an earlier checkpoint"
        )
    if _fingerprint(path)["sha256"] != entry["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}; load an earlier checkpoint")


def _copy_overlap(path: Path, file_lo: int, file_hi: int, targets: dict[str, Tensor], lo: int, hi: int) -> None:
    first, last = max(lo, file_lo), min(hi, file_hi)
    try:
        with safe_open(path, framework="pt") as f:
            for key, target in targets.items():
                part = f.get_slice(key)[first - file_lo : last - file_lo]
                target[first - lo : last - lo] = part.to(target.dtype) if key.startswith("exp_avg") else part
    except SafetensorError as e:
        raise ValueError(f"{path} cannot be read: {e}; load an earlier checkpoint") from None


def _all_gather(item: Any, ranks: Ranks) -> list[Any]:
    if ranks.world == 1:
        return [item]
    gathered: list[Any] = [None] * ranks.world
    dist.all_gather_object(gathered, item, group=ranks.group)
    return gathered
