# SPDX-License-Identifier: Apache-2.0
"""The rows of gpu_step.py: how each contender is built and its steps are measured, in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.child_process import write_result
from benchmarks.gpu_step_trace import profile
from benchmarks.models import SHAPES, llama

CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
LEARNING_RATE = 1e-5
WARMUP_STEPS = 3
"""Not timed: the first scores tiles or fits projectors, kernels are compiled, buffers are taken."""
BUCKET = 2**28
"""Values that plain torch updates at once, because each needs 4 bytes more then."""

# A step costs the same however the projectors were fitted and the tiles chosen, so that happens once and briefly.
ADAPTER: dict[str, Any] = {"sparse_adapter": {}}
SUBSPACE = {"subspace": {"fit_steps": 2}}
TILES = {"sparse_matrix": {"warmup_steps": 1}}
SUBSPACE_CPU = {"subspace": {"fit_steps": 2, "state_device": "cpu"}}
TILES_CPU = {"sparse_matrix": {"warmup_steps": 1, "state_device": "cpu"}}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contender.

    Attributes:
        value: rows of a smaller number run first.
        build: makes an engine of the model and the row's spec.
        block: "meft_offload", for ours.
        device_bytes, host_bytes: per parameter of the model, at least; 0 where the row's own check decides.
        cpu_adam: whether DeepSpeed's host optimizer must have been built.
    """

    value: int
    build: Callable[[Any, dict[str, Any]], Any]
    block: dict[str, Any] | None = None
    device_bytes: int = 0
    host_bytes: int = 0
    cpu_adam: bool = False


