# SPDX-License-Identifier: Apache-2.0
"""An export is bit for bit what the engine itself would have written, whatever the stage and the number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import meft_ds
from meft_ds import files
from meft_ds.cli import stream
from meft_ds.cli.main import app, main
from meft_ds.plugin.checkpoint.transaction import sealed
from meft_ds.sparse_adapter.files import read_adapter
from tests.forked import Forge
from tests.plugin.zero3_ranks import METHODS
from tests.toy import batch, ds_config, make_engine, tiny_llama, train


def run(*words: Any) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: Any) -> str:
    """The line on stderr of a command that refuses its input."""
    monkeypatch.setattr(sys, "argv", ["meft-ds", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    assert end.value.code == 2, told.err
    assert told.out == "" and told.err.count("\n") == 1, told.err
    return told.err


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


# -- what the engine writes --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [(2, 1), (2, 2), (3, 2)])
def test_an_export_is_what_the_engine_would_have_written(
    stage: int, world: int, forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    methods = [name for name in METHODS if name != "subspace random"]
    forge.results("tests.cli.export_ranks:train_and_save", tmp_path, world=world, methods=methods, stage=stage)
    for method in methods:
        at, out = tmp_path / method.replace(" ", "_"), tmp_path / f"{method} out"
        assert run("export", at, out, "--shard-size", "4KB")["tensors"] == 21
        expected = torch.load(at / "16bit" / "pytorch_model.bin")
        found = weights_of(out)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
        assert (out / "tokenizer.json").exists()
        model = LlamaForCausalLM.from_pretrained(out)
        if "adapter" in method:
            for folder in (out, tmp_path / f"{method} alone"):
                if folder != out:
                    assert run("export", at, folder, "--method-files")["wrote"] == "adapter"
                    assert weights_of(folder) == {}
                _same_adapter(folder, at / "16bit")
            meft_ds.load_adapter(model, out)
            assert json.loads((out / "config.json").read_text())["meft_ds"]["adapter"] == "meft_adapter.json"
        with torch.no_grad():
            logits = model(**{k: t for k, t in batch(7).items() if k != "labels"}).logits
        torch.testing.assert_close(logits, torch.load(at / "logits.pt"), rtol=1e-5, atol=1e-5)
        if "tiles" in method:
            alone = tmp_path / "alone.safetensors"
            assert run("export", at, alone, "--method-files")["wrote"] == "tiles"
            assert alone.read_bytes() == (at / "tiles.safetensors").read_bytes()


def _same_adapter(one: Path, two: Path) -> None:
    a, b = read_adapter(one), read_adapter(two)
    assert (a.config, a.model_class, a.modules, a.elsewhere) == (b.config, b.model_class, b.modules, b.elsewhere)
    assert a.base.keys() == b.base.keys()
    for x, y in zip([*a.rows, *a.routers, *a.base.values()], [*b.rows, *b.routers, *b.base.values()], strict=True):
        assert torch.equal(x, y)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of tiles in bf16 and its config."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_llama()
    engine = make_engine(ds_config(precision="bf16", block=METHODS["tiles"]), model)
    train(engine, 4)
    engine.save_checkpoint(str(folder), tag="t")
    model.config.save_pretrained(folder)
    meft_ds.save_tiles(engine, folder / "tiles.safetensors")
    engine.destroy()
    return folder


def test_tiles_go_out_of_a_model_folder_and_in_again(saved: Path, tmp_path: Path) -> None:
    tiles, trained, base, again = saved / "tiles.safetensors", tmp_path / "a", tmp_path / "b", tmp_path / "c"
    run("export", saved, trained, "--shard-size", "4KB")
    assert run("tiles", "revert", tiles, trained, base)["values"] == 704
    start = {name: t.bfloat16() for name, t in tiny_llama().state_dict().items()}
    assert all(torch.equal(t, start[name]) for name, t in weights_of(base).items())
    run("tiles", "apply", tiles, base, again)
    assert {p.name for p in again.iterdir()} == {p.name for p in trained.iterdir()}
    assert all(torch.equal(t, weights_of(trained)[name]) for name, t in weights_of(again).items())
    shown = run("tiles", "show", tiles)
    assert sum(weight["values"] for weight in shown["weights"].values()) == 704
    assert "mlp" in CliRunner().invoke(app, ["tiles", "show", str(tiles)]).stdout


def test_a_dtype_is_that_of_weights_and_config(saved: Path, tmp_path: Path) -> None:
    run("export", saved, tmp_path / "o", "--dtype", "float32")
    assert {t.dtype for t in weights_of(tmp_path / "o").values()} == {torch.float32}
    assert json.loads((tmp_path / "o" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.slow
def test_verify_says_whether_both_compute_the_same(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", saved, tmp_path / "o", "--verify")["logits_equal"]
    write = stream.write

    def wrong(path: Path, tensors: Any, metadata: Any = None) -> None:
        write(path, {name: stream.mapped(torch.zeros(t.shape, dtype=t.dtype)) for name, t in tensors.items()})

    monkeypatch.setattr(stream, "write", wrong)
    monkeypatch.setattr(sys, "argv", ["meft-ds", "export", str(saved), str(tmp_path / "p"), "--verify"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert "does not compute what the checkpoint does" in capsys.readouterr().err


# -- wrong input -------------------------------------------------------------------------------------------------------


def test_wrong_input_is_named_and_nothing_is_written(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, copy = tmp_path / "o", tmp_path / "copy"
    shutil.copytree(saved, copy)
    told = lambda *words: refused(capsys, monkeypatch, *words)  # noqa: E731
    assert "is no folder" in told("export", tmp_path / "none", out)
    assert "no checkpoint of meft_offload" in told("export", tmp_path, out)
    assert "is there already" in told("export", saved, copy)
    assert "float64" in told("export", saved, out, "--dtype", "float64")
    assert "--shard-size" in told("export", saved, out, "--shard-size", "0GB")
    assert "leave one out" in told("export", saved, out, "--verify", "--method-files")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    assert "by the config" in told("export", copy, out)
    (copy / "config.json").unlink()
    assert "pass --base" in told("export", copy, out)
    run("export", copy, tmp_path / "with base", "--base", saved)
    with open(next((copy / "t").glob("mp_rank*")), "r+b") as file:
        file.seek(9000)
        file.write(b"damage")
    assert "is damaged" in told("export", copy, out, "--base", saved)
    assert "holds no tiles" in told("tiles", "show", tmp_path / "with base" / "model.safetensors")
    assert "applied already" in told("tiles", "apply", saved / "tiles.safetensors", tmp_path / "with base", out)
    assert "no model.safetensors" in told("tiles", "revert", saved / "tiles.safetensors", saved, out)
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "with base"}


# -- memory and kills --------------------------------------------------------------------------------------------------

LARGE = {"vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
SHARD = 64 * 10**6


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a checkpoint of a model with 160 million parameters looks like, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    (folder / "t" / "meft").mkdir(parents=True)
    config = LlamaConfig(**LARGE, num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LlamaForCausalLM(config).state_dict().items()}
    model = folder / "t" / "mp_rank_00_model_states.pt"
    values = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shapes.items()}
    torch.save({"module": values, "ds_config": {}}, model)
    about = {"method": "subspace", "model": "LlamaForCausalLM"}
    manifest: Any = {"format": 2, "about": about, "files": {}, "deepspeed": {model.name: files.fingerprint(model)}}
    (folder / "t" / "meft" / "meft_state.json").write_text(json.dumps(sealed(manifest)))
    (folder / "latest").write_text("t")
    config.save_pretrained(folder)
    return folder


MEASURED = """
import sys, threading, transformers
from pathlib import Path
from transformers import LlamaForCausalLM
from meft_ds.cli import export, checkpoint

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024
import torch
with torch.device("meta"):  # the model class is imported, which is no memory of the weights
    LlamaForCausalLM(transformers.AutoConfig.from_pretrained(sys.argv[1]))
before = status("VmRSS")
dtype = torch.float16 if sys.argv[3] == "cast" else None
where = {"base": None, "method_files_only": False, "shard_bytes": int(sys.argv[4])}
found = export.export(Path(sys.argv[1]), Path(sys.argv[2]), dtype=dtype, **where)
print(status("VmHWM") - before, found["largest"], found["bytes"])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("cast", ["as it is", "cast"])
def test_its_memory_is_bounded_by_the_largest_shard(large: Path, tmp_path: Path, cast: str) -> None:
    words = [sys.executable, "-c", MEASURED, str(large), str(tmp_path / "o"), cast, str(SHARD)]
    ended = subprocess.run(words, capture_output=True, text=True, check=True)
    grown, largest, whole = map(int, ended.stdout.split()[-3:])
    assert whole > 4 * largest, "the model is large enough to tell"
    assert grown <= 1.2 * largest, (grown, largest)


@pytest.mark.slow
def test_one_that_is_killed_leaves_nothing_under_its_name(large: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "meft_ds", "export", str(large), str(tmp_path / "o"), "--shard-size", "20MB"]
    process = subprocess.Popen(words)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".o.*/model-00002*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "o").exists()
    assert len(list(tmp_path.iterdir())) == 1, "only the hidden folder"
