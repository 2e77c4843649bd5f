# SPDX-License-Identifier: Apache-2.0
"""Which weights may have tiles, where they are cut, and that roles are what the models' own functions make of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from meft_ds.sparse_matrix.config import SparseMatrixConfig
from meft_ds.sparse_matrix.discover import Site, elements_of_2d_weights, find_sites
from meft_ds.sparse_matrix.roles import role_of
from tests.sparse_adapter.tiny import tiny_model

_SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}),
    "persimmon": ("PersimmonConfig", {**_SIZES, "qk_layernorm": False}),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64}),
    "codegen": ("CodeGenConfig", {**_GPT, "n_ctx": 64, "rotary_dim": 4, "tie_word_embeddings": False}),
    "bigcode": ("GPTBigCodeConfig", _GPT),
    "bigcode-heads": ("GPTBigCodeConfig", {**_GPT, "multi_query": False}),
    "falcon": ("FalconConfig", {**_FALCON, "bias": True}),
    "falcon-heads": ("FalconConfig", {**_FALCON, "multi_query": False}),
    "falcon-groups": ("FalconConfig", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "glm": ("GlmConfig", _SIZES),
    "gpt-oss": ("GptOssConfig", {**_SIZES, "num_local_experts": 4, "layer_types": ["full_attention"] * 2}),
    "llama4": (
        "Llama4TextConfig",
        {**_SIZES, "num_local_experts": 4, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
    ),
}


def model_of(name: str) -> Any:
    if name not in _MORE:
        return tiny_model(name)
    kind, settings = _MORE[name]
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(getattr(hf, kind)(**settings)).eval()


def found(model: nn.Module, **settings: Any) -> tuple[dict[str, Site], list[str]]:
    sites, told = find_sites(model, SparseMatrixConfig(**{"block_size": 16, **settings}))
    return {site.name: site for site in sites}, told


def refused(model: nn.Module, **settings: Any) -> str:
    with pytest.raises(ValueError) as e:
        found(model, **settings)
    return str(e.value)


LLAMA = {
    **{f"self_attn.{x}_proj": ((x,), 32 if x in "qo" else 16) for x in "qkvo"},
    **{f"mlp.{x}_proj": ((x,), 32 if x == "down" else 48) for x in ("gate", "up", "down")},
}
NEOX = {
    "attention.query_key_value": (("q", "k", "v") * 4, 96),
    "attention.dense": (("o",), 32),
    "mlp.dense_h_to_4h": (("up",), 48),
    "mlp.dense_4h_to_h": (("down",), 32),
}
PHI3 = {
    "self_attn.qkv_proj": (("q", "k", "v"), 64),
    "self_attn.o_proj": (("o",), 32),
    "mlp.gate_up_proj": (("gate", "up"), 96),
    "mlp.down_proj": (("down",), 32),
}
GPT2 = {
    "attn.c_attn": (("q", "k", "v"), 96),
    "attn.c_proj": (("o",), 32),
    "mlp.c_fc": (("up",), 128),
    "mlp.c_proj": (("down",), 32),
}


@pytest.mark.parametrize(
    ("name", "prefix", "modules"),
    [
        ("llama", "model.layers", LLAMA),
        ("qwen2", "model.layers", LLAMA),
        ("phi3", "model.layers", PHI3),
        ("gpt2", "transformer.h", GPT2),
        ("gpt-neox", "gpt_neox.layers", NEOX),
    ],
)
def test_the_linear_layers_of_a_models_blocks_are_found_with_their_roles(
    name: str, prefix: str, modules: dict[str, tuple[tuple[str, ...], int]]
) -> None:
    model = model_of(name)
    sites, told = found(model)
    parameters = dict(model.named_parameters())
    assert set(sites) == {f"{prefix}.{i}.{module}.weight" for i in range(2) for module in modules} and told == []
    assert list(sites) == [p for p in parameters if p in sites], "in the order of parameters"
    for i in range(2):
        for module, (roles, out) in modules.items():
            site = sites[f"{prefix}.{i}.{module}.weight"]
            cuts = site.cols if site.input_first else site.rows
            runs = [role for j, role in enumerate(site.roles) if j == 0 or role != site.roles[j - 1]]
            assert tuple(runs) == roles and cuts[-1][1] == out and len(cuts) == len(site.roles)
            assert site.weight is parameters[site.name] and site.module is model.get_submodule(f"{prefix}.{i}.{module}")
            assert site.layer == i and site.tapped and site.input_first == (name == "gpt2") and site.experts == 1
            assert site.grid == (1, len(site.rows), len(site.cols))


@pytest.mark.parametrize("side", [1, 5, 16, 1000])
@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt-neox", "mixtral", "gpt-oss"])
def test_every_element_is_in_one_tile_and_no_tile_is_larger_than_asked_or_spans_roles(name: str, side: int) -> None:
    sites, _ = found(model_of(name), block_size=side)
    for site in sites.values():
        for cuts, size in ((site.rows, site.weight.shape[-2]), (site.cols, site.weight.shape[-1])):
            assert [i for low, high in cuts for i in range(low, high)] == list(range(size))
            assert all(0 < high - low <= side for low, high in cuts)
        inner, along = (site.rows, site.cols) if site.input_first else (site.cols, site.rows)
        assert len(inner) == -(-inner[-1][1] // side), "only the last of a part may be smaller"
        runs: list[tuple[str, int]] = []
        for role, (low, high) in zip(site.roles, along, strict=True):
            same = runs and runs[-1][0] == role
            runs[-1:] = [(role, runs[-1][1] + high - low)] if same else [*runs[-1:], (role, high - low)]
        assert len(along) == sum(-(-size // side) for _, size in runs)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss", "llama4"])
def test_expert_tensors_are_sites_whose_output_dimension_is_known(name: str) -> None:
    model = model_of(name)
    sites, _ = found(model)
    three = {n.rpartition(".")[2]: site for n, site in sites.items() if site.weight.dim() == 3}
    if not three:
        pytest.skip("this transformers keeps each expert in layers of its own")
    assert set(three) == {"gate_up_proj", "down_proj"}
    gate_up, down = three["gate_up_proj"], three["down_proj"]
    inner = (gate_up.weight.numel() // gate_up.experts) // 32
    for site, out in ((gate_up, inner), (down, 32)):
        turned = name in ("gpt-oss", "llama4")
        assert site.experts == 4 and site.input_first == turned and not site.tapped
        assert site.weight.shape[-1 if turned else -2] == out and len(site.roles) == site.grid[2 if turned else 1]
    assert set(down.roles) == {"down"}
    # GPT-OSS alternates gate and up element by element
    assert set(gate_up.roles) == ({"gate_up"} if name == "gpt-oss" else {"gate", "up"})


# -- roles against what the models compute -----------------------------------------------------------------------------


@contextmanager
def scaled(site: Site, role: str, factor: float) -> Iterator[None]:
    """The weight (and bias) of one role times a factor, for as long as this lasts."""
    biases = [b for n, b in site.module.named_parameters(recurse=False) if n in ("bias", f"{_key(site)}_bias")]
    kept = [p.detach().clone() for p in (site.weight, *biases)]
    with torch.no_grad():
        for (low, high), own in zip(site.cols if site.input_first else site.rows, site.roles, strict=True):
            if own == role:
                along = -1 if site.input_first else -2
                site.weight.narrow(along, low, high - low).mul_(factor)
                for bias in biases:
                    bias.narrow(-1, low, high - low).mul_(factor)
        yield
        for p, value in zip((site.weight, *biases), kept, strict=True):
            p.copy_(value)


def _key(site: Site) -> str:
    return site.name.rpartition(".")[2]


def seen_by(model: nn.Module, module: nn.Module) -> Tensor:
    """What `module` of the model gets as its input, on some tokens."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, args, y: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        model(torch.arange(3, 15)[None])
    handle.remove()
    return seen[0]


