# SPDX-License-Identifier: Apache-2.0
"""Adapters go by the mask of the stack that they sit in, whichever module a program calls."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meft_ds.sparse_adapter.attach import attach, detach, find_adapters, find_ffns
from meft_ds.sparse_adapter.layer import SparseAdapter
from meft_ds.sparse_adapter.rows.source import DeviceRows
from tests.sparse_adapter.others import SEQ2SEQ, padded, text, tiny
from tests.sparse_adapter.tiny import attach_device_rows, tiny_config, tiny_model

MASK = padded()
LABELS = text(3, 6, seed=2)
SLOW = {"MBart", "Pegasus", "M2M100", "MT5", "UMT5", "LongT5"}


def watch(adapters: list[SparseAdapter]) -> list[list[Tensor | None]]:
    """What each adapter is told of tokens, filled by the forwards to come."""
    told: list[list[Tensor | None]] = [[] for _ in adapters]
    for adapter, mine in zip(adapters, told, strict=True):
        choose = adapter._choose
        adapter._choose = lambda x, p, tokens, choose=choose, mine=mine: (mine.append(tokens), choose(x, p, tokens))[1]
    return told


def same(told: Tensor | None, mask: Tensor) -> bool:
    return told is not None and torch.equal(told.view(mask.shape), mask)


def of_stacks(model: nn.Module, told: list[list[Tensor | None]]) -> dict[str, list[Tensor | None]]:
    """What the last forward told, by "encoder" and "decoder"."""
    found: dict[str, list[Tensor | None]] = {"encoder": [], "decoder": []}
    for (name, _), mine in zip(find_adapters(model).items(), told, strict=True):
        found["decoder" if ".decoder." in f".{name}" else "encoder"].append(mine[-1])
    return found


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in SEQ2SEQ])
def test_a_decoder_goes_by_its_own_mask_and_no_sentence_depends_on_its_neighbours_padding(name: str) -> None:
    model = tiny(name)
    told = watch(attach_device_rows(model, values=0.5))
    ids = text()
    both = model(input_ids=ids, attention_mask=MASK, labels=LABELS).logits[0]
    stacks = of_stacks(model, told)
    assert len(stacks["encoder"]) == len(stacks["decoder"]) == 2
    assert all(same(t, MASK) for t in stacks["encoder"]) and stacks["decoder"] == [None, None]
    alone = model(input_ids=ids[:1, :4], labels=LABELS[:1]).logits[0]
    torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-4)

    own = torch.ones(3, 6, dtype=torch.long)
    own[1, 2:] = 0
    model(input_ids=ids, attention_mask=MASK, decoder_input_ids=LABELS, decoder_attention_mask=own)
    assert all(same(t, own) for t in of_stacks(model, told)["decoder"])


def test_stacks_of_other_makes_in_one_model_go_by_their_own_masks() -> None:
    small: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    bert = hf.BertConfig(vocab_size=64, hidden_size=32, **small)
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = hf.EncoderDecoderModel(config).eval()
    told = watch(attach_device_rows(model, values=0.5))
    model(input_ids=text(), attention_mask=MASK, labels=LABELS)
    stacks = of_stacks(model, told)
    assert all(same(t, MASK) for t in stacks["encoder"])
    assert all(t is None or bool(t.all()) for t in stacks["decoder"])


def test_a_decoder_of_sound_goes_by_its_own_mask() -> None:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    width = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8}
    config = hf.WhisperConfig(**tokens, **width, **sizes, max_source_positions=5, max_target_positions=16)
    model = hf.WhisperForConditionalGeneration(config).eval()
    told = watch(attach_device_rows(model, values=0.5))
    sound, frames = torch.randn(3, 8, 10), torch.ones(3, 10, dtype=torch.long)
    own = torch.ones(3, 6, dtype=torch.long)
    own[1, 2:] = 0
    model(sound, attention_mask=frames, decoder_input_ids=LABELS, decoder_attention_mask=own)
    stacks = of_stacks(model, told)
    assert stacks["encoder"] == [None] and all(same(t, own) for t in stacks["decoder"])


class Outer(nn.Module):
    """A program's own wrapper, which gives the model what it likes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.inner(**batch)


@pytest.mark.parametrize("called", ["model", "inner", "wrapper", "peft"])
def test_padding_selects_nothing_whichever_module_is_called(called: str) -> None:
    model: Any = tiny_model("llama")
    if called == "peft":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    if called == "wrapper":
        model = Outer(model)
    told = watch(attach_device_rows(model, values=0.5))
    batch = {"input_ids": text(), "attention_mask": MASK}
    if called == "inner":
        model.model(**batch)
    elif called == "wrapper":
        model(batch)
    else:
        model(**batch)
    assert all(same(mine[-1], MASK) for mine in told)


