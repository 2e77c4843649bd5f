# SPDX-License-Identifier: Apache-2.0
"""What a weight does in its layer, by its name, and which parts a fused weight consists of.

A wrong part costs quality, never correctness: tiles are gradients of what they are, whatever role they were counted to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from meft_ds.offload.model.weights import shape_of

Part = tuple[int, str]
"""Size along the output dimension, and role."""

_NAMES = {
    "q": ("q", "q_proj", "query", "query_proj", "wq", "q_attn", "q_lin", "to_q"),
    "k": ("k", "k_proj", "key", "key_proj", "wk", "k_lin", "to_k"),
    "v": ("v", "v_proj", "value", "value_proj", "wv", "v_lin", "to_v"),
    "o": ("o", "o_proj"),
    "gate": ("gate_proj", "w1", "wi_0"),
    "up": ("up_proj", "w3", "wi_1", "wi", "fc1", "c_fc", "fc_in", "dense_h_to_4h", "lin1"),
    "down": ("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h", "lin2"),
    "router": ("gate", "router"),  # "gate" by itself would be counted among the feed-forward's gates
}
_ROLE = {name: role for role, names in _NAMES.items() for name in names}
_OUTPUT = ("out_proj", "c_proj", "wo", "Wo", "dense", "out_lin", "proj")
"""Output of attention inside one; elsewhere what the table below says."""
_OUTPUT_ELSEWHERE = {"c_proj": "down", "wo": "down", "Wo": "down"}
_BERT = {"intermediate": "up", "output": "down"}  # each holds one layer, called "dense"

_QKV = ("qkv_proj", "qkv", "Wqkv", "wqkv", "c_attn", "W_pack", "qkv_linear", "to_qkv", "query_key_value")
_GATE_UP = ("gate_up_proj", "w12")


def role_of(name: str) -> str:
    """Return the role of a weight that is not fused, by the name of its module (or, of an expert tensor, its own)."""
    *above, last = name.split(".")
    start = max((i for i, part in enumerate(above) if part.isdigit()), default=-1) + 1
    in_attention = any("att" in part.lower() for part in above[start:])
    if last in _OUTPUT and in_attention:
        return "o"
    if above and above[-1] == "router":
        return "router"
    if last == "dense" and above and above[-1] in _BERT:
        return _BERT[above[-1]]
    return _ROLE.get(last) or _OUTPUT_ELSEWHERE.get(last) or last


def parts_of(model: nn.Module, name: str, holder: nn.Module, out: int, inputs: int) -> tuple[list[Part], str]:
    """Return the parts of a weight along its output dimension, and what is not known about them ("" if all is).

    Args:
        name: of the linear layer, or of the expert tensor.
        holder: the module above the linear layer, or the one that holds the tensor.
        out, inputs: sizes of the output and the input dimension.
    """
    last = name.rpartition(".")[2]
    if last in _GATE_UP:
        # GPT-OSS alternates them: element 2 i is of the gate, 2 i + 1 of the other
        if out % 2 or not getattr(holder, "is_concatenated", type(holder).__name__ != "GptOssExperts"):
            return [(out, "gate_up")], ""
        return [(out // 2, "gate"), (out // 2, "up")], ""
    if last not in _QKV:
        return [(out, role_of(name))], ""
    return _parts_of_qkv(last, holder, out, inputs, _heads_of(model, holder))


def names_of_parts(name: str, n: int) -> list[str]:
    """Return the roles of n parts whose sizes the user gave."""
    last = name.rpartition(".")[2]
    if n == 3 and last in _QKV:
        return ["q", "k", "v"]
    if n == 2 and last in _GATE_UP:
        return ["gate", "up"]
    role = role_of(name)
    return [role] if n == 1 else [f"{role}.{i}" for i in range(n)]


def input_first(model: nn.Module, holder: nn.Module, key: str, shape: tuple[int, ...]) -> bool:
    """Return whether an expert tensor is stored [experts, in, out]."""
    told = getattr(holder, "is_transposed", None)  # by transformers, of the experts that it can group
    if isinstance(told, bool):
        return told
    gate_up, down = (getattr(holder, name, None) for name in ("gate_up_proj", "down_proj"))
    if isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter):
        up_shape, down_shape = shape_of(gate_up), shape_of(down)
        if len(up_shape) == len(down_shape) == 3:
            (_, r, c), (_, s, t) = up_shape, down_shape
            return bool(r == t and c == 2 * s)
    hidden = _first(_sources(model, holder), "hidden_size")
    role = role_of(key)
    if role == "down":
        return shape[-1] == hidden != shape[-2]
    return role in ("gate", "up") and shape[-2] == hidden != shape[-1]


@dataclass(frozen=True)
class _Heads:
    q: int
    kv: int
    dim: int


def _parts_of_qkv(last: str, holder: nn.Module, out: int, inputs: int, heads: _Heads | None) -> tuple[list[Part], str]:
    kind = type(holder).__name__
    dim = heads.dim if heads else 0
    if out == 2 * inputs and hasattr(holder, "q_attn"):  # GPT-2's cross attention
        return [(inputs, "k"), (inputs, "v")], ""
    if heads and kind == "CodeGenAttention" and out == 3 * heads.q * dim and heads.q % 4 == 0:
        # four shards, as on the four TPU cores it was trained on, and v before k
        return [(heads.q // 4 * dim, role) for role in "qvk"] * 4, ""
    told = getattr(holder, "multi_query", None)
    if heads and out == (heads.q + 2 * heads.kv) * dim and getattr(holder, "new_decoder_architecture", False):
        return [(heads.q // heads.kv * dim, "q"), (dim, "k"), (dim, "v")] * heads.kv, ""  # Falcon from 40B on
    by_head = last == "query_key_value" or kind == "MiniMaxLightningAttention"
    if told is False or (by_head and told is None):
        if heads and out == 3 * heads.q * dim:
            return [(dim, role) for role in "qkv"] * heads.q, ""
        if heads and out % dim == 0:
            return [(dim, "qkv")] * (out // dim), "which heads are queries is not known"
        return [(out, "qkv")], "its heads are not known"
    if heads and out == (heads.q + 2 * heads.kv) * dim:
        return [(heads.q * dim, "q"), (heads.kv * dim, "k"), (heads.kv * dim, "v")], ""
    if out == 3 * inputs:
        return [(inputs, role) for role in "qkv"], ""
    return [(out, "qkv")], "sizes of q, k and v are not known"


def _heads_of(model: nn.Module, holder: nn.Module) -> _Heads | None:
    sources = list(_sources(model, holder))
    q = _first(sources, "num_attention_heads", "num_heads", "n_heads", "n_head")
    if q is None:
        return None
    kv = _first(sources, "num_key_value_heads", "num_kv_heads", "kv_n_heads", "kv_heads")
    dim = _first(sources, "head_dim", "head_size")
    if dim is None:
        hidden = _first(sources, "hidden_size", "embed_dim", "n_embd")
        dim = hidden // q if hidden is not None else None
    return _Heads(q, q if kv is None else kv, dim) if dim else None


def _sources(model: nn.Module, holder: nn.Module) -> Iterator[Any]:
    """Return where sizes are written down, nearest first: a vision tower has others than the text model."""
    yield holder
    yield getattr(holder, "config", None)
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    if get_text_config is not None:
        yield get_text_config()
    yield config


def _first(sources: Any, *names: str) -> int | None:
    """Return the first of the names that a source has, as a whole number."""
    for source in sources:
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
