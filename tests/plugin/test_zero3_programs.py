# SPDX-License-Identifier: Apache-2.0
"""What programs do with a stage 3 engine between forward, backward and step: save, gather, take hooks off, generate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import Forge
from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of

BLOCKS: dict[str, dict[str, Any]] = {
    "adapter and norms": {"sparse_adapter": dict(ADAPTER), "train": ["norm"]},
    "subspace": {"subspace": {"dim": 8, "nonzeros": 2, "projectors": "random"}},
    "tiles": {"sparse_matrix": {"density": 0.2, "block_size": 6, "warmup_steps": 2}},
}
PROGRAMS = ("save in mid-window", "gather in mid-window", "hooks off and on", "after an exception")


@pytest.mark.slow
def test_programs_that_save_gather_or_generate_in_mid_window_train_as_others(forge: Forge, tmp_path: Path) -> None:
    _differing_in(forge, tmp_path, *BLOCKS)


def test_a_program_that_saves_gathers_or_generates_in_mid_window_trains_as_others(forge: Forge, tmp_path: Path) -> None:
    _differing_in(forge, tmp_path, "subspace")


def _differing_in(forge: Forge, folder: Path, *blocks: str) -> None:
    (found,) = forge.results(check, folder, world=1, blocks=blocks)
    assert found == dict.fromkeys(found, []) and len(found) == len(blocks) * len(PROGRAMS)


def check(folder: Path, blocks: list[str]) -> dict[str, list[str]]:
    """Return, for each block and program, what differs from a program that only trains."""
    found = {}
    for name in blocks:
        expected = run(name, None, folder)
        for program in PROGRAMS:
            got = run(name, program, folder)
            keys = {key for key in expected if not torch.equal(expected[key], got[key])}
            found[f"{name}: {program}"] = sorted(keys) + sorted(expected.keys() ^ got.keys())
        assert not torch.equal(expected["losses"][0], expected["losses"][-2]), "weights must have changed"
    return found


def run(name: str, program: str | None, folder: Path) -> dict[str, Any]:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0 if name == "subspace" else 20}
    engine = make_engine(ds_config(block=BLOCKS[name], zero_optimization=zero, gas=2))
    losses = []
    for micro in range(10):
        inputs = batch(micro % 2)
        if program == "after an exception":
            interrupted_forward(engine)
        loss = engine(**inputs).loss
        between(engine, program, folder / f"{name[:2]}{micro}")
        engine.backward(loss)
        between(engine, program, folder / f"{name[:2]}{micro}b")
        engine.step()
        between(engine, program, folder / f"{name[:2]}{micro}s")
        losses.append(loss.detach())
    state = state_of(engine)
    whole = engine._zero3_consolidated_16bit_state_dict()
    engine.destroy()
    return {**state, **(whole or {}), "losses": torch.stack(losses)}


def between(engine: Any, program: str | None, folder: Path) -> None:
    import deepspeed

    if program == "save in mid-window":
        engine.save_checkpoint(str(folder))
        engine.save_16bit_model(str(folder))
    elif program == "gather in mid-window":
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            copy.deepcopy([p.data for p in engine.module.parameters()])
        for p in engine.module.parameters():
            with deepspeed.zero.GatheredParameters(p):
                assert p.numel() > 0
    elif program == "hooks off and on":
        generate(engine)


def generate(engine: Any) -> None:
    """As trl does in stage 3 (`unwrap_model_for_generation`), which also works where it is not installed."""
    import deepspeed

    was = engine.module.training
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        hooks = engine.optimizer.parameter_offload
        for p in hooks.module.parameters():
            p.ds_active_sub_modules.clear()
        for hook in [*hooks.forward_hooks, *hooks.backward_hooks]:
            hook.remove()
        hooks.forward_hooks, hooks.backward_hooks = [], []
        engine.module.generate(batch(0)["input_ids"], max_new_tokens=2, do_sample=False, pad_token_id=0)
        if not hooks.param_coordinator.is_invalid_trace():
            hooks.param_coordinator._invalidate_trace()
        hooks._register_deepspeed_module(hooks.module)
    engine.module.train(was)


def interrupted_forward(engine: Any) -> None:
    class Stop(Exception):
        pass

    def stop(module: Any, args: Any) -> None:
        raise Stop

    handle = engine.module.model.layers[1].register_forward_pre_hook(stop)
    with torch.no_grad(), pytest.raises(Stop):
        engine(**batch(0))
    handle.remove()
    engine._zero3_consolidated_16bit_state_dict()
