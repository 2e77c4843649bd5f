# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama, its data and its ds_config, and an oracle of the adapted model in plain torch autograd."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor, nn

from tests.ranks import free_port

VOCAB, HIDDEN, LAYERS = 61, 16, 2
ADAPTER = {"rows": 40, "experts": 7, "experts_per_token": 3, "keys_per_token": 9}

# DeepSpeed trains in fp16 only where oneDNN has kernels for it, which is on the newest Intel alone. torch computes in
# fp16 on any CPU, so we tell DeepSpeed that it is there. Every test and every program of the tests imports this file.
CPU_Accelerator.is_fp16_supported = lambda self: True


def tiny_llama(seed: int = 0, layers: int = LAYERS) -> nn.Module:
    """Randomly initialised; 2 layers of width 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            attn_implementation="eager",
            # With a cache, keys are copied into another layout, for which MKL has another kernel on AMD. Gradient
            # checkpointing takes the cache away, so the bits would depend on it.
            use_cache=False,
        )
    )


def batch(seed: int, rows: int = 4, length: int = 8) -> dict[str, Tensor]:
    """Token ids and labels; the last two positions of the first row are padding."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = ids.clone()
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def ds_config(
    *, precision: str = "fp32", block: Any = ..., gas: int = 1, micro: int = 4, **extra: Any
) -> dict[str, Any]:
    """A ds_config with the block (leave it out with block=None)."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": gas,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.01}},
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if block is ...:
        block = {"sparse_adapter": dict(ADAPTER)}
    if block is not None:
        config["meft_offload"] = block
    else:  # DeepSpeed would build its own AdamW for a minute; the launcher's baselines run that
        config["optimizer"]["params"]["torch_adam"] = True
    return {**config, **extra}


def single_rank() -> None:
    """The environment of a launcher with one rank, unless we already run under a launcher."""
    if torch.distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    here = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    os.environ.update(here)


def make_engine(config: dict[str, Any], model: nn.Module | None = None, **kwargs: Any) -> Any:
    """`deepspeed.initialize` on a tiny Llama, one rank."""
    import deepspeed

    single_rank()
    model = tiny_llama() if model is None else model
    if "optimizer" in config and "optimizer" not in kwargs:
        kwargs.setdefault("model_parameters", list(model.parameters()))
    return deepspeed.initialize(model=model, config=copy.deepcopy(config), **kwargs)[0]


def train(engine: Any, steps: int, *, first_seed: int = 100, rows: int = 4, distinct: int = 10**9) -> list[float]:
    """The raw loop, over `distinct` batches again and again; returns the loss of every micro-batch."""
    losses = []
    gas = engine.gradient_accumulation_steps()
    for micro in range(steps * gas):
        inputs = {k: t.to(engine.device) for k, t in batch(first_seed + micro % distinct, rows).items()}
        loss = engine(**inputs).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    if hasattr(engine, "meft_flush"):
        engine.meft_flush()  # callers read weights by themselves
    return losses


def state_of(engine: Any) -> dict[str, Tensor]:
    """Copies of everything that training changes: host state of all units, and the model's trainable tensors."""
    engine.optimizer.pipeline.flush()
    state = {
        f"{unit.name}.{key}": t.clone()
        for unit in engine.optimizer.pipeline.units
        for key, t in unit.state_tensors().items()
    }
    return state | {n: p.detach().clone() for n, p in engine.module.named_parameters() if p.requires_grad}


class DenseOracle(nn.Module):
    """The adapter's function over all rows with a mask, by autograd, written from the paper's equations alone."""

    def __init__(self, keys: Tensor, values: Tensor, router: Tensor, starts: Tensor, E: int, K: int) -> None:
        super().__init__()
        self.keys, self.values, self.router = nn.Parameter(keys), nn.Parameter(values), nn.Parameter(router)
        sizes = starts[1:] - starts[:-1]
        self.expert_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        self.E, self.K = E, K

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        p = flat @ self.router.T
        chosen = torch.zeros_like(p, dtype=torch.bool)
        chosen.scatter_(1, p.detach().argsort(dim=1, descending=True, stable=True)[:, : self.E], True)
        s = p[:, self.expert_of] * (flat @ self.keys.T)
        usable = chosen[:, self.expert_of] & (s > 0)
        if valid is not None:
            usable &= valid.reshape(-1, 1).bool()
        score = torch.where(usable, s, -torch.inf).detach()
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        z = torch.where(usable & (rank < self.K), s, 0.0)
        return (z @ self.values).view_as(x)


def oracle_model(engine: Any) -> tuple[nn.Module, list[DenseOracle]]:
    """A frozen copy of the engine's base with dense oracles beside its FFNs, in the state the engine is in now."""
    from meft_ds.sparse_adapter.forward.router import expert_starts

    sizes = engine._meft_methods[0].sizes
    model = tiny_llama()
    model.load_state_dict(
        {k: t.clone().float() for k, t in engine.module.state_dict().items() if "meft_adapter" not in k}
    )
    model.requires_grad_(False)
    oracles: list[DenseOracle] = []
    current: dict[str, Tensor | None] = {"mask": None}
    model.register_forward_pre_hook(
        lambda module, args, kwargs: current.update(mask=kwargs.get("attention_mask")), with_kwargs=True
    )
    for layer, adapter in zip(model.model.layers, engine._meft_methods[0].adapters, strict=True):
        rows = adapter.rows.master.clone().float()
        oracle = DenseOracle(
            rows[:, : sizes.d].clone(),
            rows[:, sizes.d :].clone(),
            adapter.router.weight.detach().clone().float(),
            expert_starts(sizes.rows, sizes.experts),
            sizes.experts_per_token,
            sizes.keys_per_token,
        )
        oracles.append(oracle)
        layer.mlp.register_forward_hook(lambda m, args, out, o=oracle: out + o(args[0], current["mask"]))
    return model, oracles