FUSED = ["phi3", "gpt2", "gpt-neox", "bloom", "persimmon", "mpt", "codegen", "bigcode", "bigcode-heads"]
FUSED += ["falcon", "falcon-heads", "falcon-groups"]


@pytest.mark.parametrize("name", FUSED)
def test_parts_of_fused_attention_are_queries_keys_and_values_to_the_model(name: str) -> None:
    model = model_of(name)
    for p in model.parameters():  # biases and scores far from 0, so that a wrong part shows
        nn.init.normal_(p, std=0.3)
    sites, told = found(model, block_size=4)
    assert told == []
    fused = next(s for s in sites.values() if set(s.roles) == {"q", "k", "v"})
    output = next(s for s in sites.values() if set(s.roles) == {"o"})
    plain = seen_by(model, output.module)
    with scaled(fused, "v", 2.0):
        assert torch.allclose(seen_by(model, output.module), 2 * plain, atol=1e-5), "values enter linearly"
    with scaled(fused, "q", 0.0):
        no_queries = seen_by(model, output.module)
    with scaled(fused, "k", 0.0):
        no_keys = seen_by(model, output.module)
    assert not torch.allclose(plain, no_queries, atol=1e-2)
    assert torch.allclose(no_queries, no_keys, atol=1e-5), "either way attention no longer looks at tokens"
    with scaled(fused, "k", 2.0):
        keys = seen_by(model, output.module)
    with scaled(fused, "q", 2.0):
        assert torch.allclose(seen_by(model, output.module), keys, atol=1e-5), "their product is what counts"
    # which of the two is which: the last token looks with its own query, but at the keys of all
    last = plain[:, -1]
    with without_before_the_last(fused, "q"):
        assert torch.allclose(seen_by(model, output.module)[:, -1], last, atol=1e-5)
    with without_before_the_last(fused, "k"):
        assert not torch.allclose(seen_by(model, output.module)[:, -1], last, atol=1e-2)


