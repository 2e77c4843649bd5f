# SPDX-License-Identifier: Apache-2.0
"""One cell of the table, as a rank runs it: an architecture trains with a method in a stage, saves, resumes, exports.

Importing this loads the model classes, so that the ranks forked from a process that has done so only have to run.
"""

from __future__ import annotations

import math
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import meft_ds
from meft_ds.offload.model.discover import Sharing, output_heads, weights
from tests.architectures.models import Architecture, Batch, architectures
from tests.architectures.table import PROOFS
from tests.toy import ds_config, make_engine

for _architecture in architectures().values():
    _architecture.cls  # noqa: B018 - transformers imports a class when it is asked for

BLOCKS: dict[str, dict[str, Any]] = {
    "sparse_adapter": {"sparse_adapter": {}},
    "subspace": {"subspace": {"fit_steps": 2}},  # more of them make a difference in rounding one of losses
    "sparse_matrix": {"sparse_matrix": {"density": 0.1, "block_size": 8, "warmup_steps": 2}},
}
_WATCHED = {"sparse_matrix": 2}  # steps that train nothing
_BEFORE, _AFTER = 3, 3  # steps that train before and after the checkpoint
_SAME_LOSS, _SAME_LOGITS = 1e-4, 1e-3
_NO_GRADIENT = 1e-5  # of the largest one: what is below it is rounding, as of the bias of an attention's keys


class Fault(Exception):
    """A proof failed."""


def run_cell(folder: Path, architecture: str, method: str, stage: int) -> dict[str, Any]:
    """By proof: what is wrong, "" for nothing; or what was "refused". And the `losses` by step."""
    a = architectures()[architecture]
    found: dict[str, Any] = {}
    try:
        cell = Cell(a, method, stage, folder)
    except ValueError as refusal:
        if not _is_ours(refusal):
            raise
        return {"refused": " ".join(str(refusal).split()), "losses": []}
    for proof in PROOFS:
        try:
            getattr(cell, proof)()
            found[proof] = ""
        except Exception as fault:
            traceback.print_exc()
            found[proof] = _told(fault)
            if proof in ("trains", "saves"):
                break
    return {**found, "losses": cell.losses}


