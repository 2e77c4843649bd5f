# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_zero3.py do: many short trainings in stages 2 and 3."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from meft_ds.plugin.zero3 import consolidated
from tests.offload.overlap import make_late
from tests.toy import ADAPTER, batch, ds_config, make_engine, state_of, tiny_llama

ROWS = 8  # of the global batch, whatever the number of ranks
BATCHES = 4  # distinct ones, again and again
LEARNED = {"projectors": "learned", "fit_steps": 2, "refit_interval": 5, "refit_threshold": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "adapter": {"sparse_adapter": dict(ADAPTER)},
    "adapter and norms": {"sparse_adapter": dict(ADAPTER), "train": ["norm", "embed"]},
    "subspace learned": {"subspace": {"nonzeros": 2, **LEARNED}},
    "subspace random": {"subspace": {"nonzeros": 2, "projectors": "random"}},
    "tiles": {"sparse_matrix": {"density": 0.1, "block_size": 8, "warmup_steps": 2}},
}
TILES_AT_ONCE = {"sparse_matrix": {"density": 0.3, "block_size": 8, "score": "magnitude"}}
ONE_OF_EACH = ("adapter and norms", "subspace learned", "tiles")


def engine_for(
    method: str,
    stage: int,
    *,
    zero: dict[str, Any] | None = None,
    model: nn.Module | None = None,
    checkpointing: str = "",
    mode: str = "exact",
    gas: int = 1,
    eps: float = 1e-4,
    late: bool = False,
    **extra: Any,
) -> Any:
    # every parameter is partitioned and gathered again, unless a case wants it otherwise
    settings = {"stage3_param_persistence_threshold": 0, **(zero or {})} if stage == 3 else {}
    block = {**METHODS.get(method, TILES_AT_ONCE), "schedule": {"mode": mode}}
    micro = ROWS // int(os.environ["WORLD_SIZE"])
    config = ds_config(block=block, micro=micro, gas=gas, zero_optimization={"stage": stage, **settings}, **extra)
    # with a tiny eps AdamW turns rounding differences of near-zero gradients into whole steps
    config["optimizer"]["params"]["eps"] = eps
    model = tiny_llama() if model is None else model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    engine = make_engine(config, model)
    if late:
        make_late(engine.optimizer.pipeline, 10 + dist.get_rank())
    return engine