def run_row(spec: dict[str, Any]) -> None:
    """Measure one row and write its result; a device out of memory or an error is a result too."""
    import torch

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ[name] = value
    os.environ["MASTER_PORT"] = str(_free_port())
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        result = _build() if spec["row"] == "build" else _measure(spec)
    except torch.OutOfMemoryError:
        result = {"status": "out of device memory"}
    except Exception as error:
        result = {"status": f"failed: {_told(error)}"}
    # ru_maxrss is in KiB on Linux.
    result["own_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    write_result(result)
    # Not sys.exit: engines with helper processes may wait for them forever.
    os._exit(0)


def _build() -> dict[str, Any]:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load()
    return {"status": "ok"}


def _measure(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    device = torch.device("cpu")
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        device = torch.device(accelerator.type, 0)
        runtime = torch.get_device_module(device)
        runtime.set_device(device)
        if spec["memory_cap_gb"]:
            cap_memory(runtime, device, spec["memory_cap_gb"])
    memory = _Memory(device)
    torch.manual_seed(0)
    shape = SHAPES[spec["model"]]
    model = llama(shape, seq_len=spec["seq_len"], device=device, layers=spec["layers"])
    if spec["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    parameters = sum(p.numel() for p in model.parameters())
    memory.note("model")
    engine = ROWS[spec["row"]].build(model, spec)
    memory.note("engine")

    accumulation, micro_batch, seq_len = spec["accumulation"], spec["micro_batch"], spec["seq_len"]
    batches = torch.randint(shape.vocabulary, (accumulation, micro_batch, seq_len), device=device)
    losses: list[float] = []

    def step() -> None:
        total = torch.zeros((), device=device)
        for batch in batches:
            loss = engine(input_ids=batch, labels=batch).loss
            total += loss.detach().float() / accumulation
            engine.backward(loss)
            engine.step()
        losses.append(total.item())  # also waits for the device

    period = _period(spec)
    steps = -(-max(spec["steps"], period) // period) * period
    first = [_timed(step, device) for _ in range(-(-WARMUP_STEPS // period) * period)]
    memory.note("first_steps")

    def whole_period() -> None:
        for _ in range(period):
            step()

    seconds = [_timed(whole_period, device) / period for _ in range(steps // period)]
    memory.note("steps")
    s_per_step = statistics.median(seconds)
    result = {
        "status": "ok",
        "s_per_step": s_per_step,
        "s_per_step_min": min(seconds),
        "s_per_step_max": max(seconds),
        "seconds": seconds,
        "first_seconds": first,
        "tokens_per_s": accumulation * micro_batch * seq_len / s_per_step,
        "device_gib": memory.peaks_gib.get("steps"),
        "device_peak_gib_until": memory.peaks_gib,
        "device_held_gib_after": memory.held_gib,
        "base_parameters": parameters,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }
    if hasattr(engine, "meft_stats"):
        result["meft_stats"] = stats = engine.meft_stats()
        for told in stats.values():
            if isinstance(told, dict):
                told.pop("bias", None)  # of each matrix
        units = engine.optimizer.pipeline.units
        result["state_on"] = sorted({t.device.type for unit in units for t in unit.state_tensors().values()})
        result |= {"bytes_down": stats["bytes_down_per_step"], "bytes_up": stats["bytes_up_per_step"]}
    try:
        result["profile"] = seen = profile(step, period, device)
        if device.type == "cuda":
            result |= {"bytes_down": seen["bytes_down"], "bytes_up": seen["bytes_up"]}
    except Exception as error:  # a trace that cannot be had must not cost the row its times
        result["profile"] = f"failed: {_told(error)}"
    for direction in ("down", "up"):
        if f"bytes_{direction}" in result:
            result[f"mib_{direction}"] = result[f"bytes_{direction}"] / 2**20
    return result


def cap_memory(runtime: Any, device: Any, gib: float) -> None:
    """Let this process see a device of `gib` GiB: torch takes no more, and who asks for its size is told so."""
    found = runtime.get_device_properties(device)
    capped = min(int(gib * 2**30), found.total_memory)
    runtime.set_per_process_memory_fraction(capped / found.total_memory, device)
    runtime.get_device_properties = lambda device=None: _Smaller(found, capped)


class _Smaller:
    """Properties of a device, but for its memory."""

    def __init__(self, found: Any, total_memory: int) -> None:
        self._found, self.total_memory = found, total_memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found, name)


class _Memory:
    """Device memory by stage: the peak within it, and what is held at its end, in GiB. Empty without a device."""

    def __init__(self, device: Any) -> None:
        import torch

        self._runtime = None if device.type == "cpu" else torch.get_device_module(device)
        self.peaks_gib: dict[str, float] = {}
        self.held_gib: dict[str, float] = {}

    def note(self, stage: str) -> None:
        if self._runtime is not None:
            self._runtime.synchronize()
            self.peaks_gib[stage] = self._runtime.max_memory_allocated() / 2**30
            self.held_gib[stage] = self._runtime.memory_allocated() / 2**30
            self._runtime.reset_peak_memory_stats()


class _PlainTorch:
    """Full fine-tuning with nothing but PyTorch: bf16 weights, fp32 masters and moments, fused AdamW, clipping."""

    def __init__(self, model: Any, spec: dict[str, Any]) -> None:
        import torch

        self._model, self._accumulation, self._micro = model, spec["accumulation"], 0
        self._buckets: list[tuple[list[Any], list[Any], Any]] = []
        bucket: list[Any] = []
        parameters = list(model.parameters())
        for index, p in enumerate(parameters):
            bucket.append(p)
            if index == len(parameters) - 1 or sum(q.numel() for q in bucket) >= BUCKET:
                masters = [q.detach().float() for q in bucket]
                optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=0.01, fused=True)
                self._buckets.append((bucket, masters, optimizer))
                bucket = []

    def __call__(self, **inputs: Any) -> Any:
        return self._model(**inputs)

    def backward(self, loss: Any) -> None:
        (loss / self._accumulation).backward()

    def step(self) -> None:
        import torch

        self._micro += 1
        if self._micro % self._accumulation:
            return
        with torch.no_grad():
            norms = [torch._foreach_norm([p.grad for p in bucket]) for bucket, _, _ in self._buckets]
            norm = torch.stack([n.float() for part in norms for n in part]).norm()
            clip = (1.0 / (norm + 1e-6)).clamp(max=1.0)
            for bucket, masters, optimizer in self._buckets:
                gradients = [p.grad.float() for p in bucket]
                torch._foreach_mul_(gradients, clip)
                for p, master, gradient in zip(bucket, masters, gradients, strict=True):
                    p.grad, master.grad = None, gradient
                optimizer.step()
                optimizer.zero_grad()
                torch._foreach_copy_(bucket, masters)


def _native(model: Any, spec: dict[str, Any]) -> Any:
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    # Torch's own fused kernel: as fast as DeepSpeed's FusedAdam, and needs no CUDA compiler on the machine.
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)
    return _initialize(model, {"zero_optimization": {"stage": 0}}, spec, optimizer)


def _lora(model: Any, spec: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    return _native(get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")), spec)


def _shipped_config(model: Any, spec: dict[str, Any]) -> Any:
    return _initialize(model, _shipped(spec["row"]), spec)


def _meft(model: Any, spec: dict[str, Any]) -> Any:
    import meft_ds  # noqa: F401  (arms the hook also where PyTorch's autoload is off)

    block = spec["meft_block"] if spec["row"] == "given" else ROWS[spec["row"]].block
    engine = _initialize(model, {**_shipped("meft"), "meft_offload": block}, spec)
    if not hasattr(engine, "meft_stats"):
        raise RuntimeError("DeepSpeed's own engine was built: the plugin did not take over, see the log above")
    return engine


def _with(block: dict[str, Any], mode: str) -> dict[str, Any]:
    return {**block, "schedule": {"mode": mode}}


ROWS = {
    # fp32 masters and moments are 12 bytes, bf16 weights and gradients 4; DeepSpeed keeps fp32 gradients too
    "torch": Row(value=1, build=_PlainTorch, device_bytes=16),
    "subspace-cpu": Row(value=1, build=_meft, block=SUBSPACE_CPU),
    "adapter": Row(value=1, build=_meft, block=ADAPTER),
    "tiles-cpu": Row(value=1, build=_meft, block=TILES_CPU),
    "subspace": Row(value=1, build=_meft, block=SUBSPACE),
    "tiles": Row(value=1, build=_meft, block=TILES),
    "zero2_offload": Row(value=2, build=_shipped_config, device_bytes=4, host_bytes=18, cpu_adam=True),
    "subspace-cpu-eager": Row(value=2, build=_meft, block=_with(SUBSPACE_CPU, "eager")),
    "adapter-eager": Row(value=2, build=_meft, block=_with(ADAPTER, "eager")),
    "tiles-cpu-eager": Row(value=2, build=_meft, block=_with(TILES_CPU, "eager")),
    "lora": Row(value=2, build=_lora),
    "native": Row(value=3, build=_native, device_bytes=20),
    "subspace-cpu-serial": Row(value=3, build=_meft, block=_with(SUBSPACE_CPU, "serial")),
    "adapter-serial": Row(value=3, build=_meft, block=_with(ADAPTER, "serial")),
    "tiles-cpu-serial": Row(value=3, build=_meft, block=_with(TILES_CPU, "serial")),
    "zenflow": Row(value=3, build=_shipped_config, device_bytes=4, host_bytes=20, cpu_adam=True),
    "given": Row(value=0, build=_meft),
}


def _shipped(name: str) -> dict[str, Any]:
    """A config of ds_configs/ without what HF's Trainer would fill in."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    for key in ("scheduler", "fp16", "train_batch_size"):
        config.pop(key, None)
    config["optimizer"]["params"] = {"lr": LEARNING_RATE, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    return config


def _initialize(model: Any, config: dict[str, Any], spec: dict[str, Any], optimizer: Any = None) -> Any:
    import deepspeed

    config = {
        **config,
        "train_micro_batch_size_per_gpu": spec["micro_batch"],
        "gradient_accumulation_steps": spec["accumulation"],
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=parameters, optimizer=optimizer, config=config)[0]


def _period(spec: dict[str, Any]) -> int:
    """Steps after which a row's work repeats: ZenFlow updates all weights only once per interval of micro-batches."""
    if spec["row"] != "zenflow":
        return 1
    interval = int(_shipped("zenflow")["zero_optimization"]["zenflow"]["update_interval"])
    return max(1, interval // spec["accumulation"])


def _timed(work: Callable[[], None], device: Any) -> float:
    _synchronize(device)
    begin = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - begin


def _synchronize(device: Any) -> None:
    import torch

    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def _told(error: Exception) -> str:
    import traceback

    traceback.print_exc()
    message = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {message[0][:200]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