@contextmanager
def without_before_the_last(site: Site, role: str) -> Iterator[None]:
    """What the layer makes of one role is 0 for all tokens but the last."""
    cuts = site.cols if site.input_first else site.rows
    features = [i for (low, high), own in zip(cuts, site.roles, strict=True) if own == role for i in range(low, high)]

    def blank(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        y = y.clone()
        y[:, :-1, features] = 0
        return y

    handle = site.module.register_forward_hook(blank)
    yield
    handle.remove()


@pytest.mark.parametrize("name", ["phi3", "glm"])
def test_parts_of_a_fused_feed_forward_are_gate_and_up_to_the_model(name: str) -> None:
    model = model_of(name)
    sites, _ = found(model)
    fused = next(s for s in sites.values() if set(s.roles) == {"gate", "up"})
    down = next(s for s in sites.values() if set(s.roles) == {"down"})
    plain = seen_by(model, down.module)
    with scaled(fused, "up", 2.0):
        assert torch.allclose(seen_by(model, down.module), 2 * plain, rtol=1e-5, atol=1e-9)
    with scaled(fused, "gate", 2.0):
        assert not torch.allclose(seen_by(model, down.module), 2 * plain, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "llama4"])
def test_parts_of_fused_experts_are_gate_and_up_to_the_model(name: str) -> None:
    model = model_of(name)
    sites, _ = found(model, target_modules=r".*\.0\..*experts")
    fused = next((s for s in sites.values() if set(s.roles) == {"gate", "up"}), None)
    if fused is None:
        pytest.skip("this transformers keeps each expert in layers of its own")
    nn.init.normal_(fused.weight, std=0.3)
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    experts: Any = fused.module

    def out() -> Tensor:
        with torch.no_grad():
            if name == "llama4":
                return experts(x)
            picks = (torch.arange(8) % 4)[:, None]
            return experts(x, picks, torch.ones(8, 1))

    plain = out()
    with scaled(fused, "up", 2.0):
        assert torch.allclose(out(), 2 * plain, rtol=1e-4, atol=1e-6)
    with scaled(fused, "gate", 2.0):
        assert not torch.allclose(out(), 2 * plain, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.3.self_attn.out_proj", "o"),
        ("transformer.h.0.attn.c_proj", "o"),
        ("transformer.h.0.mlp.c_proj", "down"),
        ("encoder.block.0.layer.0.SelfAttention.o", "o"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0", "gate"),
        ("encoder.block.0.layer.1.DenseReluDense.wo", "down"),
        ("model.layers.0.attention.wo", "o"),
        ("layers.0.feed_forward.w1", "gate"),
        ("layers.0.feed_forward.w2", "down"),
        ("layers.0.feed_forward.w3", "up"),
        ("bert.encoder.layer.0.attention.self.query", "q"),
        ("bert.encoder.layer.0.attention.output.dense", "o"),
        ("bert.encoder.layer.0.intermediate.dense", "up"),
        ("bert.encoder.layer.0.output.dense", "down"),
        ("model.layers.0.block_sparse_moe.gate", "router"),
        ("model.layers.0.mlp.router.layer", "router"),
        ("backbone.layers.0.mixer.out_proj", "out_proj"),
        ("backbone.layers.0.mixer.in_proj", "in_proj"),
        ("attention_pool.0.fc1", "up"),
        ("score", "score"),
    ],
)
def test_a_role_is_canonical_where_it_is_known_and_else_the_last_part_of_the_name(name: str, role: str) -> None:
    assert role_of(name) == role


