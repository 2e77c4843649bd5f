# SPDX-License-Identifier: Apache-2.0
"""Tiny, randomly initialised encoders, encoder-decoders and models of pictures, d = 32, without dropout.

What `from_pretrained` would give: in eval mode.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

_BERT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_BART: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_GATED = {"feed_forward_proj": "gated-gelu"}
_SWITCH = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4, "expert_capacity": 64}
_PICTURE = {**_BERT, "image_size": 8, "patch_size": 4, "num_labels": 3}
for _key in ("vocab_size", "max_position_embeddings", "pad_token_id"):
    _PICTURE.pop(_key)

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("ForMaskedLM", _BERT),
    "Roberta": ("ForMaskedLM", _BERT),
    "Electra": ("ForMaskedLM", {**_BERT, "embedding_size": 16}),
    "Deberta": ("ForMaskedLM", _BERT),
    "DebertaV2": ("ForMaskedLM", _BERT),
    "MPNet": ("ForMaskedLM", _BERT),
    "Albert": ("ForMaskedLM", {**_BERT, "embedding_size": 16, "num_hidden_layers": 3}),
    "DistilBert": (
        "ForMaskedLM",
        {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "dropout": 0.0}
        | {"attention_dropout": 0.0, "max_position_embeddings": 64, "initializer_range": 0.2},
    ),
}
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ForImageClassification", _PICTURE),
    "Beit": ("ForImageClassification", _PICTURE),
    "CLIPVision": ("ModelWithProjection", {**_PICTURE, "projection_dim": 3}),
}
SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "Bart": ("ForConditionalGeneration", _BART),
    "MBart": ("ForConditionalGeneration", _BART),
    "Pegasus": ("ForConditionalGeneration", _BART),
    "Marian": ("MTModel", _BART),
    "M2M100": ("ForConditionalGeneration", _BART),
    "T5": ("ForConditionalGeneration", _T5),
    "MT5": ("ForConditionalGeneration", {**_T5, **_GATED}),
    "UMT5": ("ForConditionalGeneration", {**_T5, **_GATED}),
    "LongT5": ("ForConditionalGeneration", _T5),
    "SwitchTransformers": ("ForConditionalGeneration", {**_T5, **_SWITCH}),
}


def tiny(name: str, **overrides: Any) -> Any:
    kind, settings = {**ENCODERS, **PICTURES, **SEQ2SEQ}[name]
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**{**settings, **overrides})
    return getattr(hf, f"{name}{kind}")(config).eval()


def text(batch: int = 3, length: int = 9, seed: int = 1) -> Tensor:
    """Token ids [batch, length] that need no padding."""
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int = 3, length: int = 9) -> Tensor:
    """A mask [batch, length]: the first row is padded on the right after 4 tokens."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, 4:] = 0
    return mask
