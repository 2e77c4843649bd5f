# SPDX-License-Identifier: Apache-2.0
"""Tiny, randomly initialised Hugging Face models of every architecture that discovery promises, d = 32, two layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from meft_ds.sparse_adapter.attach import attach
from meft_ds.sparse_adapter.config import ResolvedSparseAdapter, SparseAdapterConfig
from meft_ds.sparse_adapter.layer import SparseAdapter
from meft_ds.sparse_adapter.rows.source import DeviceRows

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-350m": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeConfig", {**_MOE, "shared_expert_intermediate_size": 16}),
    "qwen3-moe": ("Qwen3MoeConfig", {**_MOE, "head_dim": 8}),
}


def tiny_model(name: str, **overrides: Any) -> Any:
    config_class, extra = ARCHITECTURES[name]
    common = {} if name == "gpt2" else _COMMON
    base = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(hf, config_class)(**{**base, **common, **extra, **overrides})
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config).eval()


def tiny_config(**given: Any) -> ResolvedSparseAdapter:
    settings = {"rows": 60, "experts": 8, "experts_per_token": 3, "keys_per_token": 10}
    return SparseAdapterConfig(**{**settings, **given}).resolve(32)


def attach_device_rows(
    model: nn.Module, config: ResolvedSparseAdapter | None = None, values: float = 0.0
) -> list[SparseAdapter]:
    """Adapters with all rows on the device; ``values`` > 0 gives the value rows that standard deviation."""

    def rows(layer: int, keys: torch.Tensor) -> DeviceRows:
        g = torch.Generator().manual_seed(layer)
        like = next(model.parameters())
        both = torch.cat([keys, torch.randn(keys.shape, generator=g) * values], dim=1)
        return DeviceRows(both.to(like.device, like.dtype), trainable=True)

    model.requires_grad_(False)
    return attach(model, config or tiny_config(), None, rows)
