# SPDX-License-Identifier: Apache-2.0
"""The ways of training that `quality.py` compares. Each takes the same model, batches and learning rates.

All clip the gradient they see to norm 1 and use Adam's defaults without weight decay, as the example does. The
gradient that full fine-tuning and GaLore clip is the whole one; that of the subspace method is made of the compressed
gradients and the uncompressed rest; those of LoRA and of sparse matrix tuning are the gradients of what they train.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

CLIP, BETAS, EPS = 1.0, (0.9, 0.999), 1e-8
COMPRESSED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_RANK, GALORE_RANK = 21, 33
"""About as many values (352,128 and 346,368) as S has at d = n/2 (351,232) on the embedded base."""
LORA_RANK_OF_TILES = 32
TILES = {"density": 0.1642, "block_size": 32, "warmup_steps": 20}
"""524 tiles of the embedded base are 536,576 values, exactly as many as adapters of rank 32 have on all its layers."""


class Learner(Protocol):
    """One way of training one model.

    Attributes:
        model: what is scored.
        compressed: values with moments that stand for the compressed matrices.
        state: all values with moments.
        scoring: first steps that change no weight.
    """

    model: Any
    compressed: int
    state: int
    scoring: int

    def step(self, batch: dict[str, Tensor], lr: float) -> float:
        """One update; the loss before it."""

    def finish(self) -> dict[str, Any]:
        """Wait for what is under way and report what is worth knowing."""

    def close(self) -> None:
        """Give up what is held."""


class Plain:
    """AdamW of torch on every parameter that has `requires_grad`: full fine-tuning, unless some have not."""

    scoring = 0

    def __init__(self, model: Any, compressed: int | None = None) -> None:
        self.model = model.train()
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, betas=BETAS, eps=EPS, weight_decay=0.0)
        self.state = sum(p.numel() for p in self.params)
        matrices = (p.numel() for name, p in model.named_parameters() if _is_compressed(name))
        self.compressed = sum(matrices) if compressed is None else compressed

    def step(self, batch: dict[str, Tensor], lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def finish(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class Engine:
    """The product: a DeepSpeed engine with one method's block, fp32, ZeRO-2, one rank."""

    scoring = 0

    def __init__(self, model: Any, block: dict[str, Any], batch: int) -> None:
        import deepspeed

        one_rank()
        config = {
            "train_batch_size": batch,
            "zero_optimization": {"stage": 2},
            "gradient_clipping": CLIP,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}},
            "steps_per_print": 10**9,
            "meft_offload": block,
        }
        self.engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
        self.model = self.engine.module.train()
        self.compressed = self.state = 0

    def step(self, batch: dict[str, Tensor], lr: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        loss = self.engine(**batch).loss
        self.engine.backward(loss)
        self.engine.step()
        return float(loss.detach())

    def finish(self) -> dict[str, Any]:
        self.engine.meft_flush()
        return {}

    def close(self) -> None:
        self.engine.destroy()


class Subspace(Engine):
    """ "subspace": the whole model trains."""

    def __init__(self, model: Any, block: dict[str, Any], batch: int) -> None:
        matrices = sum(p.numel() for name, p in model.named_parameters() if _is_compressed(name))
        rest = sum(p.numel() for p in model.parameters()) - matrices
        super().__init__(model, {"subspace": block}, batch)
        units = (unit for unit in self.engine.optimizer.pipeline.units if unit.wire == "subspace")
        self.compressed = sum(matrix.numel for unit in units for matrix in unit.matrices)
        self.state = self.compressed + rest

    def finish(self) -> dict[str, Any]:
        super().finish()
        bias = next(s for s in _dicts(self.engine.meft_stats()) if "held_out_bias_mean" in s)
        return {key: bias[key] for key in ("held_out_bias_mean", "held_out_bias_max", "checks", "check_s")}


class SparseMatrix(Engine):
    """ "sparse_matrix": nothing but tiles trains, once they are chosen."""

    def __init__(self, model: Any, block: dict[str, Any], batch: int) -> None:
        super().__init__(model, {"sparse_matrix": block}, batch)
        baseline = block["score"] in ("random", "magnitude")
        self.scoring = 0 if baseline else block["warmup_steps"]

    def finish(self) -> dict[str, Any]:
        super().finish()
        stats = self.engine.meft_stats()["sparse_matrix"]
        self.compressed = self.state = stats["parameters"]
        return {"tiles": stats["tiles"], "scoring_steps": self.scoring}


class GaLore(Plain):
    """Gradient low-rank projection (arXiv 2403.03507, algorithm 2), written from the paper.

    For W [m, n] with m <= n, every `interval` steps U, _, V = SVD(G) and P = U[:, :r]; R = P^T G goes through Adam,
    whose moments are kept over a change of P as they are; W <- W - lr * scale * P N. With m > n the right singular
    vectors do the same from the right. All other parameters get AdamW.

    The paper's fixed factor (0.25) is replaced by sqrt(min(m, n) / r), which gives the update the RMS of Adam's, as
    `"scale": "adam"` does for the subspace method; otherwise one learning rate could not suit both parts.
    """

    def __init__(self, model: Any, rank: int = GALORE_RANK, interval: int = 100) -> None:
        self.matrices = [p for name, p in model.named_parameters() if _is_compressed(name)]
        small = sum(rank * max(p.shape) for p in self.matrices)
        super().__init__(model, small)
        self.state += small - sum(p.numel() for p in self.matrices)
        chosen = {id(p) for p in self.matrices}
        others = [p for p in self.params if id(p) not in chosen]
        self.optimizer = torch.optim.AdamW(others, betas=BETAS, eps=EPS, weight_decay=0.0)
        self.rank, self.interval, self.steps = rank, interval, 0
        self.projectors: list[Tensor] = []
        self.moments: list[tuple[Tensor, Tensor]] = []

    def step(self, batch: dict[str, Tensor], lr: float) -> float:
        loss = self.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, CLIP)
        if self.steps % self.interval == 0:
            self.projectors = [self._projector(_wide(p.grad)) for p in self.matrices]
        if not self.moments:
            shapes = [(self.rank, max(p.shape)) for p in self.matrices]
            self.moments = [(torch.zeros(shape), torch.zeros(shape)) for shape in shapes]
        self.steps += 1
        for w, p, (m, v) in zip(self.matrices, self.projectors, self.moments, strict=True):
            self._update(w, p, m, v, lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.model.zero_grad()
        return float(loss.detach())

    def _projector(self, g: Tensor) -> Tensor:
        return torch.linalg.svd(g, full_matrices=False).U[:, : self.rank].contiguous()

    @torch.no_grad()
    def _update(self, w: Tensor, p: Tensor, m: Tensor, v: Tensor, lr: float) -> None:
        r = p.T @ _wide(w.grad)
        m.lerp_(r, 1 - BETAS[0])
        v.lerp_(r.square(), 1 - BETAS[1])
        scale = (v / (1 - BETAS[1] ** self.steps)).sqrt_().add_(EPS)
        n = m / (1 - BETAS[0] ** self.steps) / scale
        _wide(w).sub_(p @ n, alpha=lr * math.sqrt(p.shape[0] / self.rank))


def lora(model: Any, rest: bool, rank: int = LORA_RANK) -> Plain:
    """peft's LoRA on the matrices that the subspace method compresses; with `rest` all other parameters train too."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(COMPRESSED)))
    for name, p in wrapped.named_parameters():
        if rest and not _is_compressed(name):
            p.requires_grad_(True)
    return Plain(wrapped, sum(p.numel() for name, p in wrapped.named_parameters() if "lora_" in name))


def subspace(**block: Any) -> Callable[[Any, int, int], Learner]:
    def make(model: Any, seed: int, batch: int) -> Learner:
        return Subspace(model, {"dim": 0.5, "seed": seed, **block}, batch)

    return make


def tiles(**block: Any) -> Callable[[Any, int, int], Learner]:
    def make(model: Any, seed: int, batch: int) -> Learner:
        return SparseMatrix(model, {**TILES, "score": "abs_mean", "seed": seed, **block}, batch)

    return make


# (model, seed, batch) -> Learner
METHODS: dict[str, Callable[[Any, int, int], Learner]] = {
    "full": lambda model, seed, batch: Plain(model),
    "lsp_k4": subspace(nonzeros=4, refit_interval=100, projectors="learned"),
    "lsp_k8": subspace(nonzeros=8, refit_interval=100, projectors="learned"),
    "lsp_no_refit": subspace(nonzeros=4, refit_interval=0, projectors="learned"),
    "lsp_unscaled": subspace(nonzeros=4, refit_interval=0, projectors="random", scale=1.0),
    "lsp_random_fixed": subspace(nonzeros=4, refit_interval=0, projectors="random"),
    "lsp_random_redrawn": subspace(nonzeros=4, refit_interval=100, projectors="random"),
    "lora": lambda model, seed, batch: lora(model, rest=True),
    "lora_only": lambda model, seed, batch: lora(model, rest=False),
    "lora_equal": lambda model, seed, batch: lora(model, rest=False, rank=LORA_RANK_OF_TILES),
    "galore": lambda model, seed, batch: GaLore(model),
    "smt": tiles(budget="global"),
    "smt_per_module": tiles(budget="per_module"),
    "smt_mean_abs": tiles(score="mean_abs", budget="global"),
    "smt_paper": tiles(score="paper", preset="paper"),
    "smt_magnitude": tiles(score="magnitude", budget="global"),
    "smt_random": tiles(score="random", budget="global"),
}


def one_rank() -> None:
    """The environment of a launcher with one rank."""
    if torch.distributed.is_initialized():
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)


def _is_compressed(name: str) -> bool:
    """Weights of the linear layers that the subspace method compresses, also under peft's names."""
    return "lora_" not in name and any(f".{module}." in name for module in COMPRESSED)


def _wide(w: Any) -> Tensor:
    """w, transposed if it is taller than wide; a view."""
    return w if w.shape[0] <= w.shape[1] else w.T


def _dicts(value: Any) -> list[dict[str, Any]]:
    """All dicts nested in a dict, itself included."""
    if not isinstance(value, dict):
        return []
    return [value, *(inner for child in value.values() for inner in _dicts(child))]
