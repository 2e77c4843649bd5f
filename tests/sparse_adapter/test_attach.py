# SPDX-License-Identifier: Apache-2.0
"""Adapters find their places in Hugging Face models, see padding, and leave a model as it was."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from meft_ds.offload.model.gradient_checkpointing import feed_checkpoints
from meft_ds.sparse_adapter.attach import ADAPTER_NAME, detach, find_adapters, find_ffns
from meft_ds.sparse_adapter.attach import attach as attach_bare
from tests.sparse_adapter.oracle import rows_grad
from tests.sparse_adapter.tiny import ARCHITECTURES, attach_device_rows, tiny_config, tiny_model

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_equals_its_base_at_step_0_and_then_trains(name: str) -> None:
    model = tiny_model(name)
    base = model(IDS, attention_mask=MASK).logits
    names = [n for n, _ in model.named_modules()]
    adapters = attach_device_rows(model)
    assert len(adapters) == 2 and [a.layer for a in adapters] == [0, 1]
    assert torch.equal(model(IDS, attention_mask=MASK).logits, base)

    for adapter in adapters:
        adapter.rows.weight[:, 32:].normal_(0, 0.1)  # type: ignore[attr-defined]
    model.train()
    model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
    for adapter in adapters:
        assert adapter.router.weight.grad is not None and adapter.router.weight.grad.abs().max() > 0
        assert rows_grad(adapter).abs().max() > 0
    assert any(ADAPTER_NAME in n for n, _ in model.named_parameters())
    assert sum(p.requires_grad for p in model.parameters()) == 2

    detach(model.eval())
    assert [n for n, _ in model.named_modules()] == names
    assert torch.equal(model(IDS, attention_mask=MASK).logits, base)


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_adapter_input_is_the_ffn_input_and_its_output_is_added(name: str) -> None:
    model = tiny_model(name, num_hidden_layers=1)
    (adapter,) = attach_device_rows(model, values=0.5)
    (place,) = find_adapters(model)
    module = model.get_submodule(place)
    seen = {}
    first = module.fc1 if name == "opt" else module
    last = module.fc2 if name == "opt" else module
    first.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    last.register_forward_hook(lambda m, args, out: seen.update(out=out))
    model(IDS)
    with_adapter = seen["out"]
    detach(model)
    bare = last(torch.relu(first(seen["x"]))) if name == "opt" else module(seen["x"])
    if isinstance(bare, tuple):  # mixture-of-experts blocks of transformers 4 return their router's logits too
        (with_adapter, _), (bare, _) = with_adapter, bare
    torch.testing.assert_close(with_adapter, bare + adapter(seen["x"]))


def test_left_and_right_padding_select_no_rows_and_do_not_change_a_sentence() -> None:
    model = tiny_model("llama")
    adapters = attach_device_rows(model, values=0.5)
    alone = model(IDS[:1, 3:]).logits[0]
    padded = model(IDS, attention_mask=MASK).logits[0, 3:]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)
    chosen = []
    choose = adapters[0]._choose
    adapters[0]._choose = lambda *a: chosen.append(choose(*a)) or chosen[-1]  # type: ignore[method-assign]
    model(IDS, MASK)  # positional
    mask = chosen[0][0].mask.view(2, 9, -1)
    assert not mask[0, :3].any() and mask[0, 3:].any(-1).all() and mask[1].any(-1).all()
    right = torch.flip(MASK, [1])
    model(input_ids=IDS, attention_mask=right)
    assert not chosen[1][0].mask.view(2, 9, -1)[0, 6:].any()


def test_mask_is_forgotten_after_the_forward_even_when_it_fails() -> None:
    model = tiny_model("llama")
    adapters = attach_device_rows(model)
    with pytest.raises(IndexError):
        model(IDS + 1000, attention_mask=MASK)
    tokens = []
    choose = adapters[0]._choose
    adapters[0]._choose = lambda *a: (tokens.append(a[2]), choose(*a))[1]  # type: ignore[method-assign]
    model(IDS)
    assert tokens == [None]


def test_masks_of_other_shapes_are_ignored_with_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    attach_device_rows(model)
    four = torch.zeros(2, 1, 9, 9)
    with caplog.at_level(logging.WARNING):
        model(IDS, attention_mask=four)
        model(IDS, attention_mask=four)
    assert sum("attention_mask" in r.message for r in caplog.records) == 1


def test_generate_with_a_cache_equals_generate_without() -> None:
    model = tiny_model("llama")
    attach_device_rows(model, values=0.5)
    given = {"attention_mask": MASK, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **given), model.generate(IDS, use_cache=False, **given))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_gradient_checkpointing_of_a_frozen_base_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    grads = []
    for on in (False, True):
        model = tiny_model(name, **({"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if name == "gpt2" else {}))
        adapters = attach_device_rows(model, values=0.5)
        if name == "opt":
            model.config.dropout = 0.0
            for m in model.modules():
                if isinstance(getattr(m, "dropout", None), float):
                    m.dropout = 0.0
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            feed_checkpoints(model)  # as an engine does
        model.train()
        model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
        grads.append([g for a in adapters for g in (a.router.weight.grad, rows_grad(a))])
    for plain, checkpointed in zip(*grads, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)


def test_router_and_keys_depend_on_seed_and_layer_only() -> None:
    made = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        model = tiny_model("llama")
        torch.set_rng_state(state)
        made.append([a.router.weight.clone() for a in attach_device_rows(model)])
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(made[0][0], made[1][0]) and not torch.equal(made[0][0], made[0][1])
    other = attach_device_rows(tiny_model("llama"), tiny_config(seed=1))
    assert not torch.equal(other[0].router.weight, made[0][0])


def test_selected_gates_start_at_order_one() -> None:
    adapters = attach_device_rows(tiny_model("llama"), tiny_config(rows=600, experts=100, experts_per_token=8))
    x = torch.randn(500, 32)
    top = adapters[0].router(x).topk(8, dim=1).values
    assert 0.7 < top.mean() < 1.4


def test_router_takes_the_models_dtype() -> None:
    adapters = attach_device_rows(tiny_model("llama").bfloat16())
    assert adapters[0].router.weight.dtype == torch.bfloat16


def test_a_copied_model_uses_its_own_adapters() -> None:
    for name in ("llama", "opt"):
        model = tiny_model(name)
        attach_device_rows(model, values=0.5)
        twin = copy.deepcopy(model)
        before = twin(IDS, attention_mask=MASK).logits
        for adapter in find_adapters(model).values():
            adapter.rows.weight.zero_()  # type: ignore[attr-defined]
        assert torch.equal(twin(IDS, attention_mask=MASK).logits, before)


def test_no_ffn_is_an_error_that_lists_module_names() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList(Step() for _ in range(3))

    with pytest.raises(ValueError, match=r"no feed-forward network found in Odd.*target_modules.*steps\.\\d\+"):
        find_ffns(Odd())
    with pytest.raises(ValueError, match=r"'nothing'.*model\.layers\.\\d\+\.mlp"):
        find_ffns(tiny_model("llama"), "nothing")
    assert [s.name for s in find_ffns(Odd(), r"steps\.\d+")] == ["steps.0", "steps.1", "steps.2"]
    assert find_ffns(Odd(), r"steps\.\d+")[0].d == 4


def test_target_modules_choose_layers() -> None:
    model = tiny_model("llama")
    assert [s.name for s in find_ffns(model, r"model\.layers\.1\.mlp")] == ["model.layers.1.mlp"]
    assert [s.name for s in find_ffns(model, [r".*\.0\.mlp", r".*\.1\.mlp"])] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    assert find_ffns(tiny_model("opt"), r"model\.decoder\.layers\.1")[0].pair
    with pytest.raises(ValueError, match="inside it"):
        find_ffns(model, r".*mlp.*")


def test_attaching_twice_is_an_error() -> None:
    model = tiny_model("llama")
    attach_device_rows(model)
    with pytest.raises(ValueError, match="already has"):
        attach_device_rows(model)


def test_forward_without_rows_says_what_is_missing() -> None:
    model = tiny_model("llama")
    attach_bare(model, tiny_config())
    with pytest.raises(RuntimeError, match="has no rows"):
        model(IDS)
