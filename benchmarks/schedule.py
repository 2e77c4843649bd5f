# SPDX-License-Identifier: Apache-2.0
"""How well the layer-wise schedule hides the host update and both ways of the bus. Emulated: no GPU is involved.

    python benchmarks/schedule.py                     # about 6 minutes and 5 GiB of memory on 2 cores
    python benchmarks/schedule.py --scale 128 --layers 4 --steps 5        # seconds; too small to report

Real are the pipeline, its threads and its waiting, and the AdamW updates with their memory traffic. Emulated are the
device, which sleeps f per layer in forward and b in backward, and the link, whose transfers copy the payload and then
sleep until bytes / bandwidth + latency have passed. The copies have a core of their own, as a bus needs none; the
update uses all others.

The target is LLaMA-7B: 32 layers of 4 matrices 4096 x 4096 and 3 of 4096 x 11008; a compressed payload of 2048 x 2048
per matrix, 4 bytes per element each way; a link of 12 GB/s. All parameter counts are divided by `--scale`, so that the
state fits, and time is dilated: the real update p of one scaled payload is measured alone, and f, b and the link's
speed are chosen so that p : u : o : f : b are the target's. That is done anew for each scenario, directly before it.

  bound       layer-wise: max(F + B, sum o, sum p, sum u) + o + p + u of the first layer; F + B, o, u as emulated, p as
              measured alone before or after the steps, the smaller one (what other programs, and copies that use the
              same memory, add to it counts as loss)
  efficiency  bound / measured seconds per step: median of `--steps` steps, from one's beginning to the next one's
  stall, norm what the training thread waited per step for updates, and for the payloads and their norm

ZeRO-Offload's order moves whole gradients, bf16 both ways; updates begin after the last gradient came down, uploads
after the last update, the next forward after the last upload. Its updates are real too, by DeepSpeedCPUAdam. Its norm
and its casts between bf16 and float32 are free here. Its layers take turns with a few sets of state, each far larger
than a core's cache. "Same payload" is that order with the compressed payload: what the order alone is worth.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed  # noqa: E402
import torch  # noqa: E402

from benchmarks.machine import machine, machine_line  # noqa: E402
from benchmarks.schedule_emulation import (  # noqa: E402
    EmulatedBus,
    FullShelf,
    LayerTimes,
    PayloadUnit,
    payload_units,
    sleep_error,
    update_seconds,
)
from benchmarks.schedule_orders import (  # noqa: E402
    HYPER,
    Run,
    after_backward_bound,
    cores,
    layerwise_bound,
    run_after_backward,
    run_layerwise,
)
from benchmarks.schedule_picture import draw  # noqa: E402
from meft_ds import ops  # noqa: E402
from meft_ds.offload.schedule.eager import Mode  # noqa: E402

PAYLOAD = 7 * 2048 * 2048
FULL = 4 * 4096 * 4096 + 3 * 4096 * 11008
MODES: tuple[Mode, ...] = ("serial", "exact", "eager")
MAIN, LAPTOP = "7B, 12 GB/s", "laptop, p = u = 2f"
# milliseconds per layer of the target; b = 3f is backward with gradient checkpointing (a forward more)
SCENARIOS = {
    MAIN: LayerTimes(p=8.7, o=9.8, u=9.8, f=12.2, b=36.6),
    "the same, b = 2f": LayerTimes(p=8.7, o=9.8, u=9.8, f=12.2, b=24.4),
    "host as slow as forward, p = f": LayerTimes(p=12.2, o=9.8, u=9.8, f=12.2, b=36.6),
    "link as slow as forward, u = f": LayerTimes(p=8.7, o=12.2, u=12.2, f=12.2, b=36.6),
    LAPTOP: LayerTimes(p=24.4, o=24.4, u=24.4, f=12.2, b=36.6),
    "twice the bytes down, o = 0.8 b": LayerTimes(p=8.7, o=19.6, u=9.8, f=12.2, b=24.4),
}
_HEAD = (
    f"{'':<8}{'s/step':>9}{'bound':>8}{'efficiency':>12}{'stall ms':>10}{'norm ms':>9}{'p ms':>8}{'o ms':>8}{'u ms':>8}"
)


def main() -> None:
    options = _options()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(cores()[0].threads)  # of the updates that run in line
    try:
        _measure_and_report(options)
    finally:
        torch.set_num_threads(threads)


def _measure_and_report(options: argparse.Namespace) -> None:
    here = {**machine(), **_cores()}
    units = payload_units(options.layers, PAYLOAD // options.scale)
    print(f"EMULATED device and link, real host update. {machine_line(here)}")
    print(
        f"{options.layers} layers, payload {units[0].numel / 1e6:.2f} M parameters per layer, 1/{options.scale} of the "
        f"target's; {here['update_threads']} thread(s) update, sleeps end {sleep_error() * 1e6:.0f} us late\n"
    )
    bus = EmulatedBus()
    scenarios: dict[str, Any] = {}
    main_runs: dict[str, Run] = {}
    for name, target in SCENARIOS.items():
        scenarios[name], runs = _scenario(name, target, units, bus, options)
        if name == MAIN:
            main_runs, times = runs, LayerTimes(**{k: v / 1e3 for k, v in scenarios[name]["layer_ms"].items()})
            print(f"ZeRO-Offload's order, {MAIN}, emulated as above (bound: of its own order)\n{_HEAD}")
            offload, full, same = _zero_offload(times, units, bus, options)
            speedup, speedup_same = (run.step_s / runs["exact"].step_s for run in (full, same))
            print(
                f"exact against full: {speedup:.2f}x, against the order alone (same): {speedup_same:.2f}x (emulated)\n"
            )
    picture = _picture({**main_runs, "ZeRO-Offload's order, whole gradients": full}, options)
    result = {
        "benchmark": "schedule, emulated",
        "serial_efficiency": scenarios[MAIN]["modes"]["serial"]["efficiency"],
        "exact_efficiency": scenarios[MAIN]["modes"]["exact"]["efficiency"],
        "eager_efficiency": scenarios[LAPTOP]["modes"]["eager"]["efficiency"],
        "zero_offload_efficiency": offload["full"]["efficiency"],
        "speedup_vs_zero_offload": round(speedup, 3),
        "speedup_vs_zero_offload_same_payload": round(speedup_same, 3),
        "zero_offload": offload,
        "scenarios": scenarios,
        "picture": picture,
        **{key: getattr(options, key) for key in ("scale", "layers", "steps", "warmup")},
        "sleep_error_us": round(sleep_error() * 1e6, 1),
        "machine": here,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "ops": ops.backend(),
        },
    }
    print(json.dumps(result))


def _scenario(
    name: str, target: LayerTimes, units: list[PayloadUnit], bus: EmulatedBus, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Run]]:
    """All modes of one scenario."""
    times = _calibrate(target, units, bus)
    counts = {"warmup": options.warmup, "steps": options.steps}
    runs: dict[str, Run] = {mode: run_layerwise(units, bus, times, mode, **counts) for mode in MODES}
    p_after = _payload_seconds(units, bus)
    bound = layerwise_bound(replace(times, p=min(times.p, p_after)), options.layers)
    print(f"{name} (emulated): {_words(times)}; p alone {p_after * 1e3:.2f} ms afterwards\n{_HEAD}")
    modes = {mode: _row(mode, run, bound) for mode, run in runs.items()}
    print()
    layer = {key: round(value * 1e3, 4) for key, value in vars(times).items()}
    return {"layer_ms": layer, "p_after_ms": round(p_after * 1e3, 4), "bound_s": bound, "modes": modes}, runs


def _zero_offload(
    times: LayerTimes, units: list[PayloadUnit], bus: EmulatedBus, options: argparse.Namespace
) -> tuple[dict[str, Any], Run, Run]:
    """ZeRO-Offload's order with whole gradients, and with the compressed payload; f, b and link as in `times`."""
    counts = {"warmup": options.warmup, "steps": options.steps}
    times = replace(times, p=_payload_seconds(units, bus))
    bus.set_speeds(units[0].numel * 4, times)
    same = run_after_backward(units, bus, times, **counts)
    shelf = FullShelf(FULL // options.scale, min(options.full_states, options.layers), HYPER)
    if shelf.optimizer != "DeepSpeedCPUAdam":
        print(f"note: DeepSpeedCPUAdam cannot be built here; {shelf.optimizer} updates instead")
    full_units = shelf.units(options.layers)
    full_p = update_seconds(full_units, HYPER, bus, rounds=1)
    ratio = (2 * FULL) / (4 * PAYLOAD)
    full_times = LayerTimes(p=full_p, o=times.o * ratio, u=times.u * ratio, f=times.f, b=times.b)
    full = run_after_backward(full_units, bus, full_times, **counts)
    rows = {}
    for name, run, layer in (("full", full, full_times), ("same", same, times)):
        p = min(layer.p, run.seconds_of("host", "update"))  # nothing runs beside it in this order either
        rows[name] = _row(name, run, after_backward_bound(replace(layer, p=p), options.layers))
    print(f"full: {_words(full_times)}, {shelf.optimizer}\nsame: the compressed payload, {_words(times)}")
    return rows | {"optimizer": shelf.optimizer, "full_p_ms": round(full_p * 1e3, 3)}, full, same


def _calibrate(target: LayerTimes, units: list[PayloadUnit], bus: EmulatedBus) -> LayerTimes:
    """The target's ratios around the real update's time; sets the link's speeds."""
    times = target.scaled_to(_payload_seconds(units, bus))
    bus.set_speeds(units[0].numel * 4, times)
    return times


def _payload_seconds(units: list[PayloadUnit], bus: EmulatedBus) -> float:
    bus.down_bytes_per_s = bus.up_bytes_per_s = 1e15
    return update_seconds(units, HYPER, bus, rounds=2)


def _row(name: str, run: Run, bound: float) -> dict[str, Any]:
    """Print a line of the table and return what it says."""
    waits = {key: statistics.median([getattr(r.times, key) for r in run.results] or [0.0]) for key in _WAITS}
    spans = {"p": ("host", "update"), "o": ("down", "send"), "u": ("up", "fetch")}
    seconds = {key: run.seconds_of(*what) for key, what in spans.items()}
    print(
        f"{name:<8}{run.step_s:>9.3f}{bound:>8.3f}{bound / run.step_s:>12.3f}{waits['stall_s'] * 1e3:>10.1f}"
        f"{waits['norm_wait_s'] * 1e3:>9.1f}" + "".join(f"{s * 1e3:>8.2f}" for s in seconds.values())
    )
    row: dict[str, Any] = {"s_per_step": run.step_s, "bound_s": bound, "efficiency": round(bound / run.step_s, 4)}
    row["steps_s"] = [round(b - a, 5) for a, b in zip(run.begins, run.begins[1:], strict=False)]
    row |= {f"{key}_ms": round(s * 1e3, 3) for key, s in seconds.items()}
    if run.results:
        row |= {f"stats_{key}": round(value, 6) for key, value in waits.items()}
    row["overruns"] = run.overruns
    return row


# As the pipeline's own statistics have them: their efficiency is from times as they were beside each other.
_WAITS = ("stall_s", "norm_wait_s", "hooks_s", "efficiency")


def _words(times: LayerTimes) -> str:
    return "per layer " + ", ".join(f"{key} {value * 1e3:.2f}" for key, value in vars(times).items()) + " ms"


def _picture(runs: dict[str, Run], options: argparse.Namespace) -> str | None:
    title = f"LLaMA-7B at 12 GB/s, d = 2048, 1/{options.scale} of the size: EMULATED device and link, real host update"
    names = {"serial": "layer-wise, serial", "exact": "layer-wise, exact", "eager": "layer-wise, eager"}
    try:
        draw({names.get(name, name): run for name, run in runs.items()}, options.picture, title)
    except ImportError:
        print('note: no picture without matplotlib (pip install "meft-ds[plot]")')
        return None
    print(f"lanes of {MAIN} (emulated): {options.picture}")
    return str(options.picture)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=8, help="all parameter counts are divided by this")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each mode and scenario, at least 5")
    parser.add_argument(
        "--warmup", type=int, default=2, help="steps before them; eager takes its measured windows more"
    )
    parser.add_argument("--full-states", type=int, default=4, help="sets of state that ZeRO-Offload's layers share")
    picture = Path(__file__).resolve().parent / "results" / "schedule_emulated.png"
    parser.add_argument("--picture", type=Path, default=picture, help="where the drawing of the lanes goes")
    return parser.parse_args()


def _cores() -> dict[str, int]:
    host, link = cores()
    return {"cores": len({*(host.cpus or ()), *(link.cpus or ())}), "update_threads": host.threads}


if __name__ == "__main__":
    main()
