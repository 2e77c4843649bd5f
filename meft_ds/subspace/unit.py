# SPDX-License-Identifier: Apache-2.0
"""The `subspace` wire format: S = P^T G Q of a layer's matrices goes down, Adam's direction dS comes up, and the device
applies W <- W - lr * scale * P dS Q^T, weight decay in the same pass (LSP-Offload, section 3).

Each rank holds the moments of its 1/N of the layer's S, flattened one after another. The clipping norm is that of S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from meft_ds import ops
from meft_ds.offload.flat_unit import FlatUnit, Place
from meft_ds.offload.model.weights import numel_of, shape_of
from meft_ds.offload.unit import Footprint
from meft_ds.ops.adam import AdamHyper
from meft_ds.ops.projector import Projector, compress, seed_of
from meft_ds.subspace.fit import transport
from meft_ds.subspace.matrix import Matrix


class SubspaceUnit(FlatUnit):
    """One layer's compressed matrices of one parameter group.

    Args:
        place: where it stands.
        stack: which of the model's lists of blocks the layer is in; the later, the deeper.
        matrices: with their places in `params` and in the flat vector.
        modules: by index in `params`, those whose activations give S; None where the gradient does.
        scale: factor on updates, or "adam" for `Matrix.adam_scale`.
        residual: keep what rounding loses (bf16, fp16), instead of rounding stochastically.
        seed: of stochastic rounding.
        learned: whether projectors are fitted, so that matrices wait for their first gradient.
        arriving: called before a gradient is added, so that deeper units may calibrate.
        captured_all: called when all gradients of a backward have been captured.
    """

    wire = "subspace"

    def __init__(
        self,
        place: Place,
        *,
        matrices: list[Matrix],
        modules: list[nn.Module | None],
        scale: float | str,
        residual: bool,
        seed: int,
        learned: bool,
        arriving: Callable[[SubspaceUnit], None],
        captured_all: Callable[[SubspaceUnit], None],
        stack: int = 0,
    ) -> None:
        numel = sum(matrix.numel for matrix in matrices)
        super().__init__(place, numel=numel, state_bytes=2 * place.moments_dtype.itemsize, modules=modules)
        self.matrices, self.depth = matrices, (stack, place.layer)
        self._of_param = [[m for m in matrices if m.param == index] for index in range(len(place.params))]
        self.sides = list({id(side): side for m in matrices for side in (m.left, m.right)}.values())
        self._scale, self._seed = scale, seed
        self._keep_residual = residual and self._dtype != torch.float32
        self._residuals: list[Tensor] = []
        self._learned, self._arriving, self._captured_all = learned, arriving, captured_all
        self.step = 0
        self.awaited = self._never_measured()  # no gradient has reached them yet
        self.asked: list[Matrix] = []  # what is still to calibrate in this window
        self._bias_before: list[dict[str, float]] = []  # of a calibrating window
        self.captured: dict[int, list[tuple[Tensor, Tensor | None]]] = {}
        self._sketched: dict[int, tuple[Tensor, Tensor]] = {}

    def allocate(self) -> None:
        """Also take the moments."""
        super().allocate()
        where = self._device if self.on_device else torch.device("cpu")
        self.exp_avg = torch.zeros(self._hi - self._lo, dtype=self._moments_dtype, device=where)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        if self._keep_residual:
            self._residuals = [torch.zeros(shape_of(p), device=self._device) for _, p in self.params]

    def footprint(self) -> Footprint:
        plain = super().footprint()
        residual = 4 * sum(numel_of(p) for _, p in self.params) if self._keep_residual else 0
        return replace(plain, device=plain.device + residual + sum(side.projector.nbytes() for side in self.sides))

    # -- gradients -----------------------------------------------------------------------------------------------------

    def capture(self, asked: list[Matrix], *, step: int) -> None:
        """Capture the gradients of `asked` in the window after `step` updates, instead of adding their S."""
        self.step, self.asked = step, asked
        self._bias_before = [matrix.bias for matrix in self.matrices]

    def tapped(self, index: int, x: Tensor, dy: Tensor) -> None:
        """Take what a backward brings by a linear layer: x [..., in], dy [..., out]."""
        self._begin()
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        (matrix,) = self._of_param[index]
        if matrix in self.asked:
            self.captured.setdefault(index, []).append((x, dy))
        else:
            self._add_product(matrix, self._input_sketch(matrix, x), dy)
        self._received(index)

    def add_gradient(self, index: int, grad: Tensor) -> None:
        if any(matrix in self.asked for matrix in self._of_param[index]):
            self.captured.setdefault(index, []).append((grad, None))
        for matrix in self._of_param[index]:
            if matrix not in self.asked:
                self._add_compressed(matrix, grad)

    def _add_compressed(self, matrix: Matrix, grad: Tensor) -> None:
        g = grad if matrix.expert is None else grad[matrix.expert]
        self.add(matrix, compress(g, matrix.left.projector, matrix.right.projector))

    def add(self, matrix: Matrix, s: Tensor) -> None:
        """Add S [d, d] of one matrix to the window's sum."""
        matrix.part(self._acc).add_(s)

    def reached(self) -> Tensor:
        """Return which of the asked matrices got a gradient that is not zero on this rank: float32 [asked]."""
        found = torch.zeros(len(self.asked), device=self._device)
        for at, matrix in enumerate(self.asked):
            for given, dy in self.captured.get(matrix.param, []):
                g = given if matrix.expert is None else given[matrix.expert]
                found[at] += g.any() if dy is None else g.any() & dy.any()
        return found

    def add_captured(self, matrix: Matrix) -> None:
        """Add S of what was captured of a matrix that keeps its projectors."""
        for given, dy in self.captured.get(matrix.param, []):
            if dy is None:
                self._add_compressed(matrix, given)
            else:
                self._add_product(matrix, self._input_sketch(matrix, given), dy)

    def gradients(self, matrix: Matrix) -> tuple[Tensor, Tensor | None]:
        """Return what a calibrating backward captured of a matrix, float32 [m, n].

        These are the gradient of the first half of the tokens and that of the others; or the whole and None where
        autograd made it. Zeros if this rank saw nothing.

        For a matrix of its own the captured tensors are given up.
        """
        own = matrix.expert is None
        captured = self.captured.pop(matrix.param, []) if own else self.captured.get(matrix.param, [])
        shape = matrix.left.projector.m, matrix.right.projector.m
        first = torch.zeros(shape, device=self._device)
        second: Tensor | None = None
        for given, dy in captured:
            if dy is None:
                first += given if own else given[matrix.expert]
                continue
            second = torch.zeros_like(first) if second is None else second
            a, b = (given, dy) if matrix.input_first else (dy, given)
            half = (len(a) + 1) // 2
            first += a[:half].t() @ b[:half].to(a.dtype)
            second += a[half:].t() @ b[half:].to(a.dtype)
        if second is None and self._modules[matrix.param] is not None:
            second = torch.zeros_like(first)  # other ranks have two parts
        return first, second

    def calibrated(self, *, complete: bool) -> None:
        """End the capture: all matrices have their projectors and S of what was captured."""
        self.asked = []
        self.captured.clear()
        self._sketched.clear()  # what was sketched before may be of other projectors
        if complete:
            super()._all_received()

    def _begin(self) -> None:
        self._arriving(self)
        super()._begin()

    def _all_received(self) -> None:
        self._sketched.clear()
        if self.asked:
            self._captured_all(self)
        else:
            super()._all_received()

    def _input_sketch(self, matrix: Matrix, x: Tensor) -> Tensor:
        """X Q; siblings that read the same tensor find it made."""
        side = matrix.input
        known = self._sketched.get(id(side))
        if known is not None and _same(known[0], x):
            return known[1]
        sketch = ops.sketch(x.contiguous(), *side.projector.columns)
        if side.users > 1:
            self._sketched[id(side)] = x, sketch
        return sketch

    def _add_product(self, matrix: Matrix, xq: Tensor, dy: Tensor) -> None:
        dyp = ops.sketch(dy.contiguous(), *matrix.output.projector.columns)
        first, second = (xq, dyp) if matrix.input_first else (dyp, xq)
        part = matrix.part(self._acc)
        if first.dtype == second.dtype == torch.float32:
            part.addmm_(first.t(), second)
        else:
            part.add_(first.t() @ second.to(first.dtype))

    # -- stages --------------------------------------------------------------------------------------------------------

    def update(self, grad: Tensor, reply: Tensor, hyper: AdamHyper, *, step: int, grad_scale: float) -> None:
        ops.adam_direction_(self.exp_avg, self.exp_avg_sq, grad, reply, hyper, step=step, grad_scale=grad_scale)

    def change(self, reply: Tensor) -> None:
        if self._update is None:
            return  # state that was just loaded; the weights came with the model
        hyper, step, _ = self._update
        for index, (_, p) in enumerate(self.params):
            for matrix in self._of_param[index]:
                for piece in self.weights.pieces(p, matrix.expert):
                    # the parts of a partitioned matrix draw rounding bits of their own
                    name = matrix.name if piece.first is None else f"{matrix.name}@{piece.first}"
                    residual = self._residuals[index] if self._residuals else None
                    ops.subspace_apply_(
                        piece.weight,
                        matrix.part(reply),
                        _sliced(matrix.left.projector, piece.rows),
                        _sliced(matrix.right.projector, piece.cols),
                        alpha=-hyper.lr * (matrix.adam_scale() if self._scale == "adam" else float(self._scale)),
                        decay=1.0 - hyper.lr * hyper.weight_decay,
                        key=seed_of(self._seed, name),
                        step=step,
                        residual=residual if residual is None or matrix.expert is None else residual[matrix.expert],
                    )
            self.weights.changed(p)

    def keep_calibration(self) -> None:
        """Carry the moments over to the projectors that this window switched to, if it did. Collective."""
        changed = [m for m in self.matrices if m.left.before is not None or m.right.before is not None]
        if changed and self.step > 0:  # moments of the first window are zero
            moments = (t.to(torch.float32, copy=True) for t in (self.exp_avg, self.exp_avg_sq))
            exp_avg, exp_avg_sq = (self.gathered(own) for own in moments)
            for m in changed:
                p, q = m.left, m.right
                first, second = transport(
                    m.part(exp_avg).to(self._device),
                    m.part(exp_avg_sq).to(self._device),
                    p.before or p.projector,
                    p.projector,
                    q.before or q.projector,
                    q.projector,
                )
                m.part(exp_avg).copy_(first)
                m.part(exp_avg_sq).copy_(second)
            self.exp_avg.copy_(exp_avg[self._lo : self._hi])
            self.exp_avg_sq.copy_(exp_avg_sq[self._lo : self._hi])
        for matrix in changed:
            matrix.fitted = True
        for side in self.sides:
            side.before = None
        self._bias_before = []
        self.awaited = self._never_measured()

    def forget(self) -> None:
        self._undo_calibration()
        self._sketched.clear()
        super().forget()

    def discard(self) -> None:
        self._undo_calibration()
        super().discard()

    def _undo_calibration(self) -> None:
        for side in self.sides:
            if side.before is not None:
                side.projector, side.before = side.before, None
        for matrix, bias in zip(self.matrices, self._bias_before, strict=False):  # empty in other windows
            matrix.bias = bias
        self._bias_before = []
        self.asked = []
        self.captured.clear()

    def _never_measured(self) -> list[Matrix]:
        return [m for m in self.matrices if not m.bias] if self._learned else []

    def _open_window(self) -> None:
        self._sketched.clear()
        super()._open_window()

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def shared_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for side in self.sides:
            tensors[f"{side.name}.index"], tensors[f"{side.name}.value"] = side.projector.rows
        for (name, _), residual in zip(self.params, self._residuals, strict=False):
            tensors[f"{name}.residual"] = residual
        return tensors

    def load_shared(self, tensors: dict[str, Tensor]) -> None:
        for side in self.sides:
            index = tensors[f"{side.name}.index"].to(self._device)
            side.projector = Projector(index, tensors[f"{side.name}.value"].to(self._device), side.projector.dim)
            side.before = None
        for (name, _), residual in zip(self.params, self._residuals, strict=False):
            residual.copy_(tensors[f"{name}.residual"])

    def scalars(self) -> dict[str, Any]:
        return {"matrices": {m.name: {"fitted": m.fitted, "bias": m.bias} for m in self.matrices}}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        for matrix in self.matrices:
            saved = scalars["matrices"][matrix.name]
            matrix.fitted, matrix.bias = bool(saved["fitted"]), dict(saved["bias"])
        self.awaited = self._never_measured()

    def after_load(self) -> None:
        self._update = None
        self._reply.zero_()


def _sliced(projector: Projector, rows: slice) -> tuple[Tensor, Tensor]:
    index, value = projector.rows
    return index[rows], value[rows]


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are one; the first is kept alive, so its memory cannot be another's."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a._version == b._version
    )