class Fused(nn.Module):
    def __init__(self, inputs: int, out: int, name: str = "qkv") -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(inputs, out)})])


def test_a_fused_layer_without_a_known_split_is_thirds_or_one_part_with_a_note() -> None:
    sites, told = found(Fused(10, 30))
    assert sites["blocks.0.qkv.weight"].roles == ("q", "k", "v") and told == []
    sites, told = found(Fused(10, 28))
    assert sites["blocks.0.qkv.weight"].roles == ("qkv", "qkv")
    assert len(told) == 1 and "sizes of q, k and v are not known; sparse_matrix.segments can say" in told[0]
    sites, told = found(Fused(10, 30, "query_key_value"))
    assert set(sites["blocks.0.query_key_value.weight"].roles) == {"qkv"} and "its heads are not known" in told[0]


def test_segments_override_what_discovery_would_do() -> None:
    sites, told = found(Fused(10, 30), segments={r".*\.qkv": [20, 6, 4]})
    site = sites["blocks.0.qkv.weight"]
    assert site.roles == ("q", "q", "k", "v") and told == []
    assert site.rows == ((0, 16), (16, 20), (20, 26), (26, 30)) and site.cols == ((0, 10),)
    sites, _ = found(Fused(10, 30, "mixed"), segments={"blocks.*": [25, 5]})
    assert sites["blocks.0.mixed.weight"].roles == ("mixed.0", "mixed.0", "mixed.1")
    model = model_of("gpt2")
    sites, _ = found(model, segments={r".*\.c_attn": [90, 6]})
    assert sites["transformer.h.1.attn.c_attn.weight"].cols[-1] == (90, 96), "along the output dimension"


def test_segments_of_an_expert_tensor_go_by_its_own_name() -> None:
    sites, _ = found(model_of("gpt-oss"), segments={r".*\.gate_up_proj": [40, 8]})
    assert sites["model.layers.0.mlp.experts.gate_up_proj"].roles == ("gate",) * 3 + ("up",)
    assert set(sites["model.layers.0.mlp.experts.down_proj"].roles) == {"down"}


