# SPDX-License-Identifier: Apache-2.0
"""Programs whose first window gives some matrices, or all of them, no gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods import differing, everything
from tests.toy import batch, ds_config, make_engine

LATE = "layers.1.weight"


class Two(nn.Module):
    """The second layer is not used before the `first`-th forward."""

    def __init__(self, first: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.n, self.first = nn.Embedding(64, 32), 0, first
        self.layers = nn.ModuleList([nn.Linear(32, 32, bias=False) for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        h = self.layers[0](self.emb(ids)).tanh()
        if self.n >= self.first:
            h = h + self.layers[1](h)
        self.n += 1
        return (h - 1).square().mean()


def engine_of(model: nn.Module, precision: str = "fp32", **settings: Any) -> Any:
    return make_engine(ds_config(block={"subspace": {"fit_steps": 5, **settings}}, precision=precision), model)


def step(engine: Any, seed: int, factor: float = 1.0) -> None:
    ids = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(seed))
    engine.backward(engine(ids) * factor)
    engine.step()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "gradient" in r.getMessage() and r.name == "meft_ds"]


def test_a_layer_that_the_first_windows_do_not_use_is_fitted_when_it_is_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="meft_ds"):
        engine = engine_of(Two(first=2))
        for seed in range(4):
            step(engine, seed)
            stats = engine.meft_stats()["subspace"]
            assert stats["waiting_for_gradient"] == ([LATE] if seed < 2 else [])
    assert stats["bias"][LATE]["step"] == 2 and stats["bias"][LATE]["held_out"] < stats["bias"][LATE]["before"]
    assert stats["checks"] == 2
    unreached, fitted = told(caplog)
    assert "no gradient reached 1 of 2 matrices in the first window" in unreached and LATE in unreached
    assert "1 more matrices got their first gradient" in fitted and "0 wait" in fitted


def test_a_first_window_of_zeros_is_no_fit(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="meft_ds"):
        engine = make_engine(ds_config(block={"subspace": {"fit_steps": 2}}))
        for n in range(3):
            engine.backward(engine(**batch(n)).loss * (0.0 if n == 0 else 1.0))
            engine.step()
    stats = engine.meft_stats()["subspace"]
    assert stats["held_out_bias_mean"] is not None and all(b["step"] == 1 for b in stats["bias"].values())
    assert len(told(caplog)) == 2 and "no gradient reached 14 of 14" in told(caplog)[0]


def test_ordinary_models_and_random_projectors_get_no_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="meft_ds"):
        for model, projectors in ((Two(first=0), "learned"), (Two(first=9), "random")):
            engine = engine_of(model, projectors=projectors)
            step(engine, 0)
            step(engine, 1)
            assert engine.meft_stats()["subspace"]["waiting_for_gradient"] == []
    assert told(caplog) == []


@pytest.mark.parametrize("when", [1, 3], ids=["before the fit", "after it"])
def test_a_run_that_resumes_goes_on_waiting_and_fits_the_same(tmp_path: Path, when: int) -> None:
    whole = engine_of(Two(first=2))
    for seed in range(5):
        step(whole, seed)
    first = engine_of(Two(first=2))
    for seed in range(when):
        step(first, seed)
    first.save_checkpoint(str(tmp_path))
    second = engine_of(Two(first=2 - when))
    second.load_checkpoint(str(tmp_path))
    for seed in range(when, 5):
        step(second, seed)
    assert differing(everything(whole), everything(second)) == []
