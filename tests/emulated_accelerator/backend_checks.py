# SPDX-License-Identifier: Apache-2.0
"""What `test_backend.py` asks of the backend, each in a process that has it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.emulated_accelerator.device import DEVICE, Event, Stream, backend, module

Folder = Path
LATE = 20_000
"""Microseconds: longer than this process is away between two lines."""


def _message(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def operators(folder: Folder) -> dict[str, float]:
    """Return by what results differ from the CPU's."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(8, 4, generator=g), torch.randn(3, 4, generator=g)
    ids = torch.tensor([2, 0, 2])

    def results(device: Any) -> dict[str, torch.Tensor]:
        a, b = x.to(device).detach().requires_grad_(), w.to(device).detach().requires_grad_()
        a.grad = b.grad = None
        loss = nn.functional.linear(a, b).relu().pow(2).mean()
        loss.backward()
        out = torch.empty(0, device=device)
        torch.mm(a.detach(), b.detach().t(), out=out)
        many = [x.to(device).clone(), w.to(device).clone()]
        torch._foreach_add_(many, 1.5)
        scaled = nn.functional.scaled_dot_product_attention(*[a.detach().view(1, 1, 8, 4)] * 3, is_causal=True)
        return {
            "loss": loss.detach(),
            "gradient of x": a.grad,
            "gradient of w": b.grad,
            "out=": out,
            "lists in place": many[1],
            "views": a.detach().t()[1:3].reshape(-1),
            "unfold": a.detach().unfold(0, 4, 2),
            "index": a.detach()[ids.to(device)],
            "index on the host": a.detach()[ids],
            "mask": a.detach()[a.detach() > 0],
            "topk": a.detach().topk(2)[1].float(),
            "attention": scaled,
            "embedding bag": nn.functional.embedding_bag(
                ids.to(device), a.detach(), torch.tensor([0, 2], device=device)
            ),
            "one number": torch.tensor(a.detach().sum().item()),
        }

    here, there = results("cpu"), results(DEVICE)
    return {name: float((here[name] - there[name].cpu()).abs().max()) for name in here}


def refusals(folder: Folder) -> dict[str, str]:
    """Return what is said to what CUDA refuses too."""
    a = torch.ones(4, 4, device=DEVICE)
    small = torch.ones(3, 2, device=DEVICE)
    backend.set_capacity(1 << 20)
    found = {
        "host tensor": _message(lambda: a + torch.ones(4, 4)),
        "host tensor in an operator of ours": _message(lambda: torch._foreach_mul_([a], [torch.ones(4, 4)])),
        "numpy": _message(a.numpy),
        "shapes": _message(lambda: a @ small),
        "memory": _message(lambda: torch.ones(1 << 20, device=DEVICE)),
        "pinned": _message(lambda: torch.ones(4, device=DEVICE, pin_memory=True)),
    }
    backend.set_capacity(0)
    return found


def read_on_the_host(folder: Folder) -> None:
    """Touch device memory as a host kernel would, which ends the process."""
    import ctypes

    ctypes.string_at(torch.ones(4, device=DEVICE).data_ptr(), 4)


def asynchronous_error(folder: Folder) -> dict[str, str]:
    """Return what an operator raises that finds bad values on its stream, and where."""
    ids = torch.tensor([7], device=DEVICE)
    table = torch.ones(3, 2, device=DEVICE)
    return {
        "at once": _message(lambda: table.index_select(0, ids)),
        "later": _message(module.synchronize),
        "again": _message(module.synchronize),
    }


def waits(folder: Folder, lazy: bool) -> dict[str, float]:
    """Return what another stream's copy sees with and without a wait for it."""
    side, found = Stream(), {}
    for name in ("wait", "none"):
        if lazy:
            backend.set_lazy(0, True)
        else:
            backend.set_delay(0, LATE)
        t = torch.zeros(100, device=DEVICE)
        t.add_(1)
        event = Event()
        event.record(module.current_stream())
        host = torch.zeros(100, pin_memory=True)
        with module.stream(side):
            if name == "wait":
                side.wait_event(event)
            host.copy_(t, non_blocking=True)
        side.synchronize()
        found[name] = float(host[0])
        backend.set_delay(0, 0)
        backend.set_lazy(0, False)
        module.synchronize()
    return found


