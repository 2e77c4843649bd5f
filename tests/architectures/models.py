# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every architecture in the table, each with a batch that it can be trained on.

Everything is made from configs, so nothing is downloaded. Dropout is off, because losses are compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB, HIDDEN, FFN, LAYERS, HEADS = 67, 32, 64, 2, 4
ROWS, LENGTH, IMAGE, PATCH = 3, 10, 16, 8
PADDING, IMAGE_TOKEN = 0, 66

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A class of transformers, the settings of its config, what its batch is, and how many FFNs of one width it has
    that an adapter can go beside (None: there is none, and the adapter must be refused)."""

    model: str
    settings: dict[str, Any]
    batch: Callable[[], Batch]
    ffns: int | None = LAYERS

    @property
    def cls(self) -> Any:
        return getattr(transformers, self.model)

    def make(self, seed: int = 0) -> nn.Module:
        """The model in training mode with random weights."""
        config = self.cls.config_class(**self.settings)
        _switch_off_dropout(config)
        torch.manual_seed(seed)
        model: nn.Module = self.cls(config)
        with torch.no_grad():
            for name, p in model.named_parameters():  # zeros at the start would hide what happens to a bias
                if name.endswith("bias"):
                    p.normal_(std=0.1)
        return model.train()


def _switch_off_dropout(config: Any) -> None:
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)


def _tokens(seed: int = 0, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Ids and attention mask; the end of the first row is padding."""
    ids = torch.randint(3, VOCAB - 1, (ROWS, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, -3:], mask[0, -3:] = PADDING, 0
    return ids, mask


def text(*, labelled: bool = True) -> Batch:
    ids, mask = _tokens()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def masked_text() -> Batch:
    found = text()
    hidden = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.5
    return {
        "input_ids": found["input_ids"].masked_fill(hidden, 1),
        "attention_mask": found["attention_mask"],
        "labels": found["labels"].masked_fill(~hidden, -100),
    }


def classified_text() -> Batch:
    ids, mask = _tokens()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(ROWS) % 3}


def translated_text() -> Batch:
    ids, mask = _tokens()
    return {"input_ids": ids, "attention_mask": mask, "labels": _tokens(1, LENGTH - 3)[0][1:].repeat(2, 1)[:ROWS]}


def transcribed_sound() -> Batch:
    sound = torch.randn(ROWS, 8, 2 * LENGTH, generator=torch.Generator().manual_seed(0))
    return {"input_features": sound, "labels": translated_text()["labels"]}


def images() -> Batch:
    pixels = torch.randn(ROWS, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.arange(ROWS) % 3}


def images_in_text() -> Batch:
    found = text()
    patches = (IMAGE // PATCH) ** 2
    found["input_ids"][:, 1 : 1 + patches] = IMAGE_TOKEN
    found["labels"][:, 1 : 1 + patches] = -100
    return {**found, "pixel_values": images()["pixel_values"]}


_LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=FFN,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=PADDING,
    bos_token_id=1,
    eos_token_id=2,
)
_WITHOUT_GROUPS = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_BERT = {**_WITHOUT_GROUPS, "type_vocab_size": 2}
_GPT2 = dict(
    vocab_size=VOCAB, n_embd=HIDDEN, n_inner=FFN, n_layer=LAYERS, n_head=HEADS, n_positions=64, initializer_range=0.2
) | dict(pad_token_id=PADDING, bos_token_id=1, eos_token_id=2)
_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
_BART = dict(
    vocab_size=VOCAB,
    d_model=HIDDEN,
    encoder_layers=LAYERS,
    decoder_layers=LAYERS,
    encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS,
    encoder_ffn_dim=FFN,
    decoder_ffn_dim=FFN,
    max_position_embeddings=64,
    init_std=0.2,
)
_WHISPER = {key: value for key, value in _BART.items() if key != "max_position_embeddings"} | dict(
    num_mel_bins=8,
    max_source_positions=LENGTH,
    max_target_positions=64,
    decoder_start_token_id=1,
    pad_token_id=PADDING,
    bos_token_id=1,
    eos_token_id=2,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)
