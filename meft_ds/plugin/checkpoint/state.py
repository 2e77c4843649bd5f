# SPDX-License-Identifier: Apache-2.0
"""Saves and loads the units' state beside DeepSpeed's own files, in `<save_dir>/<tag>/meft/`.

There is one safetensors file per unit and rank. One JSON manifest has the size and SHA-256 of every file, of
DeepSpeed's too, and a checksum of its own. The manifest comes last (`transaction`), so a folder without one is an
unfinished save. Nothing of ours needs pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from meft_ds import files
from meft_ds.offload.ranks import Ranks
from meft_ds.offload.unit import MOMENTS, Unit
from meft_ds.plugin.checkpoint.transaction import FOLDER, MANIFEST, FileEntry, Manifest, Saving, finish, read_sealed

FORMAT = 2

MethodState = tuple[dict[str, Any], dict[str, Tensor]]
_LONGEST_TAG = 4096  # bytes, as of a path


def save(
    saving: Saving,
    units: list[Unit],
    *,
    counters: dict[str, Any],
    about: dict[str, Any],
    methods: dict[str, MethodState],
    trained_base: Sequence[str] = (),
) -> None:
    """Write this rank's slices and, on rank 0 and last of all, the manifest. Collective.

    Args:
        saving: where to, and who writes; DeepSpeed has written its files.
        units: whose state to write.
        counters: numbers that resuming needs (JSON types).
        about: what the state belongs to (method settings, sizes); must be equal when it is loaded.
        methods: what each method keeps beside its units, by its name; tensors are the first rank's.
        trained_base: names of the base's tensors that an adapter file needs; only who exports reads them.

    Raises:
        RuntimeError: on every rank, when a file cannot be written; a checkpoint of the same tag is as it was then.
    """
    folder, ranks, first = saving.folder, saving.ranks, saving.ranks.rank == 0
    ours: dict[str, FileEntry] = {}
    with saving.attempt(folder):
        for unit in (unit for unit in units if unit.saves_state):
            lo, hi, total = unit.state_range()
            name = f"{unit.name}.{ranks.rank:05d}-of-{ranks.world:05d}.safetensors"
            found = _write(saving, name, unit.state_tensors())
            ours[name] = {"unit": unit.name, "lo": lo, "hi": hi, "total": total, **found}
        for unit in units if first else ():
            if tensors := unit.shared_tensors():
                ours[_shared(unit)] = {"unit": unit.name, **_write(saving, _shared(unit), tensors)}
        for method, (_, kept) in methods.items() if first else ():
            if kept:
                ours[_kept(method)] = {"unit": method, **_write(saving, _kept(method), kept)}
    gathered = saving.agree((ours, saving.of_deepspeed))
    if first:
        saving.complete(
            {
                "format": FORMAT,
                "about": about,
                "counters": counters,
                "units": {unit.name: unit.scalars() for unit in units},
                "trained_base": list(trained_base),
                "methods": {method: numbers for method, (numbers, _) in methods.items()},
                "files": {name: entry for mine, _ in gathered for name, entry in mine.items()},
                "deepspeed": {name: entry for _, theirs in gathered for name, entry in theirs.items()},
            }
        )
    saving.agree()


def verify(
    folder: Path,
    units: list[Unit],
    ranks: Ranks,
    *,
    about: dict[str, Any],
    accepts: Callable[[str, Any], bool] = lambda key, saved: False,
) -> Manifest:
    """Read the manifest and check it and every file this rank needs, before anything is changed. Collective.

    `accepts` gets a key of `about` and the checkpoint's value, which differs, and says whether that is no fault.

    Raises:
        ValueError: on every rank, naming the file or setting, when the state is missing, unfinished, damaged or
            belongs to another model or configuration.
    """
    problem, manifest = None, None
    if ranks.rank == 0 and folder.is_dir():
        try:
            finish(folder)
        except OSError as e:
            problem = f"{folder} needs files renamed, which its save was killed before: {e}"
    ranks.barrier()
    try:
        manifest = read_manifest(folder)
        _check_about(manifest["about"], about, folder, accepts)
        _check_files(folder, manifest, units)
        for name, entry in manifest["deepspeed"].items() if ranks.rank == 0 else ():
            check_entry(folder.parent / name, entry)
    except (ValueError, OSError) as e:
        problem = problem or str(e)
    except (AttributeError, KeyError, TypeError, RecursionError) as e:  # a whole manifest that we did not write
        problem = problem or f"{folder / MANIFEST} is damaged ({e!r}); load an earlier checkpoint"
    problems = [p for p in ranks.gather(problem) if p is not None]
    if problems:
        raise ValueError(problems[0])
    assert manifest is not None
    return manifest


def load(folder: Path, manifest: Manifest, units: list[Unit], *, moments: bool) -> None:
    """Fill the units' host state from a verified folder; any number of ranks may have written it.

    Args:
        moments: also take moments, row steps and counters; otherwise only the weights.
    """
    for unit in units:
        lo, hi, _ = unit.state_range()
        targets = {k: t for k, t in unit.state_tensors().items() if moments or k in unit.weight_state}
        for name, entry in manifest["files"].items():
            if entry["unit"] == unit.name and "lo" in entry and entry["lo"] < hi and lo < entry["hi"]:
                _copy_overlap(folder / name, entry["lo"], entry["hi"], targets, lo, hi)
        if moments:
            if _shared(unit) in manifest["files"]:
                unit.load_shared(_read_all(folder / _shared(unit)))
            unit.load_scalars(manifest["units"][unit.name])
        unit.after_load()


def method_state(folder: Path, manifest: Manifest, method: str) -> MethodState | None:
    """Return what `save` was given for a method, from a verified folder; None if it was nothing."""
    if method not in manifest["methods"]:
        return None
    kept = _read_all(folder / _kept(method)) if _kept(method) in manifest["files"] else {}
    return manifest["methods"][method], kept


def latest_tag(load_dir: Path) -> str | None:
    """Return the tag that `latest` names; None without such a file.

    Raises:
        ValueError: naming the checkpoints that there are, when there is no such folder; and when `latest` is no file.
    """
    latest = load_dir / "latest"
    try:
        tag = files.read_bytes(latest, _LONGEST_TAG).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    if not tag or "\0" in tag or not (load_dir / tag).is_dir():
        complete = sorted(path.parent.parent.name for path in load_dir.glob(f"*/{FOLDER}/{MANIFEST}"))
        raise ValueError(
            f"{latest} is damaged: it names {tag!r}, which is no folder in {load_dir}; pass tag= one of the "
            f"checkpoints there ({', '.join(complete) or 'none'}), or correct the file"
        )
    return tag


def _write(saving: Saving, name: str, tensors: dict[str, Tensor]) -> files.Fingerprint:
    return saving.write(
        saving.folder / name, lambda path: save_file({k: t.contiguous() for k, t in tensors.items()}, path)
    )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest in `<save_dir>/<tag>/meft/`. Raise ValueError, saying what is wrong, for anything else."""
    path = folder / MANIFEST
    if not folder.parent.is_dir():
        raise ValueError(f"{folder.parent} does not exist: there is no checkpoint of that tag")
    if not folder.is_dir():
        raise ValueError(f"{folder.parent} holds no meft_offload state: it was saved by a run without the block")
    try:
        manifest = read_sealed(path)
    except FileNotFoundError:
        raise ValueError(
            f"{folder} is an unfinished save ({MANIFEST} is missing); load an earlier checkpoint"
        ) from None
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}); load an earlier checkpoint") from None
    version = manifest.get("format")
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


