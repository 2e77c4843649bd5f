# SPDX-License-Identifier: Apache-2.0
"""Whether an export computes what its checkpoint does: each generates in a process of its own, and logits are compared.

`python -m meft_ds.cli.verify checkpoint|export FOLDER OUT TARGET` is such a process. The one of the checkpoint loads
the file that DeepSpeed wrote into the model class, and the rows from their own files. It needs memory for the model.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TOKENS = 8
_NAMES = ("checkpoint", "export")


def compare(source: Path, out: Path) -> dict[str, Any]:
    """Return the largest difference of the logits, relative to the largest logit, and whether tokens are equal.

    Raises:
        RuntimeError: when a process failed.
    """
    import torch
    from safetensors.torch import load_file

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in _NAMES:
            target = Path(folder) / name
            command = [sys.executable, "-m", "meft_ds.cli.verify", name, str(source), str(out), str(target)]
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
                raise RuntimeError(f"{out} is written, but the process that runs the {name} failed: {last}")
            found[name] = load_file(target)
    one, two = (found[name]["logits"] for name in _NAMES)
    worst = float((one - two).abs().max() / one.abs().max())
    return {
        "logits_equal": bool(torch.equal(one, two)),
        "logits_relative_difference": worst,
        "tokens_equal": bool(torch.equal(found["checkpoint"]["tokens"], found["export"]["tokens"])),
    }


def run(kind: str, source: Path, out: Path, target: Path) -> None:
    """Generate greedily from a fixed prompt with one of the two models, and write tokens and logits to `target`."""
    import torch
    import transformers
    from safetensors.torch import save_file

    import meft_ds
    from meft_ds.cli import checkpoint, export, method_files

    found = checkpoint.read(source)
    kind_of_model = getattr(transformers, found.manifest["about"]["model"])
    if kind == "export":
        model = kind_of_model.from_pretrained(out, dtype="auto", local_files_only=True)
        if "sparse_adapter" in found.methods:
            meft_ds.load_adapter(model, out)
    else:
        config = transformers.AutoConfig.from_pretrained(out, local_files_only=True)
        dtype = next(t.dtype for t in found.module.values() if t.is_floating_point())
        model = kind_of_model._from_config(config, dtype=dtype)  # buffers stay as transformers makes them
        plain = {n: t for n, t in found.module.items() if ".meft_adapter." not in n}
        model.load_state_dict(plain)
        if "sparse_adapter" in found.methods:
            with tempfile.TemporaryDirectory() as folder:
                method_files.write_adapter(found, Path(folder), export.initializer_range(out))
                meft_ds.load_adapter(model, folder)
    model.eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (2, TOKENS), generator=generator, device="cpu")
    logits = []
    with torch.no_grad():
        for _ in range(TOKENS):
            decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
            found_logits = model(input_ids=tokens, **decoder).logits.float()
            logits.append(found_logits[:, -1] if found_logits.dim() == 3 else found_logits)
            tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], 1)
    save_file({"logits": torch.stack(logits), "tokens": tokens}, target)


if __name__ == "__main__":
    run(sys.argv[1], *map(Path, sys.argv[2:]))
