# SPDX-License-Identifier: Apache-2.0
"""Digests of losses, weights and files after ten steps, to show that a change of the code changes no result.

Before the change, then after it, on the same machine (kernels differ between machines, so no digest is kept here):

    python -m tests.goldens --write before.json
    python -m tests.goldens --against before.json [--only tiles bf16]

A cell is one training, named `block.precision.stage.ranks.mode`, in processes of its own that this one forks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from tests.ranks import free_port
from tests.toy import ADAPTER, batch, ds_config, make_engine, tiny_llama

STEPS, ROWS, GAS = 10, 8, 2
ADAPTER_BLOCK = {"sparse_adapter": dict(ADAPTER), "train": [r"layers\.0\..*norm"]}
PROJECTORS = {"nonzeros": 2, "projectors": "learned", "fit_steps": 2, "refit_interval": 4, "refit_threshold": 0.0}
TILES = {"density": 0.1, "block_size": 8, "warmup_steps": 2}
BLOCKS: dict[str, dict[str, Any]] = {
    "adapter": ADAPTER_BLOCK,
    "adapter_rows": {"sparse_adapter": {**ADAPTER, "optimizer": "lazy", "selection": "device"}},
    "adapter_compress": {"sparse_adapter": {**ADAPTER, "compress": {"dim": 8}}},
    "subspace": {"subspace": PROJECTORS},
    "subspace_random": {"subspace": {"nonzeros": 2, "projectors": "random", "gradient_side": "weight"}},
    "tiles": {"sparse_matrix": TILES},
    "tiles_magnitude": {"sparse_matrix": {"density": 0.2, "block_size": 4, "score": "magnitude"}},
    "adapter_subspace": {"sparse_adapter": dict(ADAPTER), "subspace": PROJECTORS},
    "adapter_tiles": {"sparse_adapter": dict(ADAPTER), "sparse_matrix": TILES},
}


def cells() -> list[str]:
    """All names; the serial order is run once per block, since exact must equal it everywhere."""
    full = [
        f"{block}.{precision}.stage{stage}.ranks{ranks}.exact"
        for block in BLOCKS
        for precision in ("fp32", "bf16", "fp16")
        for stage in (2, 3)
        for ranks in (1, 2)
    ]
    return full + [f"{block}.bf16.stage{stage}.ranks1.serial" for block in BLOCKS for stage in (0, 2)]


def train(cell: str, folder: Path) -> dict[str, Any]:
    """One rank's part of a cell: losses and norms of ten steps, then a checkpoint and an export into `folder`."""
    block, precision, stage, ranks, mode = cell.split(".")
    rank, world = int(os.environ["RANK"]), int(ranks.removeprefix("ranks"))
    config = ds_config(
        precision=precision, gas=GAS, micro=ROWS // world, block={"schedule": {"mode": mode}, **BLOCKS[block]}
    )
    config["zero_optimization"] = {"stage": int(stage.removeprefix("stage"))}
    if stage == "stage3":
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if precision == "fp16":
        config["fp16"] |= {"initial_scale_power": 8, "hysteresis": 1}
    engine = make_engine(config, tiny_llama())
    each = ROWS // world
    losses, norms = [], []
    for micro in range(STEPS * GAS):
        inputs = {k: t[rank * each : (rank + 1) * each] for k, t in batch(100 + micro, ROWS).items()}
        loss = engine(**inputs).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item().hex())
        norms.append(float(engine.get_global_grad_norm() or 0.0).hex())
    engine.save_checkpoint(str(folder / "checkpoint"))
    engine.save_16bit_model(str(folder / "export"), "model.bin")
    return {"losses": digest(losses), "norms": digest(norms)}


def digest(value: Any) -> str:
    """Of tensors by their bits, whatever file they stood in."""
    found = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                found.update(repr(key).encode())
                take(value[key])
        elif isinstance(value, list | tuple):
            for part in value:
                take(part)
        else:
            found.update(repr(value).encode() if isinstance(value, str | int | float | bool | None) else b"object")

    take(value)
    return found.hexdigest()[:16]


def digest_file(path: Path) -> str:
    """Of what a file says: names and times that differ from run to run are no part of it."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return digest({key: file.get_tensor(key) for key in file.keys()})
    if path.suffix in (".pt", ".bin"):
        content = torch.load(path, weights_only=False)
        if isinstance(content, dict):
            content.pop("ds_config", None)
        return digest(content)
    return ""


def run(cell: str) -> dict[str, str]:
    """Train a cell on its ranks; what they return and what their files hold, by name."""
    world = int(cell.split(".")[3].removeprefix("ranks"))
    with tempfile.TemporaryDirectory() as scratch:
        folder, port, pids = Path(scratch), free_port(), []
        for rank in range(world):
            if (pid := os.fork()) == 0:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
                os.environ.update(LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                log = os.open(folder / f"log{rank}", os.O_CREAT | os.O_WRONLY)
                os.dup2(log, 1)
                os.dup2(log, 2)
                try:
                    (folder / f"rank{rank}.json").write_text(json.dumps(train(cell, folder)))
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
        found: dict[str, str] = {}
        for rank in range(world):
            result = folder / f"rank{rank}.json"
            if not result.exists():
                return {"failed": (folder / f"log{rank}").read_text(errors="replace").strip().splitlines()[-1]}
            found |= {f"{key} of rank {rank}": value for key, value in json.loads(result.read_text()).items()}
        for path in sorted(path for path in folder.glob("*/**/*") if path.is_file()):
            found[str(path.relative_to(folder))] = digest_file(path)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, help="write the digests to this file")
    parser.add_argument("--against", type=Path, help="compare with the digests in this file")
    parser.add_argument("--only", nargs="*", default=[], help="cells whose name has all these words between its dots")
    parser.add_argument("--list", action="store_true", help="print the cells' names")
    options = parser.parse_args()
    chosen = [cell for cell in cells() if all(word in cell.split(".") for word in options.only)]
    if options.list or not chosen:
        print("\n".join(chosen) or "no such cell")
        return not chosen

    from tests.forked import preload

    preload()
    before = json.loads(options.against.read_text()) if options.against else {}
    found: dict[str, dict[str, str]] = {}
    different = 0
    for cell in chosen:
        began = time.monotonic()
        found[cell] = run(cell)
        here, was = found[cell], before.get(cell, {}) if options.against else found[cell]
        names = [name for name in sorted({*here, *was}) if here.get(name) != was.get(name)]
        different += bool(names)
        said = f"differs: {', '.join(names)}" if names else here.get("failed", "equal" if options.against else "done")
        print(f"{cell:45} {time.monotonic() - began:5.1f} s  {said}", flush=True)
        if names and "failed" in here:
            print(here["failed"])
    if options.write:
        options.write.write_text(json.dumps(found, indent=1))
    print(f"{len(chosen)} cells, {different} different")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