_MAMBA = ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id", "bos_token_id", "eos_token_id")
_VISION = dict(
    hidden_size=HIDDEN,
    intermediate_size=FFN,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    image_size=IMAGE,
    patch_size=PATCH,
    initializer_range=0.2,
)
_T5 = dict(
    vocab_size=VOCAB,
    d_model=HIDDEN,
    d_ff=FFN,
    d_kv=8,
    num_layers=LAYERS,
    num_decoder_layers=LAYERS,
    num_heads=HEADS,
    decoder_start_token_id=PADDING,
)
_HYBRID = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4)


def _causal(name: str, **settings: Any) -> Architecture:
    return Architecture(model=f"{name}ForCausalLM", settings={**_LLAMA, **settings}, batch=text)


def _llava() -> dict[str, Any]:
    vision = transformers.CLIPVisionConfig(**_VISION)
    return dict(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**_LLAMA),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )


@functools.cache
def architectures() -> dict[str, Architecture]:
    """By the name in the table."""
    found = {
        "Llama": _causal("Llama"),
        "Llama, biases, tied": _causal("Llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        "Mistral": _causal("Mistral"),
        "Qwen2": _causal("Qwen2"),
        "Qwen3": _causal("Qwen3", head_dim=8),
        "Gemma 2": _causal("Gemma2", head_dim=8, **_HYBRID),
        "Gemma 3": _causal("Gemma3", head_dim=8, **_HYBRID),
        "Phi-3": _causal("Phi3"),
        "GPT-2": Architecture(model="GPT2LMHeadModel", settings=_GPT2, batch=text),
        "OPT": Architecture(
            model="OPTForCausalLM",
            settings={**_WITHOUT_GROUPS, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN, "init_std": 0.2},
            batch=text,
        ),
        "GPT-NeoX": Architecture(model="GPTNeoXForCausalLM", settings=_WITHOUT_GROUPS, batch=text),
        "Falcon": Architecture(
            model="FalconForCausalLM",
            settings={**_WITHOUT_GROUPS, "ffn_hidden_size": FFN, "bias": True, "alibi": False},
            batch=text,
        ),
        "BLOOM": Architecture(
            model="BloomForCausalLM",
            settings={**_WITHOUT_GROUPS, "n_layer": LAYERS, "n_head": HEADS},
            batch=text,
        ),
        "Mixtral": _causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
        "Qwen2-MoE": _causal("Qwen2Moe", shared_expert_intermediate_size=24, **_MOE),
        "Qwen3-MoE": _causal("Qwen3Moe", head_dim=8, **_MOE),
        "GPT-OSS": _causal("GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, **_HYBRID),
        "Mamba": Architecture(
            model="MambaForCausalLM",
            settings={key: _LLAMA[key] for key in _MAMBA} | {"state_size": 4},
            batch=text,
            ffns=None,
        ),
        "BERT, masked words": Architecture(model="BertForMaskedLM", settings=_BERT, batch=masked_text),
        "BERT, classes": Architecture(
            model="BertForSequenceClassification", settings={**_BERT, "num_labels": 3}, batch=classified_text
        ),
        "RoBERTa": Architecture(model="RobertaForMaskedLM", settings=_BERT, batch=masked_text),
        "ALBERT": Architecture(
            model="AlbertForMaskedLM", settings={**_BERT, "embedding_size": 16}, batch=masked_text, ffns=1
        ),
        "T5": Architecture(model="T5ForConditionalGeneration", settings=_T5, batch=translated_text, ffns=2 * LAYERS),
        "T5 v1.1": Architecture(
            model="T5ForConditionalGeneration",
            settings={**_T5, "feed_forward_proj": "gated-gelu"},
            batch=translated_text,
            ffns=2 * LAYERS,
        ),
        "BART": Architecture(
            model="BartForConditionalGeneration", settings=_BART, batch=translated_text, ffns=2 * LAYERS
        ),
        "Whisper": Architecture(
            model="WhisperForConditionalGeneration", settings=_WHISPER, batch=transcribed_sound, ffns=2 * LAYERS
        ),
        "LLaVA": Architecture(model="LlavaForConditionalGeneration", settings=_llava(), batch=images_in_text),
        "ViT": Architecture(model="ViTForImageClassification", settings={**_VISION, "num_labels": 3}, batch=images),
        "Llama, classes": Architecture(
            model="LlamaForSequenceClassification", settings={**_LLAMA, "num_labels": 3}, batch=classified_text
        ),
    }
    return found