def share(seed: int) -> dict[str, Tensor]:
    """This rank's part of the global batch. A check of projectors fits to the first half of each rank's tokens, so the
    rows go where all numbers of ranks see the same halves."""
    whole = batch(100 + seed % BATCHES, rows=ROWS)
    whole["attention_mask"][:] = 1
    whole["labels"] = whole["input_ids"].clone()
    world, rank = dist.get_world_size(), dist.get_rank()
    half = ROWS // 2 // world
    first, second = range(rank * half, (rank + 1) * half), range(ROWS // 2 + rank * half, ROWS // 2 + (rank + 1) * half)
    return {k: t[[*first, *second]] for k, t in whole.items()}


def ordinary_loss(engine: Any, inputs: dict[str, Tensor]) -> Tensor:
    return engine(**inputs).loss


def fused_loss(engine: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What programs with a fused loss do: they call the inner model, and read the head's weight by themselves. The same
    loss as the model's own."""
    model = engine.module
    hidden = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    logits = nn.functional.linear(hidden[:, :-1], model.lm_head.weight).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())


def train(
    engine: Any,
    steps: int,
    first: int = 0,
    between: Callable[[], None] = lambda: None,
    loss_of: Callable[[Any, dict[str, Tensor]], Tensor] = ordinary_loss,
) -> list[float]:
    """Losses of the global batches, the same on every rank."""
    losses = []
    gas = engine.gradient_accumulation_steps()
    for micro in range(first * gas, (first + steps) * gas):
        head = [engine.module.lm_head.weight] if loss_of is fused_loss else []
        with deepspeed.zero.GatheredParameters(head):  # as ZeRO-3 asks of such programs; nothing in other stages
            loss = loss_of(engine, share(micro))
            engine.backward(loss)
        engine.step()
        losses.append(loss.detach().double())
        between()
    found = torch.stack(losses)
    dist.all_reduce(found)
    return (found / dist.get_world_size()).tolist()


def weights_of(engine: Any) -> dict[str, Tensor]:
    """The whole weights, on the first rank."""
    engine.meft_flush()
    if hasattr(next(engine.module.parameters()), "ds_id"):
        return consolidated(engine.module) or {}
    return {name: t.detach().clone() for name, t in engine.module.state_dict().items()} if dist.get_rank() == 0 else {}


def digest(engine: Any) -> str:
    """Of all weights and this rank's part of the state; partitioned parameters count once, as whole weights."""
    found = hashlib.sha256()
    whole = weights_of(engine)
    state = {name: t for name, t in state_of(engine).items() if "layer" in name and ".self_attn" not in name}
    units = {f"{u.name}.{k}": t for u in engine.optimizer.pipeline.units for k, t in u.state_tensors().items()}
    for name, t in [*sorted(whole.items()), *sorted((n, units[n]) for n in state if n in units)]:
        found.update(name.encode() + t.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def destroyed(engine: Any) -> Iterator[Any]:
    yield engine
    engine.destroy()


# -- cases -------------------------------------------------------------------------------------------------------------


def curves(
    folder: Path, *, steps: int = 8, stages: tuple[int, ...] = (2, 3), eps: float = 1e-4, score: str = ""
) -> dict[str, Any]:
    """Losses by method and stage; `score` of tiles: one that sees no gradients."""
    found: dict[str, Any] = {}
    if score:
        tiles = METHODS["tiles"]["sparse_matrix"]
        del tiles["warmup_steps"]
        tiles["score"] = score
    for method in METHODS:
        for stage in stages:
            with destroyed(engine_for(method, stage, eps=eps)) as engine:
                found[f"{method} {stage}"] = train(engine, steps)
    return found


def bits(folder: Path) -> dict[str, Any]:
    """Stage 3 twice, and by schedule, with lanes that are late at random."""
    found: dict[str, Any] = {}
    for method in METHODS:
        for name, mode in (("exact", "exact"), ("again", "exact"), ("serial", "serial"), ("eager", "eager")):
            with destroyed(engine_for(method, 3, mode=mode, gas=2, late=mode != "serial", eps=1e-8)) as engine:
                found[f"{method} {name}"] = {"losses": train(engine, 7), "digest": digest(engine)}
    return found


def tied_llama() -> nn.Module:
    from transformers import LlamaForCausalLM

    config = tiny_llama().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def with_biases() -> nn.Module:
    """Its linear layers for queries, keys and values have a bias, which makes their output a view of their product."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    of_llama = tiny_llama().config.to_dict()
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = Qwen2Config(**{key: of_llama[key] for key in shared}, num_key_value_heads=2, initializer_range=0.3)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.3)
    return model


def _evaluating(engine: Any) -> None:
    engine.eval()
    with torch.no_grad():
        engine(**share(3))
    engine.train()


SETTINGS: dict[str, dict[str, Any]] = {
    "persistent": {"zero": {"stage3_param_persistence_threshold": 100_000}},
    "some persistent": {"zero": {"stage3_param_persistence_threshold": 100}},
    "no prefetch": {"zero": {"stage3_prefetch_bucket_size": 0}},
    "few live": {"zero": {"stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 0}},
    "offload_param": {"zero": {"offload_param": {"device": "cpu", "pin_memory": False}}},
    "accumulation": {"gas": 2},
    "reentrant": {"checkpointing": "reentrant", "gas": 2},
    "nonreentrant": {"checkpointing": "nonreentrant", "gas": 2},
    "tied": {"model": tied_llama},
    "fused loss": {"loss_of": fused_loss},
    "biases": {"model": with_biases},
    "evaluation": {"evaluate": True},
    "bf16": {"precision": "bf16"},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}


def settings(folder: Path, *, only: dict[str, list[str]] | None = None) -> dict[str, Any]:
    """Losses of stages 2 and 3 in each setting, or in some with some methods."""
    found: dict[str, Any] = {}
    known: dict[str, list[float]] = {}  # stage 2 knows nothing of most settings
    for name, given in SETTINGS.items():
        for method in ONE_OF_EACH if only is None else only.get(name, ()):
            for stage in (2, 3):
                options = dict(given)
                if stage == 2:
                    options.pop("zero", None)
                key = f"{method}{stage}{options}"
                if key not in known:
                    evaluate, model = options.pop("evaluate", False), options.pop("model", tiny_llama)()
                    loss_of = options.pop("loss_of", ordinary_loss)
                    with destroyed(engine_for(method, stage, model=model, **options)) as engine:
                        between = partial(_evaluating, engine) if evaluate else lambda: None
                        known[key] = train(engine, 6, between=between, loss_of=loss_of)
                found[f"{name}/{method}/{stage}"] = known[key]
    return found


def overflow(folder: Path) -> dict[str, Any]:
    """fp16 with an infinite gradient on one rank in one window."""
    found: dict[str, Any] = {}
    for method in ONE_OF_EACH:
        for stage in (2, 3):
            extra = {"precision": "fp16", "gas": 2}
            with destroyed(engine_for(method, stage, **extra)) as engine:
                engine.optimizer.loss_scaler.cur_hysteresis = engine.optimizer.loss_scaler.delayed_shift = 1
                losses = train(engine, 4)
                before, scale = digest(engine), engine.optimizer.cur_scale
                for micro in range(2):
                    loss = engine(**share(micro)).loss
                    engine.backward(loss * (float("inf") if micro == dist.get_rank() % 2 == 0 else 1.0))
                    engine.step()
                after, lowered = digest(engine), engine.optimizer.cur_scale
                found[f"{method} {stage}"] = {
                    "unchanged": before == after,
                    "scale": [scale, lowered],
                    "skipped": engine.optimizer.overflow,
                    "losses": losses + train(engine, 2),
                }
    return found


def pending(folder: Path) -> dict[str, Any]:
    """What each module's forward reads while every update takes long, and which weights were gathered ahead of it."""
    found: dict[str, Any] = {}
    for method in ("adapter and norms", "subspace learned", "tiles at once"):
        read: dict[str, list[dict[str, str]]] = {}
        for name in ("serial", "slow"):
            mode = "serial" if name == "serial" else "exact"
            with destroyed(engine_for(method, 3, mode=mode)) as engine:
                if name != "serial":
                    _slow(engine.optimizer.pipeline)
                read[name], ahead = _reads(engine, 5)
            found[f"{method} {name}"] = {"same": read[name] == read["serial"], "ahead": ahead}
    return found


def _slow(pipeline: Any) -> None:
    submit = pipeline._lanes.host.submit

    def late(job: Any, *, urgent: bool = False) -> None:
        def slow() -> None:
            time.sleep(0.0 if urgent else 0.02)
            job()

        submit(slow, urgent=urgent)

    pipeline._lanes.host.submit = late


def _reads(engine: Any, steps: int) -> tuple[list[dict[str, str]], int]:
    """By step: a digest of each weight as its module read it; and how many had been gathered ahead while their update
    was under way."""
    pipeline = engine.optimizer.pipeline
    of = {id(p): pipeline._of[id(unit)] for unit in pipeline.units for _, p in getattr(unit, "params", ())}
    seen: dict[str, str] = {}
    ahead: list[str] = []
    handles = []

    def after(name: str, module: nn.Module, args: Any) -> None:
        for key, p in module._parameters.items():
            if p is not None:
                seen[f"{name}.{key}"] = hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()

    needed = pipeline.needed

    def watched(unit: Any) -> None:
        entry = pipeline._of[id(unit)]
        if entry.pending and sys._getframe(1).f_code.co_name == "wait_for":  # of a gather, not of the module's gate
            ahead.append(unit.name)
        needed(unit)

    pipeline.needed = watched
    for name, module in engine.module.named_modules():
        if any(id(p) in of for p in module._parameters.values() if p is not None):
            handles.append(module.register_forward_pre_hook(partial(after, name)))
    found = []
    for step in range(steps):
        seen.clear()
        engine.backward(engine(**share(step)).loss)
        engine.step()
        found.append(dict(seen))
    for handle in handles:
        handle.remove()
    del pipeline.needed
    return found, len(ahead)


def memory(folder: Path) -> dict[str, Any]:
    """Bytes of the base that a rank holds between steps, and storages of gathered weights alive after forward."""
    found: dict[str, Any] = {}
    variants = {
        "adapter": {},
        "subspace learned, autocast": SETTINGS["autocast"],
        "tiles, autocast": SETTINGS["autocast"],
        "subspace learned, persistent": SETTINGS["persistent"],
    }
    for name, options in variants.items():
        with destroyed(engine_for(name.partition(",")[0], 3, **options)) as engine:
            train(engine, 3)
            engine.meft_flush()
            params = list(engine.module.parameters())
            whole = sum(p.ds_numel * p.element_size() for p in params)
            held = sum(p.ds_tensor.untyped_storage().nbytes() for p in params)
            gathered = sum(p.untyped_storage().nbytes() for p in params if p.ds_status.name != "NOT_AVAILABLE")
            loss, weights = _saved_by(engine)
            found[name] = {
                "whole": whole,
                "held": held,
                "gathered": gathered,
                "parameters": len(params),
                "saved": weights,
            }
            engine.backward(loss)
            engine.step()
    return found


def _saved_by(engine: Any) -> tuple[Tensor, list[str]]:
    """The loss of a forward, and the names of linear layers whose whole weight autograd keeps alive afterwards, in
    whatever precision."""
    alive: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if not hasattr(t, "ds_id"):  # the parameter itself is empty by now
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = engine(**share(0)).loss
    kept = set()
    for name, module in engine.module.named_modules():
        if type(module) is nn.Linear:
            with deepspeed.zero.GatheredParameters([module.weight]):
                w = module.weight.detach()
                for t in alive:
                    kept |= {name for v in (t, t.t() if t.dim() == 2 else t) if torch.equal(v, w.to(v.dtype))}
    return loss, sorted(kept)
