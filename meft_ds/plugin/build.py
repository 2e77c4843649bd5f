# SPDX-License-Identifier: Apache-2.0
"""Builds a `Runtime`: ranks, the plan and its memory check, shared memory, all units, and the pipeline."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from meft_ds import ops
from meft_ds.config import MeftConfig
from meft_ds.offload.dense_unit import DenseUnit
from meft_ds.offload.host.memory import (
    SHM_DIR,
    check_host_memory,
    check_shared_memory,
    free_host_bytes,
    free_shared_bytes,
    in_units,
)
from meft_ds.offload.host.shared_memory import Specs, allocate, arena_bytes
from meft_ds.offload.method import Method, Run, base_lr
from meft_ds.offload.pipeline import Pipeline
from meft_ds.offload.ranks import LaneRanks, Ranks
from meft_ds.offload.schedule.config import ScheduleConfig
from meft_ds.offload.schedule.host_threads import HostThreads, host_threads
from meft_ds.offload.schedule.host_threads import enter as enter_threads
from meft_ds.offload.schedule.trace import Trace
from meft_ds.offload.unit import Footprint, Unit
from meft_ds.plugin.runtime import Runtime
from meft_ds.plugin.telemetry import Plan, Telemetry, Writer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(run: Run, methods: list[Method], config: MeftConfig, *, writer: Writer, rank: int) -> Runtime:
    """Build what an engine runs on a model that is cast and on its device. Collective.

    Args:
        run: what is settled.
        methods: prepared.
        config: of the block.
        writer: DeepSpeed's monitor.
        rank: of this process, which names its trace file.

    Raises:
        ValueError: when the plan does not fit the memory, or nothing is left to train.
    """
    _agree_on_kernels(run)
    units, plan = build_units(run, methods, config)
    pipeline = _pipeline(units, methods, run, config.schedule)
    schedule = config.schedule
    trace = None if schedule.trace_file is None else Trace(schedule.trace_file, schedule.trace_windows, rank=rank)
    telemetry = Telemetry(pipeline=pipeline, methods=methods, plan=plan, writer=writer, trace=trace)
    return Runtime(run=run, methods=methods, plan=plan, pipeline=pipeline, telemetry=telemetry)


def _agree_on_kernels(run: Run) -> None:
    """Take Triton's kernels on every rank or on none: ranks must round alike. Collective."""
    if run.bus.is_host:
        return
    faults = run.ranks.gather(ops.triton_fault(run.bus.device))
    if any(faults):
        at, fault = next((at, fault) for at, fault in enumerate(faults) if fault)
        ops.do_without_triton(f"on rank {at}: {fault}", warn=run.ranks.rank == 0)


def find_ranks(group: dist.ProcessGroup | None, world: int, device: torch.device) -> Ranks:
    """Find the data-parallel ranks, and the nodes that they are on. Collective.

    Raises:
        ValueError: when nodes have different numbers of them.
    """
    if world == 1:
        return Ranks()
    ranks = Ranks(rank=dist.get_rank(group), world=world, group=group)
    members = dist.get_process_group_ranks(group) if group is not None else list(range(world))
    return ranks.on_nodes(by_node(members, ranks.gather(_this_node())), device)


def by_node(members: Sequence[int], nodes: Sequence[str]) -> list[list[int]]:
    """Sort members by node, in the order of the nodes' first members.

    Raises:
        ValueError: when nodes have different numbers of them.
    """
    layout: dict[str, list[int]] = {}
    for member, node in zip(members, nodes, strict=True):
        layout.setdefault(node, []).append(member)
    if len({len(listed) for listed in layout.values()}) > 1:
        counts = ", ".join(f"{node.split(':')[0]}: {len(listed)}" for node, listed in layout.items())
        raise ValueError(
            f"meft_offload needs the same number of ranks on every node, but there are {counts}; start equally many"
        )
    return list(layout.values())


def dense_units(run: Run, layers: int, elsewhere: set[int]) -> list[DenseUnit]:
    """Make units for all trainable parameters but those whose ids are in `elsewhere`. They are not yet allocated.

    There is one unit per layer, parameter group and dtype.

    Parameters that no group names (routers, and base tensors the program did not hand to its optimizer) follow
    `run.group`.
    """
    named = [(n, p) for n, p in run.model.named_parameters() if p.requires_grad and id(p) not in elsewhere]
    return [DenseUnit(place) for place in run.places(named, layers, DenseUnit.wire)]


def refuse_what_cannot_fit(model: nn.Module, methods: list[Method], config: MeftConfig) -> None:
    """Check what the settings take at least, before `Method.prepare` makes any of it. Collective.

    Raises:
        ValueError: the same on every rank.
    """
    needed = sum(method.least_host_bytes(model) for method in methods)
    free = min(Ranks.everyone().gather(free_host_bytes()))
    knobs = [method.memory_hint for method in methods]
    check_host_memory(needed, free, limit_gb=config.host_memory_gb, detail="before moments and buffers", knobs=knobs)