def test_a_tower_of_pictures_does_not_go_by_the_mask_of_the_text_beside_it() -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = hf.CLIPConfig(
        text_config={**small, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    model = hf.CLIPModel(config).eval()
    given = {"input_ids": text(), "attention_mask": MASK, "pixel_values": torch.rand(3, 3, 8, 8)}
    adapters = attach_device_rows(model, None, 0.5)
    assert len(adapters) == 1, "the text's alone, unless others are asked for"
    (mine,) = watch(adapters)
    model(**given)
    assert same(mine[-1], MASK)

    detach(model)

    def rows(layer: int, keys: Tensor) -> DeviceRows:
        return DeviceRows(torch.cat([keys, keys], 1))

    told = watch(attach(model, tiny_config(), find_ffns(model, r".*\.mlp"), rows))
    model(**given)
    assert same(told[0][-1], MASK) and told[1][-1] is None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"q": nn.Linear(32, 32), "o": nn.Linear(32, 32)})
        self.fc1, self.fc2 = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return hidden_states + self.fc2(self.fc1(hidden_states).relu())


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer()])

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds, attention_mask)
        return inputs_embeds


def test_a_layer_that_is_called_by_itself_goes_by_what_it_is_given() -> None:
    model = Stack()
    (mine,) = watch(attach_device_rows(model, values=0.5))
    for given in (MASK, None):
        model.layers[0](torch.randn(3, 9, 32), given)
    assert same(mine[0], MASK) and mine[1] is None


class Additive(nn.Module):
    """Hands on what is to be added to scores, as Longformer does: 0 for real tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.stack(x, (1.0 - attention_mask) * -1e4)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_what_is_handed_on_to_be_added_is_no_mask(dtype: torch.dtype) -> None:
    model = Additive()
    (mine,) = watch(attach_device_rows(model, values=0.5))
    model(torch.randn(3, 9, 32), MASK.to(dtype) if dtype != torch.bool else MASK)
    assert same(mine[-1], MASK.to(mine[-1].dtype))  # type: ignore[union-attr]


def test_an_interrupted_forward_leaves_no_mask_behind() -> None:
    model = tiny_model("llama")
    adapters = attach_device_rows(model, values=0.5)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(text(), attention_mask=MASK)
    handle.remove()
    told = watch(adapters)
    model.model(text())
    assert [mine[-1] for mine in told] == [None, None]
    model(text())
    assert [mine[-1] for mine in told] == [None, None]


def test_a_mask_of_more_tokens_than_there_are_counts_only_with_a_cache(caplog: pytest.LogCaptureFixture) -> None:
    model = Stack()
    (mine,) = watch(attach_device_rows(model, values=0.5))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(torch.randn(3, 5, 32), MASK)
    assert mine == [None, None] and sum("does not fit" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("name", ["Bart", "T5"])
def test_an_encoder_decoder_generates_the_same_with_a_cache(name: str) -> None:
    model = tiny(name)
    attach_device_rows(model, values=0.5)
    given = {"attention_mask": MASK, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(text(), **given), model.generate(text(), use_cache=False, **given))


def test_left_padding_with_a_cache_selects_no_rows_in_any_step_of_generation() -> None:
    model = tiny_model("llama")
    told = watch(attach_device_rows(model, values=0.5))
    mask = MASK.flip(1)
    model.generate(text(), attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert same(told[0][0], mask)
    assert all(t is None or bool(t.all()) for t in told[0][1:])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_repeat_the_first_forwards_selection_with_its_mask(reentrant: bool) -> None:
    model = tiny_model("llama")
    adapters = attach_device_rows(model, values=0.5)
    told = watch(adapters)
    h = model.model.embed_tokens(text()).requires_grad_()

    def run(h: Tensor) -> Tensor:
        return model.model(inputs_embeds=h, attention_mask=MASK).last_hidden_state

    checkpoint(run, h, use_reentrant=reentrant).square().sum().backward()
    assert [len(mine) for mine in told] == [1, 1] and all(same(mine[0], MASK) for mine in told)


def test_an_evaluation_of_a_model_that_checkpoints_saves_nothing() -> None:
    model = tiny_model("llama").train()
    adapters = attach_device_rows(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with torch.no_grad():
        model(text(), attention_mask=MASK)
    assert [len(a._replay) for a in adapters] == [0, 0]
    model(text(), attention_mask=MASK)
    assert [len(a._replay) for a in adapters] == [1, 1]
