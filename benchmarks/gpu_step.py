# SPDX-License-Identifier: Apache-2.0
"""Training steps side by side on one accelerator: full fine-tuning, ZeRO-2 offload, ZenFlow, LoRA and our methods.

    python benchmarks/gpu_step.py --models 1.3b,3b,7b --minutes 10 --out gpu_step.json
    python benchmarks/gpu_step.py --models 7b --memory-cap-gb 24               # as on a smaller card
    python benchmarks/gpu_step.py --models tiny                                # no accelerator: a check of the program

Llama-architecture models with random weights, random tokens, bf16, clipping on, one process, no network. Every row runs
in its own fresh process with a time limit, so that no row's memory or caches are another's; one that runs out of memory
or fails becomes a row that says so. Rows run in the order of what they tell; "not run" are those for which no time was
left.

  torch          full fine-tuning with PyTorch alone: fused AdamW, fp32 masters. What the others are compared with
  native         DeepSpeed stage 0, full fine-tuning, the same kernel: it copies each tensor by itself
  zero2_offload  ds_configs/zero2_offload.json: DeepSpeedCPUAdam, pinned host memory, overlapped communication
  zenflow        ds_configs/zenflow.json; it replaces the accumulation by its own update interval, so one of its steps
                 is a window of the same number of micro-batches, and whole update intervals are timed
  lora           peft, r = 32 on all linear layers
  adapter, subspace, tiles
                 {"sparse_adapter": {}}, {"subspace": {}}, {"sparse_matrix": {}}: the defaults, but for what happens
                 once before training (two steps of fitting, one of scoring)
  ...-cpu        with "state_device": "cpu"; by default a large card keeps the state of a small model, and then nothing
                 is offloaded
  ...-eager, ...-serial
                 in another mode of the schedule than "exact"
  given          the block of --meft-block

Columns: s/step (median over windows, least, most), tokens/s, practicality (torch's s/step over this s/step, same
accumulation), peak device memory of torch, peak host memory of the process tree, and MiB per step each way as PyTorch's
profiler saw them on the bus (on a CPU nothing crosses a bus: our own counters only).

What does not fit whole is measured at two depths that fit, and its time per step is extrapolated over the layers, which
are all alike. Its row says so, and so do figures that compare with it. The last line is JSON. It has more of each row:
all times, device memory by stage, `meft_stats`, where the state was, and what the profiler saw of one step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.child_process import run_child  # noqa: E402
from benchmarks.gpu_step_rows import ROWS, run_row  # noqa: E402
from benchmarks.machine import machine, machine_line  # noqa: E402
from benchmarks.models import SHAPES  # noqa: E402
from meft_ds.offload.host.memory import free_host_bytes  # noqa: E402

COLUMNS = (
    *("s_per_step", "s_per_step_min", "s_per_step_max", "tokens_per_s", "practicality"),
    *("device_gib", "host_gib", "mib_down", "mib_up"),
)
EXTRAPOLATED = ("s_per_step", "mib_down", "mib_up")
REFERENCE = "torch"
LEAST_SECONDS = 10.0
"""No row starts with less time left."""
FILLS = 0.85
"""Of a memory, that weights and states may take by the estimate: activations and buffers need the rest."""


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        run_row(json.loads(arguments.child))
        return
    hardware = _hardware()
    print(f"Device: {hardware['device']}; {machine_line(hardware)}; {hardware['host_gib']} GiB host memory")
    print(f"{arguments.seq_len} tokens x {arguments.micro_batch} per micro-batch")
    print(f"{'model':6}{'row':20}{'accum.':>7}" + "".join(f"{name.replace('s_per_step_', ''):>14}" for name in COLUMNS))
    report: dict[str, Any] = {
        "benchmark": "gpu_step",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware,
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("out", "child")},
        "rows": [],
    }
    runner = _Runner(arguments, hardware)
    for model, row, accumulation in in_order(arguments.models, arguments.rows, arguments.accumulation):
        result = runner.run(model, row, accumulation)
        report["rows"].append(result)
        _compare(report["rows"], result)
        _print_row(result)
        if arguments.out:  # after each row: whoever ends us has what there is
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def in_order(models: list[str], rows: list[str], accumulations: list[int]) -> list[tuple[str, str, int]]:
    """Order (model, row, accumulation) by what a row tells.

    A further accumulation repeats everything, so it comes last. Before that the first model's rows of the next value
    come together with the second model's of this one.
    """
    return sorted(
        ((model, row, accumulation) for accumulation in accumulations for model in models for row in rows),
        key=lambda one: (
            accumulations.index(one[2]),
            ROWS[one[1]].value + models.index(one[0]),
            models.index(one[0]),
            list(ROWS).index(one[1]),
        ),
    )


def depths(model: str, row: str, device_bytes: float, host_bytes: float) -> tuple[int, ...]:
    """Return the number of layers to measure: all, or two fewer ones that fit into the memories if all do not."""
    shape, takes = SHAPES[model], ROWS[row]

    def fits(layers: int) -> bool:
        parameters = shape.parameters(layers)
        return (
            takes.device_bytes * parameters <= FILLS * device_bytes
            and takes.host_bytes * parameters <= FILLS * host_bytes
        )

    if fits(shape.layers):
        return (shape.layers,)
    most = max((n for n in range(2, shape.layers // 2 + 1) if fits(n)), default=0)
    return (most // 2, most) if most else ()


class _Runner:
    """Runs rows until the minutes are over."""

    def __init__(self, arguments: argparse.Namespace, hardware: dict[str, Any]) -> None:
        self._arguments = arguments
        self._deadline = time.monotonic() + arguments.minutes * 60
        cap = (arguments.memory_cap_gb or float("inf")) * 2**30
        self._device_bytes = min(hardware["device_bytes"] or float("inf"), cap)
        self._host_bytes = hardware["free_host_bytes"]
        self._built = False

    def run(self, model: str, row: str, accumulation: int) -> dict[str, Any]:
        """Return a row's result; `status` says what happened."""
        spec = {"model": model, "row": row, "accumulation": accumulation}
        named: dict[str, Any] = dict(spec)
        if ROWS[row].cpu_adam and not self._built and self._left() >= LEAST_SECONDS:
            # before the row's own clock runs, so that none pays for it or is ended in it
            self._built = True
            named["build"] = self._child({"row": "build"}, limit=self._left())
        layers = depths(model, row, self._device_bytes, self._host_bytes)
        if not layers:
            return {**named, "status": "does not fit, and no two depths to extrapolate from do"}
        outcomes = [self._measure({**spec, "layers": count}) for count in layers]
        if len(layers) == 1:
            return {**named, **outcomes[0]}
        failed = next((n for n, outcome in zip(layers, outcomes, strict=True) if outcome["status"] != "ok"), None)
        if failed is not None:
            return {**named, "status": f"at {failed} layers: {outcomes[layers.index(failed)]['status']}"}
        return {**named, **self._extrapolated(model, layers, outcomes, accumulation)}

    def _measure(self, spec: dict[str, Any]) -> dict[str, Any]:
        left, arguments = self._left(), self._arguments
        if left < LEAST_SECONDS:
            return {"status": f"not run: the {arguments.minutes:g} minutes are over"}
        names = ("steps", "seq_len", "micro_batch", "memory_cap_gb", "checkpointing", "meft_block")
        return self._child(
            {**spec, **{name: getattr(arguments, name) for name in names}}, min(left, arguments.row_seconds)
        )

    def _extrapolated(
        self, model: str, layers: tuple[int, ...], outcomes: list[dict[str, Any]], accumulation: int
    ) -> dict[str, Any]:
        (few, many), (less, more) = layers, outcomes
        whole = SHAPES[model].layers
        found: dict[str, Any] = {"status": "ok", "extrapolated_from_layers": list(layers), "measured": outcomes}
        for name in EXTRAPOLATED:
            if name in more:
                found[name] = more[name] + (more[name] - less[name]) / (many - few) * (whole - many)
        tokens = accumulation * self._arguments.micro_batch * self._arguments.seq_len
        return {**found, "tokens_per_s": tokens / found["s_per_step"]}

    def _child(self, spec: dict[str, Any], limit: float) -> dict[str, Any]:
        return run_child([sys.executable, __file__, "--child", json.dumps(spec)], timeout_s=limit)

    def _left(self) -> float:
        return self._deadline - time.monotonic()


