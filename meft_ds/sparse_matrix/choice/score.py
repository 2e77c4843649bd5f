# SPDX-License-Identifier: Apache-2.0
"""Scores tiles by their gradients over a few windows, and trains nothing.

Weights stay as they are. A linear layer hands over its activations, its gradient is made a stripe of rows at a time,
reduced to one number per tile and dropped; of a stacked expert tensor autograd makes the gradient, and it is dropped as
soon as it is scored. Only "paper" keeps gradients: the sums over all batches and over the open window's, on the host.

The kinds, for the gradients g_b of the micro-batches b of all ranks, |R| elements in tile R:

    abs_mean  sum over b of sum_R |g_b| / |R|           (default)
    l2        sum over b of sqrt(sum_R g_b^2 / |R|)
    mean_abs  sum over b of |sum_R g_b| / |R|           from sums over tokens: no gradient is made at all
    paper     sum_R |sum over b of g_b| / |R|           (SMT, section 3: the accumulated gradient)

Of a layer that a forward calls several times, all kinds but "paper" take each call's gradient for itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meft_ds.offload.model.capture import as_matrices, hand_over, tap, untap
from meft_ds.offload.ranks import Ranks
from meft_ds.sparse_matrix.discover import Site

_STRIPE = 1 << 21  # most elements of a stripe, unless one row of tiles has more


class Scorer:
    """Listens to the sites' gradients until `release`.

    Args:
        sites: their weights must require grad.
        kind: see the module's docstring.
        ranks: whose scores are summed.
        device: of the model.
        anchor: see `meft_ds.offload.model.capture.tap`.

    Attributes:
        windows: those that counted.
    """

    def __init__(
        self, sites: Sequence[Site], kind: str, ranks: Ranks, device: torch.device, anchor: Tensor | None = None
    ) -> None:
        self._sites, self._kind, self._ranks, self._device = list(sites), kind, ranks, device
        self.windows = 0
        self._saw = False  # something, in the open window
        self._unscale = 1.0
        self._window = [torch.zeros(site.grid, dtype=torch.float64, device=device) for site in sites]
        self._total = [torch.zeros_like(scores) for scores in self._window]
        # float32 sums of whole gradients, on the host; the open window's apart, because it may come to nothing
        self._sums = [torch.zeros(site.shape, device="cpu") for site in sites] if kind == "paper" else []
        self._open_sums = [torch.zeros_like(total) for total in self._sums]
        # one for all layers of a shape: together they would take as much as a few matrices
        cuts = {cuts for site in sites for cuts in (site.rows, site.cols)}
        edges = {cut: _indicator(cut, device) for cut in cuts}
        self._edges = [(edges[site.rows], edges[site.cols]) for site in sites]
        self._counts = [tile_elements(site).to(device) for site in sites]
        self._hooks: list[Any] = []
        for index, site in enumerate(sites):
            if site.tapped:
                tap(site.module, self, index, anchor=anchor)
            # of a tapped layer too: its weight may also be read elsewhere, and that gradient must not stay
            if site.weight.requires_grad:
                self._hooks.append(hand_over(site.weight, self, index))

    @staticmethod
    def host_bytes(sites: Sequence[Site], kind: str) -> int:
        """Return the bytes that a rank's scorer holds on the host."""
        return 8 * sum(site.shape.numel() for site in sites) if kind == "paper" else 0

    def release(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()
        for site in self._sites:
            if site.tapped:
                untap(site.module, self)

    # -- gradients -----------------------------------------------------------------------------------------------------

    def begin_window(self, loss_factor: float) -> None:
        """Begin a window whose losses are multiplied by `loss_factor`."""
        self._unscale = 1.0 / loss_factor

    def tapped(self, index: int, x: Tensor, dy: Tensor) -> None:
        """Score the gradient of a linear layer: x [..., in], dy [..., out]."""
        x, dy = as_matrices(x, dy)
        site = self._sites[index]
        left, right = (x, dy) if site.input_first else (dy, x)
        if self._kind == "mean_abs":
            rows, cols = self._edges[index]
            self._add(index, 0, slice(None), ((left.float() @ rows).t() @ (right.float() @ cols)).abs_())
            return
        for lo, hi, r in _stripes(site):
            self._stripe(index, 0, lo, hi, r, left[:, lo:hi].t() @ right)

    @torch.no_grad()
    def take(self, index: int, grad: Tensor) -> None:
        """Score a whole gradient that autograd made."""
        site = self._sites[index]
        for expert in range(site.grid[0]):
            g = grad if grad.dim() == 2 else grad[expert]
            for lo, hi, r in _stripes(site):
                self._stripe(index, expert, lo, hi, r, g[lo:hi])

    def _stripe(self, index: int, expert: int, lo: int, hi: int, r: slice, g: Tensor) -> None:
        """Score the gradient of rows [lo, hi), which are the tiles' rows `r`."""
        rows, cols = self._edges[index]
        if self._kind == "paper":
            self._remember(index, expert, lo, hi, g)
            return
        g = g.float()
        if self._kind == "abs_mean":
            g.abs_()  # in place, because nobody else has it and one matrix is enough
        elif self._kind == "l2":
            g.square_()
        found = rows[lo:hi, r].t() @ (g @ cols)
        if self._kind == "l2":
            found = found.double().mul_(self._counts[index][r]).sqrt_()
        self._add(index, expert, r, found.abs_() if self._kind == "mean_abs" else found)

    def _add(self, index: int, expert: int, r: slice, found: Tensor) -> None:
        self._saw = True
        self._window[index][expert, r] += found.double() * self._unscale

    def _remember(self, index: int, expert: int, lo: int, hi: int, g: Tensor) -> None:
        self._saw = True
        whole = self._open_sums[index]
        matrix = whole if whole.dim() == 2 else whole[expert]
        matrix[lo:hi] += g.float().mul_(self._unscale).cpu()

    # -- windows -------------------------------------------------------------------------------------------------------

    def close_window(self) -> bool:
        """End a window: keep its scores if every rank's are finite, else drop them. Collective."""
        seen = [*self._window, *self._open_sums]
        local = float(sum(not bool(part.isfinite().all()) for part in seen))
        (bad,) = self._ranks.sum([local], self._device)
        if not bad:
            self.windows += 1
            for total, part in zip([*self._total, *self._sums], seen, strict=True):
                total += part
        self.drop_window()
        return not bad

    def drop_window(self) -> None:
        """Forget what the open window has seen."""
        if self._saw:
            for part in (*self._window, *self._open_sums):
                part.zero_()
        self._saw = False

    def scores(self) -> dict[str, Tensor]:
        """Return the scores by the weights' names: float64 [experts, R, C] on the host. Collective.

        A score is the mean over windows of the sum over a window's micro-batches. All ranks get the same bits.
        """
        found = self._totals()
        for site, total in zip(self._sites, self._sums, strict=False):  # "paper" alone has sums
            found[site.name] = self._of_sum(site, self._reduced([total])[0])
        counts = zip(self._sites, self._counts, strict=True)
        return {site.name: found[site.name] / count.cpu() / max(self.windows, 1) for site, count in counts}

    def _totals(self) -> dict[str, Tensor]:
        return dict(zip((site.name for site in self._sites), self._reduced(self._total), strict=True))

    def _reduced(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the sums over ranks, on the host."""
        if self._ranks.world == 1:
            return [t.cpu() for t in tensors]
        flat = torch.cat([t.reshape(-1) for t in tensors]).to(self._device)
        dist.all_reduce(flat, group=self._ranks.group)
        parts = flat.cpu().split([t.numel() for t in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def _of_sum(self, site: Site, total: Tensor) -> Tensor:
        rows, cols = _indicator(site.rows, total.device), _indicator(site.cols, total.device)
        found = torch.zeros(site.grid, dtype=torch.float64, device="cpu")
        for expert in range(site.grid[0]):
            matrix = total if total.dim() == 2 else total[expert]
            for lo, hi, r in _stripes(site):
                found[expert, r] = (rows[lo:hi, r].t() @ (matrix[lo:hi].abs() @ cols)).double()
        return found

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """Return what two runs must agree in so that their scores may be added; JSON."""
        grids = [[site.name, site.rows, site.cols, site.experts] for site in self._sites]
        return {"score": self._kind, "tiles": hashlib.sha256(json.dumps(grids).encode()).hexdigest()}

    def check(self, saved: Mapping[str, Any]) -> None:
        """Refuse scores of a run whose `about` is not this one's.

        Raises:
            ValueError: for scores of another kind, or of other tiles.
        """
        here = self.about()
        if saved.get("score") != here["score"]:
            raise ValueError(
                f"the checkpoint was saved while sparse_matrix.score {saved.get('score')!r} was taken, this run has "
                f"{here['score']!r}; make them equal, or start anew"
            )
        if saved.get("tiles") != here["tiles"]:
            raise ValueError(
                "the checkpoint was saved while other tiles were scored; make sparse_matrix.block_size, "
                "target_modules, segments, budget and preset, and meft_offload.train, those of the run that saved "
                "it, or start anew"
            )

    def state(self) -> dict[str, Tensor]:
        """Return the sums over ranks so far, on the host. Collective."""
        state = self._totals()
        for site, total in zip(self._sites, self._sums, strict=False):
            state[f"{site.name}.sum"] = self._reduced([total])[0]
        return state

    def load_state(self, state: dict[str, Tensor], windows: int) -> None:
        """Take back what `state` gave: the first rank goes on with the sums of all."""
        self.windows = windows
        mine = float(self._ranks.rank == 0)
        for site, total in zip(self._sites, self._total, strict=True):
            total.copy_(state[site.name].mul(mine))
        for site, total in zip(self._sites, self._sums, strict=False):
            total.copy_(state[f"{site.name}.sum"].mul(mine))
        self.drop_window()


def _indicator(cuts: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Return [n, len(cuts)], 1 where an index lies in a cut: a product with it sums over cuts in a fixed order."""
    found = torch.zeros(cuts[-1][1], len(cuts), device=device)
    for k, (lo, hi) in enumerate(cuts):
        found[lo:hi, k] = 1.0
    return found


def _stripes(site: Site) -> list[tuple[int, int, slice]]:
    """Return stripes of whole tiles: (first row, end, which rows of the grid)."""
    width = site.cols[-1][1]
    found: list[tuple[int, int, slice]] = []
    first = 0
    for k, (_, hi) in enumerate(site.rows):
        following = site.rows[k + 1][1] if k + 1 < len(site.rows) else None
        if following is None or (following - site.rows[first][0]) * width > _STRIPE:
            found.append((site.rows[first][0], hi, slice(first, k + 1)))
            first = k + 1
    return found


def tile_elements(site: Site) -> Tensor:
    """Return the elements of each tile, [R, C]."""
    rows, cols = (
        torch.tensor([hi - lo for lo, hi in cuts], dtype=torch.float64, device="cpu") for cuts in (site.rows, site.cols)
    )
    return rows[:, None] * cols[None, :]