def test_segments_that_do_not_add_up_or_match_nothing_are_refused() -> None:
    message = refused(Fused(10, 30), segments={r".*\.qkv": [20, 6]})
    assert "sizes [20, 6] sum to 26, but blocks.0.qkv has an output dimension of 30" in message
    message = refused(Fused(10, 30), segments={"qkv": [20, 6, 4]})
    assert "segments ['qkv'] matches no whole module name" in message and "blocks.0.qkv" in message


def test_only_roles_that_can_get_tiles_are_looked_at() -> None:
    sites, told = found(model_of("phi3"), preset="paper")
    assert {n.split(".")[-2] for n in sites} == {"qkv_proj"} and told == []
    sites, _ = found(model_of("llama"), budget={"up": 0.1, "o": 0.1})
    assert {n.split(".")[-2] for n in sites} == {"up_proj", "o_proj"}
    message = refused(model_of("llama"), budget={"up": 0.1, "query": 0.1})
    assert "budget: no matrix has role query; roles of this model: down, gate, k, o, q, up, v" in message
    assert "Roles: x" in refused(nn.Sequential(nn.ModuleDict({"x": nn.Linear(4, 4)})), preset="paper")


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

    sites, told = found(Tied())
    assert set(sites) == {"d.weight"} and sites["d.weight"].layer is None
    assert [line.split()[0] for line in told] == ["a.weight", "b.weight", "c.weight", "head.weight"]
    assert all("tied or used by several modules" in line for line in told)


def test_the_output_head_and_frozen_weights_stay_out() -> None:
    model = model_of("llama")
    assert "lm_head.weight" not in found(model)[0]
    assert "lm_head.weight is the output head" in refused(model, target_modules="lm_head")
    model.model.layers[0].requires_grad_(False)
    assert all("layers.1." in name for name in found(model)[0])
    model.requires_grad_(False)
    assert "q_proj.weight is frozen" in refused(model)
    assert "Linear layers: none" in refused(nn.Sequential(nn.Embedding(9, 9), nn.Conv2d(3, 3, 3)))


def test_target_modules_are_whole_names_and_one_without_a_match_is_refused_with_names() -> None:
    model = model_of("llama")
    sites, _ = found(model, target_modules=r".*\.(q|v)_proj")
    assert len(sites) == 4 and all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in sites)
    message = refused(model, target_modules=[r".*\.q_proj", "q_proj", "mlp"])
    assert "target_modules ['mlp', 'q_proj'] matches no whole module name" in message
    assert "model.layers.0.self_attn.q_proj" in message


def test_a_layer_with_a_replaced_forward_is_not_tapped() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].forward = lambda x: torch.nn.functional.linear(x, model[0].weight)
    sites, _ = found(model)
    assert {name: site.tapped for name, site in sites.items()} == {"0.weight": False, "1.weight": True}


def test_all_matrices_count_once_into_what_density_is_a_fraction_of() -> None:
    # embeddings and head 64 x 32; q, o 32 x 32; k, v 16 x 32; three of 48 x 32
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    assert elements_of_2d_weights(tiny_model("llama", tie_word_embeddings=False)) == 2 * 64 * 32 + 2 * layer
    assert elements_of_2d_weights(tiny_model("llama", tie_word_embeddings=True)) == 64 * 32 + 2 * layer
    assert elements_of_2d_weights(tiny_model("qwen2", tie_word_embeddings=False)) == 2 * 64 * 32 + 2 * layer
    model = model_of("gpt-oss")
    experts = 4 * (32 * 48 + 24 * 32)  # whose biases are [4, 48] and [4, 32]
    attention = 2 * 32 * 32 + 2 * 16 * 32
    assert elements_of_2d_weights(model) == 2 * 64 * 32 + 2 * (attention + experts + 4 * 32)
    assert elements_of_2d_weights(nn.Sequential(nn.Conv1d(3, 4, 5), nn.Linear(2, 3), nn.LayerNorm(3))) == 6