class Cell:
    """An engine of the architecture, and what it must show."""

    def __init__(self, a: Architecture, method: str, stage: int, folder: Path) -> None:
        self.a, self.method, self.stage, self.folder = a, method, stage, folder
        self.batch = a.batch()
        self.losses: list[float] = []
        self.engine = self._engine(seed=0)

    def trains(self) -> None:
        """The first loss is the plain model's, losses fall, and everything that the method trains has moved."""
        plain = self.a.make()
        loss = plain(**self.batch).loss
        loss.backward()
        before = self._whole(self.engine)
        self.losses += _steps(self.engine, self.batch, _WATCHED.get(self.method, 0) + _BEFORE)
        after = self._whole(self.engine)
        if abs(self.losses[0] - loss.item()) > _SAME_LOSS:
            raise Fault(f"the first loss is {self.losses[0]:.5f}, of the plain model {loss.item():.5f}")
        if not all(map(math.isfinite, self.losses)) or self.losses[-1] > self.losses[0] - 0.01:
            raise Fault(f"losses do not fall: {self.losses}")
        if dist.get_rank() == 0:
            still = [name for name in self._must_move(plain, before) if torch.equal(before[name], after[name])]
            if still:
                raise Fault(f"{len(still)} tensors have not moved: {', '.join(still[:8])}")

    def saves(self) -> None:
        self.engine.save_checkpoint(str(self.folder / "saved"))
        self.losses += _steps(self.engine, self.batch, _AFTER)

    def resumes(self) -> None:
        """A new engine, on other weights, goes on bit for bit."""
        again = self._engine(seed=1)
        path, _ = again.load_checkpoint(str(self.folder / "saved"))
        if path is None:
            raise Fault("load_checkpoint found nothing")
        losses = _steps(again, self.batch, _AFTER)
        if losses != self.losses[-_AFTER:]:
            raise Fault(f"losses are {losses}, without interruption {self.losses[-_AFTER:]}")
        expected, found = self._whole(self.engine), self._whole(again)
        differ = [name for name, t in expected.items() if not torch.equal(t, found[name])]
        if differ:
            raise Fault(f"{len(differ)} tensors differ from a run without interruption: {', '.join(differ[:8])}")

    def exports(self) -> None:
        """Plain transformers loads what `save_pretrained` and `save_16bit_model` wrote, and computes the same."""
        folder = self.folder / "export"
        self.engine.eval()
        with torch.no_grad():
            expected = self.engine(**self.batch).logits
        model = self.engine.module
        state = {"state_dict": self.engine._zero3_consolidated_16bit_state_dict()} if self.stage == 3 else {}
        self.engine.save_16bit_model(str(folder), "plain.bin")
        if dist.get_rank() != 0:
            return
        model.save_pretrained(folder, **state)
        loaded, info = self.a.cls.from_pretrained(folder, output_loading_info=True)
        wrong = {key: list(names)[:6] for key, names in info.items() if names}
        if wrong:
            raise Fault(f"from_pretrained: {wrong}")
        self._check_logits(loaded, expected, folder, "save_pretrained")
        other = self.a.make(seed=1)
        missing, unexpected = other.load_state_dict(torch.load(folder / "plain.bin", weights_only=True), strict=False)
        if unexpected or set(missing) - _tied(other):
            raise Fault(f"save_16bit_model: missing {missing[:6]}, unexpected {unexpected[:6]}")
        self._check_logits(other, expected, folder, "save_16bit_model")

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _engine(self, seed: int) -> Any:
        zero = {
            "stage": self.stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        config = ds_config(block=BLOCKS[self.method], micro=3, zero_optimization=zero)
        config["optimizer"]["params"]["lr"] = 5e-3
        return make_engine(config, self.a.make(seed))

    def _whole(self, engine: Any) -> dict[str, Tensor]:
        """Copies of everything that trains or may train, whole, on the first rank."""
        engine.meft_flush()
        state = engine._zero3_consolidated_16bit_state_dict() if self.stage == 3 else engine.module.state_dict()
        if self.method == "sparse_adapter":
            rows = {f"rows of layer {k}": a.rows.master for k, a in enumerate(engine._meft_methods[0].adapters)}
            state = (state or {}) | rows
        return {name: t.detach().clone() for name, t in (state or {}).items()}

    def _must_move(self, plain: nn.Module, state: dict[str, Tensor]) -> list[str]:
        """Names of tensors that a step must change."""
        if self.method == "sparse_adapter":
            own = [name for name in state if name.startswith("rows of layer ") or "meft_adapter" in name]
            if len(own) != 2 * (self.a.ffns or 0):
                raise Fault(f"{len(own) // 2} adapters, expected {self.a.ffns}")
            return own
        largest = max(p.grad.abs().max().item() for p in plain.parameters() if p.grad is not None)
        moving = {
            id(p) for p in plain.parameters() if p.grad is not None and p.grad.abs().max() > _NO_GRADIENT * largest
        }
        if self.method == "sparse_matrix":
            sharing, heads = Sharing(plain), output_heads(plain)
            moving &= {id(w) for _, m, _, w in weights(plain) if m not in heads and not sharing.shares(m, w)}
        return [name for name, p in plain.named_parameters() if id(p) in moving]

    def _check_logits(self, model: nn.Module, expected: Tensor, folder: Path, how: str) -> None:
        model.eval()
        if self.method == "sparse_adapter":
            meft_ds.load_adapter(model, folder)
        with torch.no_grad():
            logits = model(**self.batch).logits
        apart = (logits - expected).abs().max().item()
        if not apart <= _SAME_LOGITS:
            raise Fault(f"logits of what {how} wrote are {apart:.2g} apart")


def _steps(engine: Any, batch: Batch, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def _tied(model: nn.Module) -> set[str]:
    """Names that stand for a tensor that another name stands for too."""
    once = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - once


def _told(fault: Exception) -> str:
    if isinstance(fault, Fault):
        return str(fault)
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"


def _is_ours(refusal: BaseException) -> bool:
    """Whether meft-ds raised it."""
    return "/meft_ds/" in traceback.extract_tb(refusal.__traceback__)[-1].filename.replace("\\", "/")