def _compare(results: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Give `result` its practicality, once the row that it is compared with has run."""
    for other in results:
        same = all(other[key] == result[key] for key in ("model", "accumulation"))
        if same and other["row"] == REFERENCE and "s_per_step" in other and "s_per_step" in result:
            result["practicality"] = other["s_per_step"] / result["s_per_step"]
            result["practicality_of"] = _origin(other)


def _origin(result: dict[str, Any]) -> str:
    layers = result.get("extrapolated_from_layers")
    return "measured" if layers is None else f"extrapolated from {layers[0]} and {layers[1]} layers"


def _print_row(result: dict[str, Any]) -> None:
    head = f"{result['model']:6}{result['row']:20}{result['accumulation']:>7}"
    if result["status"] != "ok":
        print(f"{head}   {result['status']}", flush=True)
        return
    cells = ("-" if result.get(name) is None else f"{result[name]:.4g}" for name in COLUMNS)
    notes = [f"state on {', '.join(result['state_on'])}"] if "state_on" in result else []
    if "extrapolated_from_layers" in result:
        notes.append(_origin(result))
    elif result.get("practicality_of", "measured") != "measured":
        notes.append(f"practicality of a time {result['practicality_of']}")
    print(head + "".join(f"{cell:>14}" for cell in cells) + ("  " + "; ".join(notes) if notes else ""), flush=True)


def _hardware() -> dict[str, Any]:
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    from importlib.metadata import PackageNotFoundError, version

    for package in ("deepspeed", "transformers", "peft", "triton", "meft-ds"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    device, device_bytes = "CPU only: these are no accelerator timings", None
    if torch.cuda.is_available():
        # Properties, not a tensor: the parent must not hold a context on a device whose memory is being measured.
        properties = torch.cuda.get_device_properties(0)
        device_bytes = properties.total_memory
        device = f"{properties.name}, {device_bytes / 2**30:.0f} GiB"
    return {
        "device": device,
        "device_bytes": device_bytes,
        **machine(),
        "free_host_bytes": free_host_bytes(),
        "host_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "versions": versions,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_rows = [row for row in ROWS if row != "given"]
    parser.add_argument("--models", type=_names(SHAPES), default=["1.3b"], help=f"of {','.join(SHAPES)}")
    parser.add_argument("--rows", type=_names(ROWS), default=default_rows, help=f"of {','.join(ROWS)}")
    parser.add_argument("--accumulation", type=_positive_numbers, default=[1], help="micro-batches per step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps per row, after three that are not")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences per micro-batch")
    parser.add_argument(
        "--memory-cap-gb", type=float, help="GiB of device memory: torch may take no more, and we see no more"
    )
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false", help="keep activations")
    parser.add_argument("--meft-block", type=json.loads, help="JSON of a meft_offload block, the row `given`")
    parser.add_argument("--minutes", type=float, default=30.0, help="time limit of all rows together")
    parser.add_argument("--row-seconds", type=float, default=150.0, help="time limit of one row")
    parser.add_argument("--out", type=Path, help="also write the JSON report to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.meft_block is not None and "given" not in arguments.rows:
        arguments.rows = [*arguments.rows, "given"]
    if arguments.meft_block is None and "given" in arguments.rows:
        parser.error("the row `given` needs --meft-block")
    return arguments


def _names(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
        return names

    return parse


def _positive_numbers(text: str) -> list[int]:
    numbers = [int(number) for number in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("each must be at least 1")
    return numbers


if __name__ == "__main__":
    main()
