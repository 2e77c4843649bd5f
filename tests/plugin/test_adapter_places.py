# SPDX-License-Identifier: Apache-2.0
"""The adapter in an engine: models in eval mode, encoders, encoder-decoders, inner calls, and copies of the model."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import meft_ds
from tests.sparse_adapter.others import ENCODERS, PICTURES, SEQ2SEQ, padded, text, tiny
from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of, tiny_llama, train

BLOCK = {"sparse_adapter": {"rows": 60, "experts": 8, "experts_per_token": 3, "keys_per_token": 10}}
QUICK = ("Albert", "Bart")


def adapters_of(engine: Any) -> list[Any]:
    return engine._meft_methods[0].adapters


def test_rows_train_in_a_model_that_is_in_eval_mode() -> None:
    found = []
    for training in (True, False):
        engine = make_engine(ds_config(), tiny_llama().train(training))
        engine.module.train(training)
        found.append((train(engine, 4), state_of(engine), engine.meft_stats()))
    in_training, in_eval = found[0][2], found[1][2]
    assert not in_eval["bytes"].get("eval_rows")
    assert in_eval["sparse_adapter"]["active_rows"] == in_training["sparse_adapter"]["active_rows"]
    assert found[0][0] == found[1][0]
    assert all(torch.equal(t, found[1][1][name]) for name, t in found[0][1].items())


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_without_grad_writes_nothing_in_either_mode(training: bool) -> None:
    engine = make_engine(ds_config(gas=2))
    train(engine, 2)
    engine.module.train(training)
    rows = adapters_of(engine)[0].rows
    engine.backward(engine(**batch(0)).loss)
    tokens, load = rows.window_tokens, rows.expert_load.clone()
    counts = engine.optimizer.pipeline.bus.window.by_channel()
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            engine(**batch(1000, rows=7))
    after = engine.optimizer.pipeline.bus.window.by_channel()
    assert (rows.window_tokens, len(adapters_of(engine)[0]._replay)) == (tokens, 0)
    assert torch.equal(rows.expert_load, load)
    assert {k: n for k, n in after.items() if not k.startswith("eval_")} == counts
    assert after["eval_rows"]["up"] > 0 and after["eval_x"]["down"] > 0


@pytest.mark.parametrize("selection", ["host", "device"])
def test_an_evaluation_in_inference_mode_does_not_stand_in_the_way_of_training(selection: str) -> None:
    def run(guard: Any) -> list[float]:
        engine = make_engine(ds_config(block={"sparse_adapter": {**ADAPTER, "selection": selection}}))
        losses = []
        for seed in range(3):
            with guard():
                engine(**batch(1000 + seed, rows=7))
            losses += train(engine, 1, first_seed=seed)
        return losses

    assert run(torch.inference_mode) == run(torch.no_grad)


@pytest.mark.parametrize("mode", ["serial", "exact", "eager"])
def test_a_loss_without_a_backward_changes_neither_this_window_nor_the_next(mode: str) -> None:
    def run(validate: bool) -> tuple[dict[str, Tensor], Any]:
        engine = make_engine(ds_config(block={"sparse_adapter": dict(ADAPTER), "schedule": {"mode": mode}}))
        for seed in range(4):
            if validate:
                engine(**batch(1000 + seed)).loss.item()
            loss = engine(**batch(seed)).loss
            engine.backward(loss)
            rows = adapters_of(engine)[0].rows
            assert not rows._open, "a forward whose graph is gone must not keep the layer from being complete"
            engine.step()
        return state_of(engine), engine

    plain, validated = run(False)[0], run(True)[0]
    for name in plain:
        torch.testing.assert_close(validated[name], plain[name], atol=1e-6, rtol=1e-5, msg=name)


def _inputs(name: str) -> dict[str, Tensor]:
    if name in PICTURES:
        pictures = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pictures} | ({} if name == "CLIPVision" else {"labels": torch.tensor([0, 1, 2])})
    labels = text(3, 6, seed=2) if name in SEQ2SEQ else text()
    return {"input_ids": text(), "attention_mask": padded(), "labels": labels}


def _steps(engine: Any, name: str, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        out = engine(**_inputs(name))
        loss = (out.image_embeds - 1).square().mean() if name == "CLIPVision" else out.loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in (*ENCODERS, *PICTURES, *SEQ2SEQ)],
)
def test_encoders_and_encoder_decoders_train_and_resume(name: str, tmp_path: Path) -> None:
    engine = make_engine(ds_config(block=BLOCK, micro=3), tiny(name))
    losses = _steps(engine, name, 5)
    assert losses[-1] < 0.97 * losses[0]
    engine.save_checkpoint(str(tmp_path))
    again = make_engine(ds_config(block=BLOCK, micro=3), tiny(name))
    again.load_checkpoint(str(tmp_path))
    assert _steps(again, name, 2) == _steps(engine, name, 2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["exact", "eager"])
def test_a_layer_used_at_every_depth_trains_the_same_under_checkpointing(mode: str, reentrant: bool) -> None:
    """ALBERT's: its rows are sent when the last of their uses is through backward, not the first."""
    found = []
    for on in (False, True):
        block = {**BLOCK, "schedule": {"mode": mode}}
        model = tiny("Albert").train()
        if on:
            (layer,) = model.albert.encoder.albert_layer_groups[0].albert_layers
            forward = layer.forward

            def repeated(hidden: Tensor, mask: Tensor, forward: Any = forward, **rest: Any) -> Any:
                return checkpoint(partial(forward, **rest), hidden, mask, use_reentrant=reentrant)

            layer.forward = repeated
            model.enable_input_require_grads()
        engine = make_engine(ds_config(block=block, micro=3), model)
        engine.module.train()
        found.append(_steps(engine, "Albert", 4))
        assert all(entry.reliable for entry in engine.optimizer.pipeline._entries if "rows" in entry.unit.name)
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_a_sentence_of_an_encoder_decoder_does_not_depend_on_its_neighbours_padding() -> None:
    engine = make_engine(ds_config(block=BLOCK, micro=3), tiny("Bart").train())
    _steps(engine, "Bart", 4)
    given = _inputs("Bart")
    engine.eval()
    both = engine(**given).logits[0]
    alone = engine(input_ids=given["input_ids"][:1, :4], labels=given["labels"][:1]).logits[0]
    torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-4)


