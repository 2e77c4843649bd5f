# SPDX-License-Identifier: Apache-2.0
"""Models of random weights whose steps benchmarks measure: Llama's architecture in shapes of published models."""

from __future__ import annotations

from typing import Any, NamedTuple


class Shape(NamedTuple):
    """A Llama's numbers."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        """Of one layer: four attention and three FFN matrices, and two norms."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.ffn + 2 * self.hidden

    def parameters(self, layers: int | None = None) -> int:
        """Of the model, with embeddings, head and last norm; with another number of layers if told."""
        count = self.layers if layers is None else layers
        return count * self.layer_parameters + 2 * self.vocabulary * self.hidden + self.hidden


SHAPES = {
    "tiny": Shape(128, 256, 4, 4, 512),
    "1.3b": Shape(2048, 5504, 24, 16, 32000),
    "3b": Shape(3200, 8640, 26, 32, 32000),
    "7b": Shape(4096, 11008, 32, 32, 32000),
}
"""LLaMA's 1.3B and 7B shapes, OpenLLaMA's 3B, and one that trains anywhere within seconds."""


def llama(shape: Shape, *, seq_len: int, device: Any, dtype: Any = None, layers: int | None = None) -> Any:
    """Make a Llama of random weights on the device itself; bf16 unless told, and as deep as `shape` unless told."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers if layers is None else layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=seq_len,
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if dtype is None else dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