def uploads_without_a_wait(folder: Folder) -> dict[str, float]:
    """Return what the current stream reads of an upload on a stream that runs only when somebody waits for it."""
    side, found = Stream(), {}
    backend.set_lazy(side.stream_id, True)
    for name in ("wait", "none"):
        target, host = torch.zeros(100, device=DEVICE), torch.ones(100).pin_memory()
        module.synchronize()
        with module.stream(side):
            target.copy_(host, non_blocking=True)
            event = Event()
            event.record(side)
        if name == "wait":
            module.current_stream().wait_event(event)
        result = target + 0
        module.current_stream().synchronize()
        found[name] = float(result[0].item())
        side.synchronize()
    return found


def reuse(folder: Folder) -> dict[str, float]:
    """Return what a stream computes from a block that was freed while it still waits."""
    side, found = Stream(), {}
    for name in ("recorded", "not"):
        t = torch.full((1000,), 7.0, device=DEVICE)
        module.synchronize()
        backend.set_delay(side.stream_id, LATE)
        with module.stream(side):
            out = t * 2
            if name == "recorded":
                t.record_stream(side)
        del t
        torch.full((1000,), 1.0, device=DEVICE)
        module.synchronize()
        found[name] = float(out[0].item())
        backend.set_delay(side.stream_id, 0)
    return found


def host_memory(folder: Folder) -> dict[str, float]:
    """Return what a copy up reads whose source the host overwrites right after handing it over."""
    found = {}
    for name, pinned, non_blocking in (
        ("pinned, asynchronous", True, True),
        ("pinned, blocking", True, False),
        ("pageable, asynchronous", False, True),
    ):
        source = torch.ones(100, pin_memory=pinned)
        target = torch.zeros(100, device=DEVICE)
        backend.set_delay(0, LATE)
        target.copy_(source, non_blocking=non_blocking)
        source.fill_(5)
        backend.set_delay(0, 0)
        found[name] = float(target[0].item())
    strided = torch.ones(100, 2, pin_memory=True)[:, 0]
    backend.reset_counts()
    target.copy_(strided, non_blocking=True)
    found["copies through pageable memory"] = sum(
        n for (_, kind, _), n in backend.counts().items() if kind == "pageable"
    )
    return found


def one_queue(folder: Folder) -> dict[str, Any]:
    """Return how far streams come that wait for one another, with a queue each and with one for all."""
    found: dict[str, Any] = {}
    for name, one in (("a queue each", False), ("one queue", True)):
        backend.set_one_queue(one)
        first, second, gate, reached = Stream(), Stream(), Event(), []
        released = time.monotonic() + 0.3

        def hold(until: float = released) -> None:
            while time.monotonic() < until:
                time.sleep(0.01)

        backend.enqueue(second.stream_id, hold, "a peer that is late")
        backend.enqueue(first.stream_id, lambda reached=reached: reached.append(1), "work")
        gate.record(first)
        time.sleep(0.1)
        found[name] = {"reached": len(reached), "unfinished": sorted(backend.unfinished().values())}
        module.synchronize()
    backend.set_one_queue(False)
    return found


def counters(folder: Folder) -> dict[str, Any]:
    """Return what was counted, by kind and name."""
    t = torch.ones(1000, device=DEVICE)
    event = Event()
    event.record(module.current_stream())
    module.synchronize()
    backend.reset_counts()
    backend.reset_peaks()
    backend.set_owner("mine")
    u = t * 2
    backend.set_owner("")
    u.sum().item()
    u.cpu()
    u.nonzero()
    event.synchronize()
    pinned = torch.ones(1100, dtype=torch.uint8, pin_memory=True)
    counted = {f"{kind} {name}": n for (_, kind, name), n in backend.counts().items()}
    return {
        "counted": counted,
        "mine": backend.device_usage()["mine"],
        "pinned": backend.pinned_usage(),
        "is": pinned.is_pinned(),
    }


def autocast(folder: Folder) -> dict[str, str]:
    """Return dtypes inside autocast."""
    x = torch.ones(4, 4, device=DEVICE)
    with torch.autocast("emulated", dtype=torch.bfloat16):
        y = x @ x
        return {"mm": str(y.dtype), "softmax": str(y.softmax(-1).dtype), "add": str((y + x).dtype)}


def times(folder: Folder) -> dict[str, float]:
    """Return milliseconds that an event pair measures around delayed work."""
    start, end = Event(enable_timing=True), Event(enable_timing=True)
    start.record()
    backend.enqueue(0, lambda: time.sleep(0.05), "work")
    end.record()
    end.synchronize()
    return {"ms": start.elapsed_time(end)}


def module_to(folder: Folder) -> dict[str, bool]:
    """Return whether parameters stay the same objects when a module moves."""
    layer = nn.Linear(3, 3)
    kept = layer.weight
    layer.to(DEVICE)
    return {"same": layer.weight is kept, "there": kept.device == DEVICE}
