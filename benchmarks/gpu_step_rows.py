# SPDX-License-Identifier: Apache-2.0
"""The rows of gpu_step.py: how each contender is built and its steps are measured, in a process of its own."""

import json
import os
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.child_process import write_result
from benchmarks.models import SHAPES, llama

CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"

LEARNING_RATE = 1e-5
WARMUP_STEPS = 2


def run_row(spec: dict[str, Any]) -> None:
    """Measures one row and writes its result; a device out of memory or an error is a result too."""
    import torch

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ[name] = value
    os.environ["MASTER_PORT"] = str(_free_port())
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        result = _build() if spec["row"] == "build" else _measure(spec)
    except torch.cuda.OutOfMemoryError:
        result = {"status": "out of device memory"}
    except Exception as error:
        import traceback

        traceback.print_exc()
        message = str(error).strip().splitlines() or [""]
        result = {"status": f"failed: {type(error).__name__}: {message[0][:200]}"}
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

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        if spec["memory_cap_gb"]:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, spec["memory_cap_gb"] * 2**30 / total))
    torch.manual_seed(0)
    shape = SHAPES[spec["model"]]
    model = llama(shape, seq_len=spec["seq_len"], device=device)
    if spec["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    parameters = sum(p.numel() for p in model.parameters())
    engine = ROWS[spec["row"]](model, spec)

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
    for _ in range(-(-WARMUP_STEPS // period) * period):
        step()
    seconds = []
    for _ in range(steps // period):
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(period):
            step()
        _synchronize(device)
        seconds.append((time.perf_counter() - begin) / period)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    down, up, source = _bytes_per_step(engine, step, period, cuda)
    s_per_step = statistics.median(seconds)
    return {
        "status": "ok",
        "s_per_step": s_per_step,
        "tokens_per_s": accumulation * micro_batch * seq_len / s_per_step,
        "device_gib": None if peak is None else peak / 2**30,
        "bytes_down": down,
        "bytes_up": up,
        "mib_down": None if down is None else down / 2**20,
        "mib_up": None if up is None else up / 2**20,
        "bytes_source": source,
        "base_parameters": parameters,
        "timed_steps": steps,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def _native(model: Any, spec: dict[str, Any]) -> Any:
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    # Torch's own fused kernel: as fast as DeepSpeed's FusedAdam, and needs no CUDA compiler on the machine.
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)
    return _initialize(model, {"zero_optimization": {"stage": 0}}, spec, optimizer)


def _lora(model: Any, spec: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    return _native(get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")), spec)


def _zero2_offload(model: Any, spec: dict[str, Any]) -> Any:
    return _initialize(model, _shipped("zero2_offload"), spec)


def _zenflow(model: Any, spec: dict[str, Any]) -> Any:
    return _initialize(model, _shipped("zenflow"), spec)


def _meft(model: Any, spec: dict[str, Any]) -> Any:
    config = _shipped("meft")
    if spec["meft_block"] is not None:
        config["meft_offload"] = spec["meft_block"]
    return _with_block(model, config, spec)


def _lsp(model: Any, spec: dict[str, Any]) -> Any:
    # no fit: the time of a first fit is no step's, and a step costs the same with any values
    block = {"subspace": {"projectors": "random", "refit_interval": 0}}
    return _with_block(model, {**_shipped("meft"), "meft_offload": block}, spec)


def _smt(model: Any, spec: dict[str, Any]) -> Any:
    # random tiles need no scoring, and a step costs about the same wherever they are
    block = {"sparse_matrix": {"score": "random"}}
    return _with_block(model, {**_shipped("meft"), "meft_offload": block}, spec)


def _with_block(model: Any, config: dict[str, Any], spec: dict[str, Any]) -> Any:
    import meft_ds  # noqa: F401  (arms the hook also where PyTorch's autoload is off)

    engine = _initialize(model, config, spec)
    if not hasattr(engine, "meft_stats"):
        raise RuntimeError("DeepSpeed's own engine was built: the plugin did not take over, see the log above")
    return engine


ROWS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "native": _native,
    "zero2_offload": _zero2_offload,
    "zenflow": _zenflow,
    "lora": _lora,
    "meft": _meft,
    "lsp": _lsp,
    "smt": _smt,
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


def _bytes_per_step(
    engine: Any, step: Callable[[], None], period: int, cuda: bool
) -> tuple[float | None, float | None, str]:
    """(bytes to the host, bytes to the device, source) of one step, outside the timed ones."""
    if cuda:
        down, up = _profiled_bytes(step, period)
        return down, up, "profiler"
    if hasattr(engine, "meft_stats"):
        step()
        stats = engine.meft_stats()
        return stats["bytes_down_per_step"], stats["bytes_up_per_step"], "meft_stats"
    return None, None, "nothing crosses a bus on a CPU"


def _profiled_bytes(step: Callable[[], None], period: int) -> tuple[float, float]:
    """Copies between host and device during `period` steps, per step, from the profiler's trace of the device."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(period):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    down = up = 0
    for event in events:
        if event.get("cat") == "gpu_memcpy":
            count = int(event["args"]["bytes"])
            down += count if "DtoH" in event["name"] else 0
            up += count if "HtoD" in event["name"] else 0
    return down / period, up / period


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
