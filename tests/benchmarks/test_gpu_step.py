# SPDX-License-Identifier: Apache-2.0
"""The step benchmark: its tiny preset runs anywhere, and what goes wrong in a row becomes a row."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.child_process import run_child
from benchmarks.gpu_step import depths, in_order
from benchmarks.gpu_step_rows import ROWS, cap_memory
from benchmarks.gpu_step_trace import summary
from benchmarks.models import SHAPES
from meft_ds.offload.host.memory import state_on_device

ROOT = Path(__file__).resolve().parents[2]
WRITE_OK = "from benchmarks.child_process import write_result; write_result({'status': 'ok', 'own_peak_bytes': 2**30})"
GIB = 2**30


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]


def _run(out: Path, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_step.py"), "--models", "tiny", "--out", str(out)]
    small = ["--steps", "2", "--seq-len", "16", "--micro-batch", "2"]
    done = subprocess.run([*command, *small, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text())
    return report["rows"]


@pytest.mark.slow
def test_tiny_preset_measures_each_method_and_keeps_what_was_seen(tmp_path: Path) -> None:
    ours = ("subspace-cpu", "adapter", "tiles-cpu")
    rows = _run(tmp_path / "report.json", "--rows", ",".join(["torch", "native", *ours]))
    assert [row["row"] for row in rows] == ["torch", "subspace-cpu", "adapter", "tiles-cpu", "native"]
    for row in rows:
        assert row["status"] == "ok", row
        assert row["s_per_step_min"] <= row["s_per_step"] <= row["s_per_step_max"]
        assert row["practicality"] == rows[0]["s_per_step"] / row["s_per_step"]
        assert 0 < len(row["profile"]["table"]) <= 12
        assert row["loss_last"] < row["loss_first"]
        if row["row"] in ours:
            assert row["state_on"] == ["cpu"]
            assert row["meft_stats"]["step_s"] > 0 and row["bytes_down"] > 0 and row["bytes_up"] > 0


@pytest.mark.slow
def test_a_reference_that_does_not_fit_is_extrapolated_and_all_that_compare_say_so(tmp_path: Path) -> None:
    # a cap that four layers with fp32 masters exceed, and two do not
    torch_row, adapter = _run(tmp_path / "report.json", "--rows", "torch,adapter", "--memory-cap-gb", "0.01")
    assert torch_row["status"] == adapter["status"] == "ok"
    assert torch_row["extrapolated_from_layers"] == [1, 2]
    one, two = (measured["s_per_step"] for measured in torch_row["measured"])
    assert torch_row["s_per_step"] == pytest.approx(two + 2 * (two - one))
    assert adapter["practicality_of"] == "extrapolated from 1 and 2 layers"


def test_no_row_starts_after_its_minutes(tmp_path: Path) -> None:
    rows = _run(tmp_path / "report.json", "--rows", "torch,zero2_offload", "--minutes", "0.1")
    assert [row["status"] for row in rows] == ["not run: the 0.1 minutes are over"] * 2


def test_rows_run_in_the_order_of_what_they_tell() -> None:
    order = in_order(["1.3b", "3b"], [row for row in ROWS if row != "given"], [1, 4])
    assert order[0] == ("1.3b", "torch", 1)
    assert {accumulation for *_, accumulation in order[: len(order) // 2]} == {1}
    at = {(model, row): order.index((model, row, 1)) for model in ("1.3b", "3b") for row in ("adapter", "zenflow")}
    assert at["1.3b", "adapter"] < at["3b", "adapter"] < at["1.3b", "zenflow"] < at["3b", "zenflow"]


@pytest.mark.parametrize(
    ("model", "row", "device", "host", "expected"),
    [
        ("7b", "torch", 80, 128, (8, 16)),
        ("7b", "torch", 140, 128, (32,)),
        ("3b", "torch", 80, 128, (26,)),
        ("3b", "native", 80, 128, (26,)),
        ("7b", "zero2_offload", 80, 96, (8, 16)),
        ("7b", "adapter", 4, 4, (32,)),
        ("7b", "native", 4, 128, ()),
    ],
)
def test_what_does_not_fit_is_measured_at_two_depths(
    model: str, row: str, device: int, host: int, expected: tuple[int, ...]
) -> None:
    assert depths(model, row, device * GIB, host * GIB) == expected


def test_shapes_count_the_parameters_of_their_models() -> None:
    from benchmarks.models import llama

    for layers in (1, 4):
        model = llama(SHAPES["tiny"], seq_len=16, device="meta", layers=layers)
        assert sum(p.numel() for p in model.parameters()) == SHAPES["tiny"].parameters(layers)
        assert next(model.parameters()).dtype == torch.bfloat16


def test_a_memory_cap_counts_for_the_placement_of_state_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    properties = SimpleNamespace(name="a card", total_memory=80 * GIB)
    runtime = SimpleNamespace(
        get_device_properties=lambda device=None: properties,
        set_per_process_memory_fraction=lambda share, device: shares.append(share),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: runtime)
    device = torch.device("cuda", 0)
    assert state_on_device("auto", device, 2 * GIB)
    cap_memory(runtime, device, 24)
    assert shares == [24 / 80] and runtime.get_device_properties(device).name == "a card"
    assert not state_on_device("auto", device, 2 * GIB)


def test_a_trace_is_summed_up_per_step() -> None:
    def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    events = [
        event("kernel", "gemm", 1000, 2000),
        event("kernel", "gemm", 2000, 2000),  # overlaps the first
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 4000, 500, bytes=300),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 4000, 3000, bytes=100),
        event("cuda_runtime", "cudaLaunchKernel", 0, 10),
        event("cuda_driver", "cuLaunchKernelEx", 20, 10),
        event("cuda_runtime", "cudaStreamSynchronize", 40, 4000),
        {"ph": "M", "name": "process_name"},
    ]
    found = summary(events, steps=2)
    assert (found["bytes_down"], found["bytes_up"]) == (150, 50)
    assert (found["kernel_ms"], found["device_ms"]) == (1.5, 3.0)
    assert (found["launches"], found["waits"], found["wait_ms"]) == (1, 0.5, 2.0)
    assert found["table"][0]["ms"] == 2.0 and len(found["table"]) == 6


def test_result_counts_whatever_the_exit_code() -> None:
    result = run_child(_python(f"{WRITE_OK}\nimport os; os._exit(3)"), timeout_s=60)
    assert result["status"] == "ok"
    assert result["host_gib"] == 1.0


def test_child_over_its_time_is_ended_with_all_that_it_started() -> None:
    code = "import subprocess, time\nsubprocess.Popen(['sleep', '987654'])\ntime.sleep(600)"
    result = run_child(_python(code), timeout_s=2)
    assert result["status"] == "over its time limit"
    assert "987654" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_child_that_fails_says_why() -> None:
    result = run_child(_python("raise RuntimeError('no such kernel')"), timeout_s=60)
    assert result["status"] == "failed with exit code 1: RuntimeError: no such kernel"


def test_child_killed_for_memory_is_named_so() -> None:
    result = run_child(_python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), timeout_s=60)
    assert result["status"].startswith("killed, most likely for host memory")
