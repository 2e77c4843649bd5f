# SPDX-License-Identifier: Apache-2.0
"""FFNs are found by the shapes of their layers; what is none is refused at the start, with names that would do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meft_ds.sparse_adapter.attach import attach, detach, find_adapters, find_ffns
from meft_ds.sparse_adapter.discover import _candidates
from tests.sparse_adapter.oracle import rows_grad
from tests.sparse_adapter.others import ENCODERS, PICTURES, SEQ2SEQ, padded, text, tiny
from tests.sparse_adapter.tiny import attach_device_rows, tiny_config, tiny_model

PLACES = {
    "Bert": r"bert.encoder.layer.0 intermediate.dense output.dense",
    "Electra": r"electra.encoder.layer.0 intermediate.dense output.dense",
    "DebertaV2": r"deberta.encoder.layer.0 intermediate.dense output.dense",
    "Albert": r"albert.encoder.albert_layer_groups.0.albert_layers.0 ffn ffn_output",
    "DistilBert": r"distilbert.transformer.layer.0.ffn",
    "ViT": r"vit.layers.0.mlp",
    "CLIPVision": r"vision_model.encoder.layers.0.mlp",
    "Bart": r"model.encoder.layers.0 fc1 fc2",
    "T5": r"encoder.block.0.layer.1.DenseReluDense",
    "SwitchTransformers": r"encoder.block.0.layer.1.mlp",
}


@pytest.mark.parametrize("name", PLACES)
def test_ffns_are_found_in_encoders_and_encoder_decoders(name: str) -> None:
    sites = find_ffns(tiny(name))
    first = sites[0]
    assert " ".join(filter(None, [first.name, first.first, first.last])) == PLACES[name]
    assert {site.d for site in sites} == {32}
    assert len(sites) == (4 if name in SEQ2SEQ else 1 if name == "Albert" else 2)


@pytest.mark.parametrize("name", ["Bert", "Albert", "ViT"])
def test_the_adapter_reads_the_ffns_input_and_adds_to_its_last_layer(name: str) -> None:
    model = tiny(name)
    given = {"pixel_values": torch.rand(3, 3, 8, 8)} if name in PICTURES else {"input_ids": text()}
    base = model(**given).logits
    adapter = attach_device_rows(model)[-1]
    assert torch.equal(model(**given).logits, base), "values are zero at the start"
    site = find_ffns(model)[-1]
    adapter.rows.weight[:, 32:].normal_(0, 0.5)  # type: ignore[attr-defined]
    seen: dict[str, Tensor] = {}
    first, last = site.module.get_submodule(site.first), site.module.get_submodule(site.last)
    first.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    last.register_forward_hook(lambda m, args, out: seen.update(given=args[0], out=out))
    model(**given)
    with_adapter, x, inside = seen["out"], seen["x"], seen["given"]
    detach(model)
    torch.testing.assert_close(with_adapter, last(inside) + adapter(x))


def test_a_layer_that_is_used_at_every_depth_gets_the_gradients_of_all_its_uses() -> None:
    """ALBERT's, against the same function with a copy of the layer and its adapter for each depth."""
    shared = tiny("Albert")
    (adapter,) = attach_device_rows(shared, values=0.5)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    layer = shared.albert.encoder.albert_layer_groups[0].albert_layers[0]
    uses = []
    layer.ffn.register_forward_pre_hook(lambda m, args: uses.append(args[0]))
    layer.ffn_output.register_forward_hook(lambda m, args, out: uses.append(out))
    h = layer(layer(layer(x)))
    grads = torch.autograd.grad(h.square().sum(), uses[1::2], retain_graph=True)
    h.square().sum().backward()
    total = rows_grad(adapter).clone()
    adapter.rows.grad = None  # type: ignore[attr-defined]
    for at, grad in zip(uses[::2], grads, strict=True):
        adapter(at.detach()).backward(grad)
    assert len(grads) == 3 and total.any()
    torch.testing.assert_close(rows_grad(adapter), total, atol=1e-4, rtol=1e-4)