def test_a_program_that_calls_the_inner_model_trains_as_one_that_calls_the_engine() -> None:
    found = []
    few = {"rows": 400, "experts": 50, "experts_per_token": 2, "keys_per_token": 3}  # or padding would add none
    for inner in (False, True):
        engine = make_engine(ds_config(block={"sparse_adapter": few}))
        for seed in range(4):
            given = batch(seed)
            labels = given.pop("labels")
            if inner:
                hidden = engine.module.model(**given).last_hidden_state
                logits = torch.nn.functional.linear(hidden, engine.module.lm_head.weight)
            else:
                logits = engine(**given).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            engine.backward(loss)
            engine.step()
        found.append((state_of(engine), engine.meft_stats()["sparse_adapter"]["active_rows"]))
    assert found[0][1] == found[1][1]
    for name, t in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], t, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("selection", ["host", "device"])
def test_a_copy_of_the_model_has_its_own_rows_and_is_not_trained(
    selection: str, precision: str, tmp_path: Path
) -> None:
    block = {"sparse_adapter": {**ADAPTER, "selection": selection}}
    engine = make_engine(ds_config(block=block, precision=precision, gas=2))
    for seed in range(5):  # an update is under way, and a window is open
        engine.backward(engine(**batch(seed)).loss)
        engine.step()
    twin = copy.deepcopy(engine.module)
    given = {k: t for k, t in batch(9).items() if k != "labels"}

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model.eval()(**given).logits

    was = logits(twin)
    assert torch.equal(was, logits(engine.module))
    twin(**batch(3)).loss.backward()
    engine.module.train()
    train(engine, 2)
    assert torch.equal(logits(twin), was) and not torch.equal(logits(engine.module), was)
    assert list(twin.state_dict()) == list(engine.module.state_dict())
    out = twin.generate(given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=3, pad_token_id=0)
    assert out.shape[1] <= 8 + 3
    twin.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "meft_adapter.json").exists()
    meft_ds.save_adapter(twin, tmp_path)
    if precision == "fp32":
        fresh = tiny_llama()
        torch.testing.assert_close(logits(meft_ds.load_adapter(fresh, tmp_path)), was, atol=1e-5, rtol=1e-4)
    second = copy.deepcopy(twin)
    assert torch.equal(logits(second), was)
    engine.destroy()
    assert torch.equal(logits(twin), was)


def test_a_model_with_rows_that_ranks_share_refuses_to_be_pickled_and_names_the_way() -> None:
    engine = make_engine(ds_config())
    with pytest.raises(TypeError, match="save_adapter and load_adapter"):
        pickle.dumps(adapters_of(engine)[0])
