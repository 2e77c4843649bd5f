# SPDX-License-Identifier: Apache-2.0
"""The rows of emulated_gpu.py: one method at one depth on the emulated accelerator's clock, in a process of its own."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from typing import Any

from benchmarks.child_process import write_result
from benchmarks.models import SHAPES, llama
from tests.ranks import free_port

# Neither a first fit nor scoring is a step's time, and a step takes the same with any projectors and tiles.
BLOCKS: dict[str, dict[str, Any]] = {
    "subspace": {"subspace": {"projectors": "random", "refit_interval": 0}},
    "adapter": {"sparse_adapter": {}},
    "tiles": {"sparse_matrix": {"score": "random"}},
}
METHODS = ("native", "zero_offload", *BLOCKS)
STATE_BYTES = 28
"""What mixed AdamW reads and writes for a parameter: a bf16 gradient, fp32 master and moments, a bf16 weight."""
WARMUP = 2


def run_row(spec: dict[str, Any]) -> None:
    """Measure one cell and write its result; an error is a result too."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(free_port()), "HF_HUB_OFFLINE": "1"}
    try:
        result = measure(spec)
    except Exception as error:
        import traceback

        traceback.print_exc()
        message = str(error).strip().splitlines() or [""]
        result = {"status": f"failed: {type(error).__name__}: {message[0][:200]}"}
    result["own_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    write_result(result)
    os._exit(0)  # lanes and engines may have threads that nobody ends


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Train `spec["method"]` on the clock, at each number of tokens; return what a step took. Once per process."""
    import torch

    from tests.emulated_accelerator import accelerator, clock, device
    from tests.emulated_accelerator.profiles import Profile

    profile, shape = Profile.load(spec["profile"]), SHAPES[spec["shape"]]
    torch.set_num_threads(1)
    accelerator.install()
    clock.start(profile, slowdown=spec["slowdown"], python=spec["python"])
    clock.replace_product_kernels(profile)
    # `auto` places state by the memory of the device: so much of it as this part of the model would have
    device.MEMORY = profile.memory_bytes * spec["layers"] // shape.layers
    begun = time.perf_counter()
    model = llama(shape, seq_len=max(spec["tokens"]), device=device.DEVICE, layers=spec["layers"]).train()
    parameters = sum(p.numel() for p in model.parameters())
    step, host_bytes = ROWS[spec["method"]](model, profile)
    built = time.perf_counter() - begun
    found: dict[str, Any] = {}
    for tokens in spec["tokens"]:
        batch = torch.randint(shape.vocabulary, (1, tokens), device=device.DEVICE)
        for _ in range(WARMUP):
            step(batch)
        device.module.reset_peak_memory_stats()
        with clock.measure() as measured:
            for _ in range(spec["steps"]):
                step(batch)
        found[str(tokens)] = {
            "s_per_step": measured.seconds / spec["steps"],
            "idle": {cause: s / spec["steps"] for cause, s in measured.idle.items()},
            "kernels_s": measured.kernels / spec["steps"],
            "syncs": measured.syncs / spec["steps"],
            "launches": measured.launches / spec["steps"],
            "late_s": measured.late / spec["steps"],
            "wall_s": measured.wall / spec["steps"],
            "device_bytes": device.module.max_memory_allocated(),
            "kernels": {
                name: [s / spec["steps"], n / spec["steps"]]
                for name, (s, n) in sorted(measured.by_kernel.items(), key=lambda item: -item[1][0])[:12]
            },
        }
    return {
        "status": "ok",
        "parameters": parameters,
        "host_bytes": host_bytes(),
        "pinned_bytes": device.backend.pinned_usage()[0],
        "built_s": built,
        "tokens": found,
    }


Step = Callable[[Any], None]
Row = tuple[Step, Callable[[], int]]


def _native(model: Any, profile: Any) -> Row:
    """Full fine-tuning that fits: mixed AdamW with its state on the device, one kernel per tensor, no clipping."""
    import torch

    from tests.emulated_accelerator import clock

    parameters = list(model.parameters())
    state = [[torch.zeros_like(p, dtype=torch.float32) for _ in range(3)] for p in parameters]

    def step(batch: Any) -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        for p, held in zip(parameters, state, strict=True):
            assert p.grad is not None and len(held) == 3
            clock.charge(profile, "adamw", STATE_BYTES * p.numel())
            p.grad = None

    return step, lambda: 0


def _zero_offload(model: Any, profile: Any) -> Row:
    """ZeRO-Offload's order, written out: bf16 gradients down during backward, AdamW after it, bf16 weights up.

    Norms, clipping and casts on the host cost nothing here, which is in its favour.
    """
    import torch

    from tests.emulated_accelerator import device

    module = device.module
    parameters = list(model.parameters())
    down, up = module.Stream(), module.Stream()
    buffers = {p: torch.empty(p.shape, dtype=p.dtype, pin_memory=True) for p in parameters}

    def send(p: Any) -> None:
        done = module.Event()
        done.record(module.current_stream())
        down.wait_event(done)
        p.grad.record_stream(down)
        with module.stream(down):
            buffers[p].copy_(p.grad, non_blocking=True)
        p.grad = None

    for p in parameters:
        p.register_post_accumulate_grad_hook(send)

    def step(batch: Any) -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        begun = device.backend.thread_time()
        down.synchronize()
        for p in parameters:
            device.backend.clock_sleep(STATE_BYTES * p.numel() / profile.host_bytes_per_s)
        with module.stream(up), torch.no_grad():
            for p in parameters:
                p.copy_(buffers[p], non_blocking=True)
        device.backend.note_blocked(begun, device.backend.thread_time())
        module.current_stream().wait_stream(up)

    return step, lambda: sum(p.numel() for p in parameters) * (12 + 2)


def _offloaded(name: str) -> Callable[[Any, Any], Row]:
    def row(model: Any, profile: Any) -> Row:
        import deepspeed

        import meft_ds  # noqa: F401  (arms the hook)

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
            "steps_per_print": 10**9,
            "meft_offload": BLOCKS[name],
        }
        parameters = [p for p in model.parameters() if p.requires_grad]
        engine = deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]

        def step(batch: Any) -> None:
            engine.backward(engine(input_ids=batch, labels=batch).loss)
            engine.step()

        return step, lambda: int(engine.meft_stats()["host_bytes"])

    return row


ROWS: dict[str, Callable[[Any, Any], Row]] = {
    "native": _native,
    "zero_offload": _zero_offload,
    **{name: _offloaded(name) for name in BLOCKS},
}