REFUSED = [
    ("llama", r".*down_proj", r"model\.layers\.0\.mlp\.down_proj .*single linear layer from 48 to 32.*\\d\+\.mlp"),
    ("llama", r".*q_proj", r"single linear layer from 32 to 32"),
    ("llama", r"lm_head", r"lm_head .*single linear layer from 32 to 64.*model\.layers\.\\d\+\.mlp"),
    ("llama", r".*self_attn", "it is attention"),
    ("llama", r".*layers\.\d+", r"there is attention in it \(self_attn\)"),
    ("llama", r"model", "there is attention in it"),
    ("llama", r"model\.layers", "no feed-forward network"),
    ("llama", r".*norm", "no linear layers"),
    ("llama", r"model\.embed_tokens", "embeddings in it"),
    ("qwen3-moe", r".*mlp\.gate", "no feed-forward network"),
    ("Albert", r".*ffn", r"ffn .*single linear layer from 32 to 48.*albert_layers\.\\d\+"),
    ("Bert", r".*\.intermediate", r"single linear layer from 32 to 48.*bert\.encoder\.layer\.\\d\+"),
    ("Bert", r"cls\.predictions", r"not as wide as its input \(it reads \[32\] and writes \[64\]"),
]


@pytest.mark.parametrize(("name", "pattern", "told"), REFUSED)
def test_what_is_no_ffn_is_refused_with_the_reason_and_names_that_would_do(name: str, pattern: str, told: str) -> None:
    model = tiny(name) if name in ENCODERS else tiny_model(name)
    with pytest.raises(ValueError, match=told):
        find_ffns(model, pattern)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "qwen2-moe", "Bert", "Albert", "ViT", "T5"])
def test_every_candidate_that_an_error_lists_runs(name: str) -> None:
    model = tiny_model(name) if name[0].islower() else tiny(name)
    given: dict[str, Any] = {"input_ids": text(), "attention_mask": padded()}
    if name in PICTURES:
        given = {"pixel_values": torch.rand(3, 3, 8, 8)}
    if name in SEQ2SEQ:
        given["labels"] = text(3, 6)
    candidates = _candidates(model).split(", ")
    assert candidates and "none" not in candidates
    for candidate in candidates:
        sites = find_ffns(model, candidate)
        for adapter in attach(model, tiny_config(), sites):
            from meft_ds.sparse_adapter.rows.source import DeviceRows

            adapter.rows = DeviceRows(torch.randn(60, 64), trainable=True)
        model(**given).logits.square().sum().backward()
        assert all(rows_grad(adapter).any() for adapter in find_adapters(model).values())
        detach(model)


class Gated(nn.Module):
    """The order of w1, w2, w3: what the last one writes is not what comes out."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(d, 48), nn.Linear(48, out), nn.Linear(d, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w1(x).sigmoid() * self.w3(x))


class Block(nn.Module):
    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(32, 2, batch_first=True)
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x + self.self_attn(x, x, x, need_weights=False)[0])


class Net(nn.Module):
    def __init__(self, *ffns: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(ffn) for ffn in ffns))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def test_ffns_of_a_programs_own_making_are_found_sequences_too() -> None:
    sequence = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32), nn.Dropout(0.0))
    model = Net(Gated(32, 32), sequence)
    sites = find_ffns(model)
    assert [(s.name, s.first, s.last) for s in sites] == [("blocks.0.ffn", "", ""), ("blocks.1", "ffn.1", "ffn.3")]
    x = torch.randn(2, 5, 32)
    base = model(x)
    adapters = attach_device_rows(model)
    torch.testing.assert_close(model(x), base)
    for adapter in adapters:
        adapter.rows.weight.normal_()  # type: ignore[attr-defined]
    model(x).square().sum().backward()
    assert all(rows_grad(adapter).any() for adapter in adapters)
    detach(model)
    torch.testing.assert_close(model(x), base)
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn .*nn.Sequential would run.*blocks\.\\d\+"):
        find_ffns(model, r".*ffn")
    with pytest.raises(ValueError, match=r"reads \[32\] and writes \[16\]"):
        find_ffns(Net(Gated(32, 16)), r".*ffn")


def test_an_ffn_that_gives_something_else_than_it_was_given_is_named_in_the_first_forward() -> None:
    class Odd(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(1)

    model = Net(Odd(32, 32))
    attach_device_rows(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn is no feed-forward network: it gives \(2, 32\)"):
        model(torch.randn(2, 5, 32))