def preflight(run: Run, methods: list[Method], footprints: list[Footprint], specs: Specs, config: MeftConfig) -> int:
    """Check the plan against the free memory of every node, and return the host bytes of a whole node. Collective.

    Raises:
        ValueError: the same on every rank.
    """
    ranks, shared = run.ranks, arena_bytes(specs)
    several = ranks.here.world > 1
    mine = [sum(f.host_private for f in footprints), free_host_bytes(), free_shared_bytes() if several else 0]
    # all ranks decide by what all of them see as free, or one would raise while the others wait for it
    told = ranks.gather(mine)
    needed = 0
    for members in _places(ranks):
        private, free_host, free_shared = zip(*(told[k] for k in members), strict=True)
        needed = shared + sum(private)
        detail = f"{in_units(shared)} shared, {in_units(sum(private))} moments and buffers"
        free, knobs = min(free_host), [method.memory_hint for method in methods]
        check_host_memory(needed, free, limit_gb=config.host_memory_gb, detail=detail, knobs=knobs)
        if several:
            check_shared_memory(shared, min(free_shared), knobs=knobs)
    return needed


def build_units(run: Run, methods: list[Method], config: MeftConfig) -> tuple[list[Unit], Plan]:
    """Make all units, shallowest layer first. Everything is planned and checked before it is allocated. Collective.

    Raises:
        ValueError: when the plan does not fit the memory, or nothing is left to train.
    """
    claimed = {p for method in methods for p in method.claim(run)}
    layers = max(method.layers for method in methods)
    dense = dense_units(run, layers, claimed)
    footprints = [*(f for method in methods for f in method.footprints(run)), *(unit.footprint() for unit in dense)]
    specs: Specs = {}
    for method in methods:
        specs |= method.shared_tensors_spec(run)
    host = preflight(run, methods, footprints, specs, config)
    for unit in dense:
        unit.allocate()
    memory = allocate(specs, run.ranks.here) if specs else {}
    units: list[Unit] = [*dense, *(unit for method in methods for unit in method.build(run, memory))]
    plan = Plan(
        host=host,
        device=sum(f.device for f in footprints),
        down=sum(f.down for f in footprints),
        up=sum(f.up for f in footprints),
        dense_names=tuple(name for unit in dense for name, _ in unit.params),
        dense_parameters=sum(unit.numel for unit in dense),
        dense_device=sum(unit.footprint().device for unit in dense),
    )
    return sorted(units, key=lambda unit: (unit.layer, unit.name)), plan


def _pipeline(units: list[Unit], methods: list[Method], run: Run, config: ScheduleConfig) -> Pipeline:
    """Make the pipeline in the configured mode. Collective: its lanes get process groups of their own."""
    bus, ranks = run.bus, run.ranks
    if config.mode == "serial":
        return Pipeline(units, bus, ranks, methods=methods)
    threads = host_threads(config.host_threads, ranks.here, launches=not bus.is_host)
    copier = HostThreads(threads=1, cpus=threads.left or threads.cpus)  # one thread fills a bus

    def start(plan: HostThreads) -> None:
        enter_threads(plan)
        bus.use_device()

    return Pipeline(
        units,
        bus,
        ranks,
        mode=config.mode,
        lane_ranks=LaneRanks.apart(ranks, bus.device),
        at_start={"host": partial(start, threads), "down": partial(start, copier), "up": partial(start, copier)},
        methods=methods,
    )


def standing_still(run: Run, scheduler: Any) -> str:
    """Return a warning if rows and parameters in no group get a learning rate of 0 for good; "" if not."""
    if scheduler is not None or base_lr(run.groups[run.group]) > 0:
        return ""
    return (
        f"parameter group {run.group} has lr 0 and no LR scheduler drives it; adapter rows, routers and parameters in "
        "no group of the optimizer follow it and stand still; give a group with parameters an lr above 0"
    )


def grad_dtype(config: MeftConfig, compute: torch.dtype) -> torch.dtype:
    """Return the dtype of a method's gradients on the bus."""
    return compute if config.grad_dtype == "auto" else torch.float32


def _places(ranks: Ranks) -> list[list[int]]:
    """List the data-parallel ranks of each node."""
    if not ranks.layout:
        return [list(range(ranks.world))]
    if ranks.group is None:
        return [list(members) for members in ranks.layout]
    return [[dist.get_group_rank(ranks.group, member) for member in members] for members in ranks.layout]


def _this_node() -> str:
    """Name the node: equal for ranks that can share memory, and only for them."""
    told = os.environ.get("MEFT_DS_NODE")
    if told:
        return told
    try:
        shm = os.stat(SHM_DIR)
        place = f"{shm.st_dev}.{shm.st_ino}"  # containers on one machine may each have their own
    except OSError:
        place = ""
    return f"{socket.gethostname()}:{_boot_id()}:{place}"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
