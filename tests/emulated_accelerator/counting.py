# SPDX-License-Identifier: Apache-2.0
"""What a window of training costs on the emulated device: waits and launches by thread, pageable copies, and bytes.

`count` runs in a rank. Two depths of one model tell what belongs to a layer and what to a step.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.emulated_accelerator.cells import QUIET
from tests.methods import Entry, engine_of
from tests.toy import batch

ADAPTER = {"rows": 256, "experts": 32, "experts_per_token": 4, "keys_per_token": 16}
SUBSPACE = {"projectors": "random", "refit_interval": 0}
TILES = {"density": 0.3, "block_size": 32, "score": "magnitude"}
BLOCKS: dict[str, dict[str, Any]] = {
    "adapter, selection on the host": {"sparse_adapter": ADAPTER},
    "adapter, selection on the device": {"sparse_adapter": {**ADAPTER, "selection": "device"}},
    "adapter, spill": {"sparse_adapter": {**ADAPTER, "cache_rows": 48}},
    "subspace, state on the host": {"subspace": {**SUBSPACE, "state_device": "cpu"}},
    "subspace, state on the device": {"subspace": {**SUBSPACE, "state_device": "accelerator"}},
    "tiles, state on the host": {"sparse_matrix": {**TILES, "state_device": "cpu"}},
    "tiles, state on the device": {"sparse_matrix": {**TILES, "state_device": "accelerator"}},
}
WARM, COUNTED = 2, 2  # windows


def wide_llama(layers: int) -> nn.Module:
    """So wide that blocks of the device's allocator do not matter: 128 features, bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="eager",
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def count(folder: Path, name: str, layers: int) -> dict[str, Any]:
    """Train a few windows of one micro-batch; return what the last ones cost in all, and bytes.

    "waits", "pageable" and "launches" are by role: "training", "autograd" (the thread that runs backward) and "lane".
    "bare" are the launches of a forward and backward of the frozen model alone. Bytes on the device: of the "model" [in
    use, of its tensors], "ours" at rest [in use, planned], and "in passing", by how much more there is at peak.
    "locked" are [page-locked bytes, those of the host in all that the plan has].
    """
    from tests.emulated_accelerator import device

    backend = device.backend
    roles = {threading.get_native_id(): "training", _autograd_thread(device.DEVICE): "autograd"}
    backend.set_owner("model")
    model = wide_llama(layers).to(device.DEVICE)
    model_tensors = [*model.parameters(), *model.buffers()]
    bare = _bare(model, backend)
    backend.set_owner("ours")
    engine = engine_of(Entry(name=name, block=BLOCKS[name]), gas=1, model=model, precision="bf16", **QUIET)
    for step in range(WARM):
        _window(
            engine, step
        )  # not flushed: after that the next window would read weights, which others may have edited
    torch.accelerator.synchronize()
    backend.reset_counts()
    backend.reset_peaks()
    for step in range(COUNTED):
        _window(engine, step)
    engine.meft_flush()
    found: dict[str, Counter[str]] = {kind: Counter() for kind in ("synchronize", "pageable", "launch")}
    for (thread, kind, what), times in backend.counts().items():
        role = roles.get(thread, "lane")
        found[kind][role if kind == "launch" else f"{role}: {what}"] += times
    gc.collect()
    torch.accelerator.synchronize()
    plan, usage = engine._meft.plan, backend.device_usage()
    return {
        "waits": found["synchronize"],
        "pageable": found["pageable"],
        "launches": found["launch"],
        "bare": bare,
        "model": [usage["model"][0], sum(t.nbytes for t in model_tensors)],
        "ours": [usage["ours"][0], plan.device],
        "in passing": usage[""][1] - usage[""][0],
        "locked": [backend.pinned_usage()[1], plan.host],
    }


def _window(engine: Any, seed: int) -> None:
    engine.backward(engine(**{key: t.to(engine.device) for key, t in batch(seed).items()}).loss)
    engine.step()


def _autograd_thread(where: torch.device) -> int:
    """The thread in which torch runs the backward of tensors on the device, always the same one."""
    ids: list[int] = []
    x = torch.ones(1, device=where, requires_grad=True)
    x.register_hook(lambda grad: ids.append(threading.get_native_id()))
    x.sum().backward()
    return ids[0]


def _bare(model: nn.Module, backend: Any) -> int:
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    backend.reset_counts()
    model(**{key: t.to(model.device) for key, t in batch(0).items()}).loss.backward()
    launches = sum(times for (_, kind, _), times in backend.counts().items() if kind == "launch")
    model.zero_grad()
    model.requires_grad_(True)
    return launches
