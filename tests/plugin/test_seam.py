# SPDX-License-Identifier: Apache-2.0
"""The seam: a block yields our engine, anything else yields exactly what DeepSpeed would have built.

That it holds whatever a program imports first is in `tests/test_autoload.py`.
"""

import json
from typing import Any

import pytest

from tests.conftest import RunPython
from tests.ranks import REPO

pytestmark = pytest.mark.compat

TRAIN = """
import json, sys
from tests.toy import ds_config, make_engine, train

def trained(**config):
    engine = make_engine(ds_config(precision="bf16", **config))
    losses = train(engine, 4)
    engine.destroy()
    kinds = [f"{type(x).__module__}.{type(x).__name__}" for x in (engine, engine.optimizer)]
    return {"kinds": kinds, "losses": losses, "loaded": sorted(m for m in sys.modules if m.startswith("meft_ds"))}

found = [trained(block=None)]
if len(sys.argv) > 1:
    found.append(trained())
print(json.dumps(found))
"""


def test_the_block_yields_our_engine_and_without_it_all_is_as_without_the_plugin(run_python: RunPython) -> None:
    def trained(code: str, **env: str) -> list[dict[str, Any]]:
        return json.loads(run_python(code, env={"PYTHONPATH": str(REPO), **env}).stdout.strip().splitlines()[-1])

    plain, ours = trained("import sys; sys.argv.append('the block too')" + TRAIN)
    (without,) = trained(TRAIN, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert without.pop("loaded") == [] and "meft_ds.plugin.engine" not in plain.pop("loaded")
    assert plain == without and plain["kinds"][0] == "deepspeed.runtime.engine.DeepSpeedEngine"
    assert ours["kinds"][0] == "meft_ds.plugin.engine.MeftEngine"
    assert len(ours["losses"]) == 4 and ours["losses"] != plain["losses"]
