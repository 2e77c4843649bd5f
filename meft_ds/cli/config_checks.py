# SPDX-License-Identifier: Apache-2.0
"""A ds_config as the engine would judge it, and an engine that really starts with it, in a process of its own."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from meft_ds import files
from meft_ds.cli.report import Check, finding, fine, note
from meft_ds.config import BLOCK, MeftConfig
from meft_ds.plugin import ds_config as checks
from meft_ds.plugin import registry
from meft_ds.plugin.decision import near_misses

_TOY: dict[str, dict[str, Any]] = {
    "sparse_adapter": {"rows": 40, "experts": 7, "experts_per_token": 3, "keys_per_token": 9},
    "subspace": {"nonzeros": 2, "fit_steps": 2},
    "sparse_matrix": {"density": 0.3, "block_size": 8, "score": "magnitude"},
}
_KEPT = ("moments_dtype", "grad_dtype", "schedule")
# It does not import meft_ds: whether the hook takes the engine is the question.
_PROGRAM = """
import json, sys
import torch
config = json.loads(sys.argv[1])
import deepspeed
from deepspeed.accelerator import get_accelerator
from transformers import LlamaConfig, LlamaForCausalLM
if "fp16" in config and not get_accelerator().is_fp16_supported():
    del config["fp16"]
sizes = dict(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))
engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
ids = torch.arange(32, device=engine.device).view(4, 8)
loss = engine(input_ids=ids, labels=ids).loss
engine.backward(loss)
engine.step()
print("RESULT " + json.dumps({"engine": type(engine).__name__, "loss": float(loss)}), flush=True)
engine.destroy()
"""


def read(path: Path) -> dict[str, Any]:
    """Read a ds_config. Raise ValueError when it is no JSON object."""
    try:
        found = files.parse_json(files.read_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise ValueError(f"{path} is no JSON: {fault}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, a ds_config")
    return found


def judged(ds_config: dict[str, Any]) -> list[Check]:
    """Return what the engine would say to it: all faults at once, and keys that are passed over."""
    if BLOCK not in ds_config:
        near = list(near_misses(ds_config))
        if near:
            text = f'no top-level key "{BLOCK}" but one named "{near[0]}", which nobody reads'
            return [finding("config", text, f'rename it to "{BLOCK}", at the top level')]
        return [note("config", f'no "{BLOCK}" block: DeepSpeed trains as if meft-ds were not installed')]
    passed = [note("config", line) for line in checks.skipped(ds_config)]
    try:
        registry.parsed(ds_config)
    except ValueError as fault:
        return [finding("config", str(fault), "correct what the lines name, each says how"), *passed]
    return [fine("config", f'the "{BLOCK}" block and what stands beside it are right'), *passed]


def started(ds_config: dict[str, Any], timeout: float) -> Check:
    """Start an engine on a toy model and take one step. The methods have sizes that fit the toy."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "LOCAL_", "WORLD_", "MASTER_"))}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", _PROGRAM, json.dumps(for_toy(ds_config))]
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired as late:
        told = (late.stderr or b"").decode(errors="replace").splitlines()
        waits = next((f": {line}" for line in told if "the start has waited" in line), "")
        fix = "remove the lock that it waits for" if waits else "run your program and see where it stands (py-spy dump)"
        return finding("engine", f"a toy engine did not start in {timeout:g} s{waits}", fix)
    printed, told = (stream.decode(errors="replace").strip().splitlines() for stream in (ended.stdout, ended.stderr))
    found = [line for line in printed if line.startswith("RESULT ")]
    if not found:
        last = (told or [f"exit code {ended.returncode}"])[-1]
        return finding("engine", f"a toy engine failed: {last}", "run your program to see the whole error")
    result = json.loads(found[-1].removeprefix("RESULT "))
    if result["engine"] != "MeftEngine":
        why = (
            "TORCH_DEVICE_BACKEND_AUTOLOAD is 0"
            if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0"
            else ("the entry point is not installed for this interpreter")
        )
        text = f"a toy engine with this block was {result['engine']}: autoload does not arm ({why})"
        return finding("engine", text, "unset it, install meft-ds here with pip, or `import meft_ds` before deepspeed")
    return fine("engine", f"a toy engine started as MeftEngine and took a step (loss {result['loss']:.3f})")


def for_toy(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return a config whose sizes fit a toy model on one rank, and in which nothing is left to the program."""
    made = copy.deepcopy(ds_config)
    for key in ("train_batch_size", "scheduler", "monitor_config", "tensorboard", "wandb", "csv_monitor", "comet"):
        made.pop(key, None)
    made |= {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "steps_per_print": 10**9}
    made = _without_auto(made)
    params = made.get("optimizer", {}).get("params", {})
    # torch_adam: without the hook, which is a finding, DeepSpeed could build its own AdamW for a minute
    made["optimizer"] = {"type": "AdamW", "params": {**params, "lr": 1e-3, "torch_adam": True}}
    block = ds_config[BLOCK]
    methods = [name for name in MeftConfig.methods() if name in block] or MeftConfig.methods()[:1]
    made[BLOCK] = {name: _TOY[name] for name in methods} | {key: block[key] for key in _KEPT if key in block}
    if "schedule" in made[BLOCK]:
        made[BLOCK]["schedule"] = {k: v for k, v in block["schedule"].items() if not k.startswith("trace")}
    return made


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    plain = {k: _without_auto(v) if isinstance(v, dict) else v for k, v in settings.items() if v != "auto"}
    for key in ("bf16", "fp16"):
        if isinstance(plain.get(key), dict) and "enabled" not in plain[key]:
            del plain[key]  # "auto": the program's arguments say
    return plain
