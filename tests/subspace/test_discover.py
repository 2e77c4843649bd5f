# SPDX-License-Identifier: Apache-2.0
"""Which matrices are compressed, which are not, and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from meft_ds.subspace.config import SubspaceConfig
from meft_ds.subspace.discover import Site, find_matrices
from tests.sparse_adapter.tiny import tiny_model


def found(model: nn.Module, **settings: Any) -> tuple[dict[str, Site], list[str]]:
    sites, excluded = find_matrices(model, SubspaceConfig(**{"dim": 8, "nonzeros": 2, **settings}))
    return {site.name: site for site in sites}, excluded


def refused(model: nn.Module, **settings: Any) -> str:
    with pytest.raises(ValueError) as e:
        found(model, **settings)
    return str(e.value)


LLAMA = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
OPT = {*(f"self_attn.{x}_proj" for x in "qkv"), "self_attn.out_proj", "fc1", "fc2"}


@pytest.mark.parametrize(
    ("name", "prefix", "modules"),
    [
        ("llama", "model.layers", LLAMA),
        ("qwen3", "model.layers", LLAMA),
        ("gemma2", "model.layers", LLAMA),
        ("phi3", "model.layers", {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}),
        ("gpt2", "transformer.h", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ("opt", "model.decoder.layers", OPT),
    ],
)
def test_the_linear_layers_of_a_models_blocks_are_found_and_nothing_else(
    name: str, prefix: str, modules: set[str]
) -> None:
    model = tiny_model(name)
    sites, excluded = found(model)
    assert set(sites) == {f"{prefix}.{i}.{module}.weight" for i in range(2) for module in modules}
    assert excluded == []
    for site in sites.values():
        assert site.tapped and site.d == 8 and site.input_first == (name == "gpt2")


@pytest.mark.parametrize(
    ("name", "experts"),
    [("mixtral", {"gate_up_proj", "down_proj"}), ("qwen2-moe", {"gate_up_proj", "down_proj"})],
)
def test_expert_tensors_are_found_and_routers_are_not(name: str, experts: set[str]) -> None:
    model = tiny_model(name)
    parameters = dict(model.named_parameters())
    sites, excluded = found(model)
    three = {site.name.rpartition(".")[2] for site in sites.values() if site.weight.dim() == 3}
    if not any(p.dim() == 3 for p in parameters.values()):
        pytest.skip("this transformers keeps each expert in layers of its own")
    assert three == experts
    for site in sites.values():
        assert site.tapped == (site.weight.dim() == 2) and site.weight is parameters[site.name]
    assert not any(n.endswith(("gate.weight", "router.weight", "shared_expert_gate.weight")) for n in sites)
    assert any("self_attn.q_proj" in n for n in sites)
    assert all("too small" in line for line in excluded)


def test_siblings_that_read_one_tensor_share_and_others_do_not() -> None:
    sites, _ = found(tiny_model("llama"))
    by_key = Counter(site.shares for site in sites.values())
    # of tiny Llama's q [32, 32] and k, v [16, 32], and gate and up
    assert sorted(by_key.values()) == [1] * 2 * 2 + [2] * 2 + [3] * 2
    halves, _ = found(tiny_model("llama"), dim=0.5)
    d = {name: site.d for name, site in halves.items() if "layers.0.self_attn" in name}
    assert sorted(d.values()) == [8, 8, 16, 16]
    keys = {name.split(".")[-2]: site.shares for name, site in halves.items() if "layers.0." in name}
    assert keys["k_proj"] == keys["v_proj"] != keys["q_proj"], "another d is another projector"


def test_tied_and_reused_weights_are_left_out_with_the_reason() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
            self.b.weight = self.a.weight
            self.blocks = nn.ModuleList([self.c, self.c])
            self.tok = nn.Embedding(16, 16)
            self.head = nn.Linear(16, 16, bias=False)
            self.head.weight = self.tok.weight

    sites, excluded = found(Tied())
    assert set(sites) == {"d.weight"}
    assert [line.split()[0] for line in excluded] == ["a.weight", "b.weight", "c.weight", "head.weight"]
    assert all("tied or used by several modules" in line for line in excluded)


def test_small_matrices_are_left_out_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 1))
    sites, excluded = found(model)
    assert set(sites) == {"0.weight"}
    assert "1.weight (8, 16) is too small for subspace.dim 8" in excluded
    sites, excluded = found(model, dim=0.5, nonzeros=4)
    assert {name: site.d for name, site in sites.items()} == {"0.weight": 8}
    named, _ = found(model, dim=0.5, nonzeros=4, target_modules=".*")
    assert {name: site.d for name, site in named.items()} == {"0.weight": 8, "1.weight": 4}, "as the user asked"
    assert set(found(model, dim=0.5, nonzeros=5, target_modules=".*")[0]) == {"0.weight"}, "d cannot be below k"


@pytest.mark.parametrize(
    ("m", "n", "settings", "d"),
    [
        (384, 384, {}, 192),
        (8, 384, {}, 0),  # thin: 3,072 values would train through 16
        (64, 2048, {}, 0),  # a router's shape
        (64, 2048, {"dim": 32}, 32),
        (64, 2048, {"target_modules": ".*"}, 32),
        (65_536, 1024, {}, 512),  # thin, but too large to train whole
        (1024, 4096, {}, 512),  # keys of grouped heads
        (32, 32, {}, 16),
        (14, 14, {}, 0),
        (14, 14, {"nonzeros": 3}, 7),
        (64, 64, {"dim": 0.8}, 51),
        (64, 64, {"dim": 0.9}, 0),  # next to no gain
        (64, 64, {"dim": 63}, 63),
        (64, 64, {"dim": 64}, 0),
    ],
)
def test_a_matrix_is_compressed_where_that_gains_something_or_where_it_was_asked_for(
    m: int, n: int, settings: dict[str, Any], d: int
) -> None:
    assert SubspaceConfig(**settings).dim_of(m, n) == SubspaceConfig(**settings).dim_of(n, m) == d


def test_the_output_head_is_left_out_even_when_it_is_named() -> None:
    model = tiny_model("llama")
    assert "lm_head.weight" not in found(model, dim=8)[0]
    assert "lm_head.weight is the output head" in refused(model, target_modules="lm_head")


@pytest.mark.parametrize("settings", [{}, {"target_modules": ".*"}, {"dim": 4}])
@pytest.mark.parametrize(
    ("made", "head"),
    [
        ("BertForSequenceClassification", "classifier"),
        ("RobertaForTokenClassification", "classifier"),
        ("BertForQuestionAnswering", "qa_outputs"),
        ("LlamaForSequenceClassification", "score"),
        ("DistilBertForSequenceClassification", "pre_classifier"),
        ("BartForSequenceClassification", "classification_head"),
    ],
)
def test_heads_are_never_compressed(made: str, head: str, settings: dict[str, Any]) -> None:
    import transformers

    cls = getattr(transformers, made)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_labels": 24, "n_layers": 1}
    more = {"dim": 32, "hidden_dim": 64, "n_heads": 2, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    config = cls.config_class(vocab_size=64, num_attention_heads=2, **sizes)
    if made.startswith(("Distil", "Bart")):
        config = cls.config_class(vocab_size=64, num_labels=24, **{k: v for k, v in more.items() if hasattr(config, k)})
    model = cls(config)
    sites, excluded = found(model, **settings)
    assert len(sites) >= 4 and not any(head in name.split(".") for name in sites)
    assert any(head in line and "is a head" in line for line in excluded)


def test_a_head_that_a_program_puts_around_a_model_and_pefts_matrices_are_never_compressed() -> None:
    peft = pytest.importorskip("peft")

    class Rewards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = tiny_model("llama")
            self.out = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16))

    sites, excluded = found(Rewards())
    assert sites and all("layers" in name for name in sites)
    assert "out.0.weight is a head" in excluded and "out.2.weight is a head" in excluded
    settings = {"r": 16, "target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**settings))
    model.base_model.model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    sites, excluded = found(model)
    assert [name.split(".")[-2] for name in sites] == ["up_proj"], "what of the base trains"
    assert "q_proj.lora_A.default.weight is PEFT's, as are 5 more" in excluded[0]
    sites, excluded = found(peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**settings)))
    assert not sites and "as are 5 more" in excluded[0], "they train all the same"
    for asked in ({"target_modules": ".*q_proj.*"}, {"target_modules": ".*lora_A.*"}):
        told = refused(peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**settings)), **asked)
        assert "is a PEFT layer" in told and "merge_and_unload()" in told


def test_embeddings_of_positions_in_three_dimensions_are_no_experts() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sites, _ = found(ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **sizes)))
    assert sites and not any("embed" in name for name in sites)


def test_frozen_parameters_stay_out_and_a_wholly_frozen_model_says_so() -> None:
    model = tiny_model("llama")
    model.model.layers[0].requires_grad_(False)
    assert all("layers.1." in name for name in found(model)[0])
    model.requires_grad_(False)
    assert "q_proj.weight is frozen" in refused(model)


def test_target_modules_are_whole_names_and_one_without_a_match_is_refused_with_names() -> None:
    model = tiny_model("llama")
    sites, _ = found(model, target_modules=r".*\.(q|v)_proj")
    assert len(sites) == 4 and all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in sites)
    message = refused(model, target_modules=[r".*\.q_proj", "q_proj", "mlp"])
    assert "target_modules ['mlp', 'q_proj'] matches no whole module name" in message
    assert "model.layers.0.self_attn.q_proj" in message


def test_a_model_without_linear_layers_is_refused() -> None:
    assert "Linear layers: none" in refused(nn.Sequential(nn.Embedding(9, 9), nn.Conv2d(3, 3, 3)))


def test_a_layer_with_a_replaced_forward_or_a_computed_weight_is_not_tapped() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.utils.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 16))
    model[0].forward = lambda x: torch.nn.functional.linear(x, model[0].weight)
    sites, _ = found(model)
    assert {name: site.tapped for name, site in sites.items()} == {"0.weight": False, "2.weight": True}
    assert not any(site.tapped for site in found(model, gradient_side="weight")[0].values())