def _check_files(folder: Path, manifest: Manifest, units: list[Unit]) -> None:
    """Check the files that this rank reads."""
    if not all(isinstance(numbers, dict) for numbers in [*manifest["units"].values(), *manifest["methods"].values()]):
        raise TypeError("units and methods")
    mine = {unit.name: unit.state_range() for unit in units}
    for name, (_, _, total) in mine.items():
        sizes = {entry["total"] for entry in manifest["files"].values() if entry["unit"] == name and "lo" in entry}
        if sizes != {total}:
            raise ValueError(
                f"{folder}: unit {name} has {sorted(sizes) or 'no'} items, this run has {total}; make them equal"
            )
    for name, entry in manifest["files"].items():
        # of units that come with the checkpoint (a method's choice) nobody knows yet which part is this rank's
        lo, hi, _ = mine.get(entry["unit"], (0, 2**63, 0))
        if "lo" not in entry or (entry["lo"] < hi and lo < entry["hi"]):
            check_entry(folder / name, entry)


def _shared(unit: Unit) -> str:
    return f"{unit.name}.shared.safetensors"


def _kept(method: str) -> str:
    return f"{method}.method.safetensors"


def _read_all(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f"{path} cannot be read: {e}; load an earlier checkpoint") from None


def check_entry(path: Path, entry: files.Fingerprint) -> None:
    """Raise ValueError when a file is not the one that the manifest means."""
    try:
        size = files.check_file(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is missing; load an earlier checkpoint") from None
    if size != entry["bytes"]:
        raise ValueError(
            f"{path} is truncated or changed: {size} bytes, expected {entry['bytes']}; load an earlier checkpoint"
        )
    if files.fingerprint(path)["sha256"] != entry["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}; load an earlier checkpoint")


def _copy_overlap(path: Path, file_lo: int, file_hi: int, targets: dict[str, Tensor], lo: int, hi: int) -> None:
    first, last = max(lo, file_lo), min(hi, file_hi)
    try:
        # safetensors would slice onto the program's default device
        with torch.device("cpu"), safe_open(path, framework="pt") as f:
            for key, target in targets.items():
                part = f.get_slice(key)[first - file_lo : last - file_lo]
                target[first - lo : last - lo] = part.to(target.dtype) if key in MOMENTS else part
    except SafetensorError as e:
        raise ValueError(f"{path} cannot be read: {e}; load an earlier checkpoint") from None
