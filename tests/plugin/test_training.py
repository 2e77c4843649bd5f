# SPDX-License-Identifier: Apache-2.0
"""What a step computes, against plain torch on the dense masked model."""

from typing import Any

import pytest
import torch

from tests.toy import ADAPTER, batch, ds_config, make_engine, oracle_model, state_of, tiny_llama, train

pytestmark = pytest.mark.compat


def block(**settings: Any) -> dict[str, Any]:
    return {"sparse_adapter": {**ADAPTER, **settings}}


def reference_steps(
    engine: Any, steps: int, rows: int = 4, clip: float = 0.5, first_seed: int = 100
) -> tuple[list[float], Any]:
    """The same training on the oracle with torch.optim.AdamW; returns losses and the oracles."""
    model, oracles = oracle_model(engine)
    params = [p for oracle in oracles for p in oracle.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    losses = []
    for n in range(steps):
        loss = model(**batch(first_seed + n % 4, rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, oracles


@pytest.mark.parametrize("selection", ["host", "device"])
def test_fifty_steps_of_dense_mode_equal_torch_adamw_on_the_dense_module(selection: str) -> None:
    engine = make_engine(ds_config(block=block(selection=selection)))
    expected, oracles = reference_steps(engine, 50)
    got = train(engine, 50, distinct=4)
    assert expected[-1] < expected[0]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    for adapter, oracle in zip(engine._meft_methods[0].adapters, oracles, strict=True):
        reference = torch.cat([oracle.keys, oracle.values], dim=1)
        torch.testing.assert_close(adapter.rows.master, reference.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(adapter.router.weight, oracle.router, atol=1e-5, rtol=1e-4)


def test_step_zero_equals_the_base_model_exactly() -> None:
    engine = make_engine(ds_config())
    inputs = batch(0)
    assert torch.equal(engine(**inputs).logits, tiny_llama()(**inputs).logits)


def test_one_global_norm_covers_rows_routers_and_trained_base_tensors() -> None:
    config = ds_config(block={**block(), "train": [r"norm\.weight$"]}, gradient_clipping=0.0)
    engine = make_engine(config)
    train(engine, 3)  # values have left zero, so keys and routers get gradients too
    model, oracles = oracle_model(engine)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("norm.weight"))
    trained = [p for p in model.parameters() if p.requires_grad] + [p for o in oracles for p in o.parameters()]
    model(**batch(55)).loss.backward()
    expected = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trained if p.grad is not None]))
    engine.backward(engine(**batch(55)).loss)
    engine.step()
    assert engine.get_global_grad_norm() == pytest.approx(expected.item(), rel=1e-4)


def test_learning_rate_follows_the_users_parameter_groups_and_scheduler() -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 2 else 1.0)
    config = ds_config()
    del config["optimizer"]
    engine = make_engine(config, model, optimizer=optimizer, lr_scheduler=scheduler)
    train(engine, 2)
    before = state_of(engine)
    assert engine.get_lr() == [0.0]
    train(engine, 1)
    after = state_of(engine)
    assert all(torch.equal(before[k], after[k]) for k in before if k.endswith(("master", "weight")))
    assert not all(torch.equal(before[k], after[k]) for k in before if k.endswith("exp_avg"))


def test_deepspeeds_own_scheduler_from_the_config_drives_the_learning_rate() -> None:
    schedule = {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.02, "warmup_num_steps": 4, "warmup_type": "linear"},
    }
    engine = make_engine(ds_config(scheduler=schedule))
    rates = []
    for _ in range(5):
        train(engine, 1)
        rates.append(engine.get_lr()[0])
    assert rates[0] < rates[2] < rates[4] == pytest.approx(0.02)


def test_empty_parameter_groups_and_a_scheduler_that_counts_them_work() -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}, {"params": [], "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s: 1.0, lambda s: 0.5])
    config = ds_config()
    del config["optimizer"]
    engine = make_engine(config, model, optimizer=optimizer, lr_scheduler=scheduler)
    losses = train(engine, 12, distinct=1)
    assert losses[-1] < losses[0] and len(engine.get_lr()) == 2


def test_a_bare_backward_gives_the_same_training_as_the_engines() -> None:
    engine, bare = make_engine(ds_config()), make_engine(ds_config())
    if not hasattr(type(engine), "scale"):
        pytest.skip("this DeepSpeed has no support for loss.backward()")
    for step in range(3):
        engine.backward(engine(**batch(step)).loss)
        bare(**batch(step)).loss.backward()
        engine.step()
        bare.step()
    plain, other = state_of(engine), state_of(bare)
    assert all(torch.equal(plain[k], other[k]) for k in plain)


def test_evaluation_in_the_middle_of_training_changes_nothing() -> None:
    def run(evaluate: bool) -> dict[str, torch.Tensor]:
        engine = make_engine(ds_config(block=block(optimizer="lazy", cache_rows=16, keys_per_token=5), gas=2))
        for step in range(4):
            engine.train()
            if evaluate:
                engine.backward(engine(**batch(step)).loss)
                engine.step()
                engine.eval()
                with torch.no_grad():
                    engine(**batch(1000 + step, rows=7))
                engine.train()
                engine.backward(engine(**batch(50 + step)).loss)
                engine.step()
            else:
                for seed in (step, 50 + step):
                    engine.backward(engine(**batch(seed)).loss)
                    engine.step()
        return state_of(engine)

    plain, interrupted = run(False), run(True)
    for name in plain:
        torch.testing.assert_close(interrupted[name], plain[name], atol=1e-6, rtol=1e-5, msg=name)


def test_counted_bytes_equal_the_formula_and_accumulation_saves_refetching() -> None:
    def window(gas: int) -> tuple[int, int, list[int]]:
        engine = make_engine(ds_config(precision="bf16", gas=gas))
        train(engine, 2)
        stats = engine.meft_stats()
        rows = stats["bytes"]["rows"]
        return rows["up"], rows["down"], stats["sparse_adapter"]["active_rows"]

    for gas in (1, 4):
        up, down, active = window(gas)
        assert up == down == sum(2 * 16 * u * 2 for u in active)
        assert all(0 < u <= 40 for u in active)
    refetching = 32 * window(1)[0]
    assert window(32)[0] * 8 <= refetching


def test_base_stays_frozen_except_for_what_train_names() -> None:
    engine = make_engine(ds_config(block={**block(), "train": [r"layers\.0\..*norm", "embed"]}))
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    train(engine, 2)
    changed = {n for n, p in engine.module.named_parameters() if not torch.equal(p, before[n])}
    base = {n for n in changed if "meft_adapter" not in n}
    assert base == {
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }


def test_one_line_at_the_start_says_what_is_active(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="meft_ds"):
        make_engine(ds_config(precision="bf16"))
    (line,) = [r.getMessage() for r in caplog.records if r.name == "meft_ds"]
    for part in ("sparse_adapter on 2 layers", "r=40", "N=7", "2,560 row parameters", "224 dense", "KiB down", "host"):
        assert part in line, part
