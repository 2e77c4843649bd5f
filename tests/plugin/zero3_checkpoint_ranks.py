# SPDX-License-Identifier: Apache-2.0
"""What ranks of test_zero3.py do with checkpoints and with models made under `zero.Init`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from tests.plugin.zero3_ranks import METHODS, ONE_OF_EACH, ROWS, destroyed, digest, engine_for, train
from tests.toy import batch, ds_config, tiny_llama


def init(folder: Path) -> dict[str, Any]:
    """A model made under zero.Init trains as one that was partitioned later."""
    deepspeed.init_distributed("gloo", verbose=False)
    importlib.import_module("torch._dynamo")  # cannot be imported under zero.Init, which replaces torch's constructors
    found: dict[str, Any] = {}
    config = ds_config(micro=ROWS // dist.get_world_size(), block=None)
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    for method in ONE_OF_EACH:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = tiny_llama()
        assert all(p.numel() == 0 for p in model.parameters())
        plain = tiny_llama(seed=1)
        with deepspeed.zero.GatheredParameters(list(model.parameters())):  # HF initialises what it finds whole only
            plain.load_state_dict(model.state_dict())
        for made, start in (("init", model), ("later", plain)):
            with destroyed(engine_for(method, 3, model=start)) as engine:
                found[f"{method} {made}"] = {"losses": train(engine, 5), "digest": digest(engine)}
    return found


def files(folder: Path, *, only: tuple[str, ...] = tuple(METHODS)) -> dict[str, Any]:
    """Checkpoints of stages 2 and 3 loaded into both, the 16-bit model, tiles and adapters of stage 3."""
    import meft_ds

    found: dict[str, Any] = {}
    for method in only:
        name = method.replace(" ", "_")
        for saved in (2, 3):
            gather = {"stage3_gather_16bit_weights_on_model_save": True}
            with destroyed(engine_for(method, saved, zero=gather)) as engine:
                train(engine, 4)
                at = folder / f"{name}{saved}"
                engine.save_checkpoint(str(at), tag="t")
                found[f"{method} {saved} saves"] = bool(engine.save_16bit_model(str(at)))
                if "tiles" in method:
                    meft_ds.save_tiles(engine, at / "tiles.safetensors")
                if "adapter" in method:
                    meft_ds.save_adapter(engine, at / "adapter")
                engine.eval()
                with torch.no_grad():
                    logits = engine(**{k: t for k, t in batch(7).items() if k != "labels"}).logits
                if dist.get_rank() == 0:
                    torch.save(logits, at / "logits.pt")
                engine.train()
                found[f"{method} {saved}"] = {"losses": train(engine, 4, first=4), "digest": digest(engine)}
            for loaded in (2, 3):
                with destroyed(engine_for(method, loaded, model=tiny_llama(seed=9))) as engine:
                    assert engine.load_checkpoint(str(folder / f"{name}{saved}"), tag="t")[0] is not None
                    found[f"{method} {saved} to {loaded}"] = {
                        "losses": train(engine, 4, first=4),
                        "digest": digest(engine),
                    }
    return found


def leg(folder: Path, *, stage: int, first: int, steps: int) -> dict[str, Any]:
    """One part of an elastic run: load what another number of ranks saved, but for the first part; train, save."""
    found: dict[str, Any] = {}
    for method in METHODS:
        name = method.replace(" ", "_")
        with destroyed(engine_for(method, stage, model=tiny_llama(seed=9 if first else 0))) as engine:
            if first:
                assert engine.load_checkpoint(str(folder / name), tag=str(first))[0] is not None
            found[method] = train(engine, steps, first=first)
            engine.save_checkpoint(str(folder / name), tag=str(first + steps))
    return found


def again(folder: Path) -> dict[str, Any]:
    """Engines on one partitioned model, one after another."""
    found: dict[str, Any] = {}
    for method in ONE_OF_EACH:
        model, losses = tiny_llama(), []
        for _ in range(2):
            with destroyed(engine_for(method, 3, model=model)) as engine:
                losses += train(engine, 6)
            if "adapter" in method:
                from meft_ds.sparse_adapter.attach import detach

                detach(model)
        found[method] = losses
    return found
