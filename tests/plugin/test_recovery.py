# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own tools on our checkpoints: they give the weights, or say by a file's name what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import zero_to_fp32

from tests.toy import ADAPTER, ds_config, make_engine, tiny_llama, train

BLOCKS: dict[str, dict[str, Any]] = {
    "subspace": {"subspace": {"dim": 8, "nonzeros": 2}},
    "tiles": {"sparse_matrix": {"density": 0.2, "block_size": 6, "warmup_steps": 1}},
}


def saved(folder: Path, block: dict[str, Any], **settings: Any) -> Any:
    engine = make_engine(ds_config(block=block, **settings))
    train(engine, 3)
    engine.save_checkpoint(str(folder), tag="t", client_state={"mine": 7})
    return engine


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", BLOCKS)
def test_zero_to_fp32_gives_the_weights_of_a_checkpoint(tmp_path: Path, method: str, precision: str) -> None:
    engine = saved(tmp_path, BLOCKS[method], precision=precision)
    expected = {name: t.float() for name, t in engine.module.state_dict().items()}
    found = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert found.keys() == expected.keys()
    assert all(t.dtype == torch.float32 and torch.equal(t, expected[name]) for name, t in found.items())
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(str(tmp_path), str(tmp_path / "out"))
    written = torch.load(tmp_path / "out" / "pytorch_model.bin")
    assert all(torch.equal(t, expected[name]) for name, t in written.items()) and written.keys() == expected.keys()
    model = zero_to_fp32.load_state_dict_from_zero_checkpoint(tiny_llama(seed=9), str(tmp_path))
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())


def test_zero_to_fp32_on_an_adapters_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    saved(tmp_path, {"sparse_adapter": dict(ADAPTER)})
    with pytest.raises(ValueError, match=r"ADAPTER_ROWS.*load_checkpoint_THEN_save_16bit_model.* is not a zero check"):
        zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))


def test_what_the_tools_need_takes_no_room_and_changes_nothing_about_resuming(tmp_path: Path) -> None:
    engine = saved(tmp_path, BLOCKS["subspace"])
    model_file, beside = tmp_path / "t" / "mp_rank_00_model_states.pt", tmp_path / "t" / "meft_optim_states.pt"
    weights = sum(t.numel() * t.element_size() for t in engine.module.state_dict().values())
    assert model_file.stat().st_size < 1.6 * weights, "weights are stored once"
    assert beside.stat().st_size < 4096
    again = make_engine(ds_config(block=BLOCKS["subspace"]), tiny_llama(seed=5))
    path, client_state = again.load_checkpoint(str(tmp_path))
    assert path is not None and client_state["mine"] == 7
    assert train(again, 2, first_seed=300) == train(engine, 2, first_seed=300)


def test_deepspeeds_own_engine_takes_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    engine = saved(tmp_path, BLOCKS["subspace"])
    plain = make_engine(ds_config(block=None), tiny_llama(seed=5))
    path, _ = plain.load_checkpoint(str(tmp_path), load_optimizer_states=False, load_lr_scheduler_states=False)
    assert path is not None
    found = plain.module.state_dict()
    assert all(torch.equal(t, found[name]) for name, t in engine.module.state_dict().items())


def test_a_block_without_an_adapter_saved_under_an_adapters_tag_can_be_read(tmp_path: Path) -> None:
    saved(tmp_path, {"sparse_adapter": dict(ADAPTER)})
    saved(tmp_path, BLOCKS["subspace"])
    assert (
        zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(tmp_path)).keys() == tiny_llama().state_dict().keys()
    )
