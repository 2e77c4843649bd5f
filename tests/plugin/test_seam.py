# SPDX-License-Identifier: Apache-2.0
"""The seam: a block yields our engine, anything else yields exactly what DeepSpeed would have built."""

import json
from typing import Any

import pytest

pytestmark = pytest.mark.compat

TRAIN = """
import json, os, sys
sys.path.insert(0, os.environ["REPO"])
{imports}
from tests.toy import ds_config, make_engine, train
engine = make_engine(ds_config(block={block}, precision="bf16"))
losses = train(engine, 4)
print(json.dumps({{
    "class": type(engine).__name__, "module": type(engine).__module__, "losses": losses,
    "optimizer": type(engine.optimizer).__name__, "loaded": sorted(m for m in sys.modules if m.startswith("meft_ds")),
}}))
"""


@pytest.fixture
def trained(run_python: Any, request: pytest.FixtureRequest) -> Any:
    def run(block: str, imports: str = "", **env: str) -> dict[str, Any]:
        repo = str(request.config.rootpath)
        out = run_python(TRAIN.format(block=block, imports=imports), env={"REPO": repo, **env}).stdout
        return json.loads(out.strip().splitlines()[-1])

    return run


@pytest.mark.parametrize(
    "first", ["torch", "deepspeed", "transformers", "meft_ds", "deepspeed.runtime.engine", "accelerate"]
)
def test_block_yields_our_engine_whatever_is_imported_first(trained: Any, first: str) -> None:
    got = trained("...", imports=f"import {first}")
    assert got["class"] == "MeftEngine"
    assert got["losses"][-1] == got["losses"][-1] and len(got["losses"]) == 4


def test_without_the_block_class_and_losses_are_those_of_deepspeed_without_the_plugin(trained: Any) -> None:
    with_plugin = trained("None")
    without = trained("None", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert with_plugin["class"] == without["class"] == "DeepSpeedEngine"
    assert with_plugin["module"] == without["module"] and with_plugin["optimizer"] == without["optimizer"]
    assert with_plugin["losses"] == without["losses"]
    assert without["loaded"] == []
    assert "meft_ds.plugin.engine" not in with_plugin["loaded"]


def test_explicit_import_does_the_same_where_autoload_is_switched_off(trained: Any) -> None:
    assert trained("...", imports="import meft_ds", TORCH_DEVICE_BACKEND_AUTOLOAD="0")["class"] == "MeftEngine"
    late = trained("...", imports="import deepspeed, meft_ds", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert late["class"] == "MeftEngine"
