# SPDX-License-Identifier: Apache-2.0
"""Lets whoever gets a folder with a model and an adapter know of the adapter: transformers would load the base alone,
which is the untrained model, without a word."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

from meft_ds import files
from meft_ds.sparse_adapter.layout import JSON_NAME

_logger = logging.getLogger("meft_ds")
KEY = "meft_ds"
_TITLE = "## Sparse adapter of meft-ds"
_SECTION = f"""{_TITLE}

Rows and routers were trained beside a base, and lie in `{JSON_NAME}` and the file that it names. transformers alone
does not load them: it gives the base.

```python
import meft_ds
{{loads}}
meft_ds.load_adapter(model, folder)
```
"""


def tell_of_adapter(folder: str | Path, model: Any) -> None:
    """Write a key into the folder's config.json, which transformers keeps, and a section into its README.md, and log
    one line. A README that is there gets the section at its end.

    Raises:
        OSError: when a file cannot be written.
    """
    folder = Path(folder)
    _into_config(folder / "config.json")
    _into_readme(folder / "README.md", _how_to_load(model))
    _logger.info(
        "the sparse adapter is beside the base in %s; from_pretrained alone loads the base without it, and "
        "meft_ds.load_adapter(model, folder) then puts it in",
        folder,
    )


def _into_config(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError, ValueError):  # not a JSON object: somebody else's file
        about = files.parse_json(files.read_bytes(path))
        if isinstance(about, dict):
            about[KEY] = {"adapter": JSON_NAME, "load": "meft_ds.load_adapter(model, folder)"}
            files.write_text(path, json.dumps(about, indent=2, sort_keys=True) + "\n")


def _into_readme(path: Path, loads: str) -> None:
    try:
        text = files.read_bytes(path).decode()
    except FileNotFoundError:
        text = ""
    except ValueError:  # no text, or no file
        return
    if _TITLE not in text:
        files.write_text(path, (text.rstrip() + "\n\n" if text else "") + _SECTION.format(loads=loads))


def _how_to_load(model: Any) -> str:
    name = type(model).__name__
    if hasattr(model, "get_base_model"):  # PEFT's: its folder has no base
        return f"from peft import {name}\n\nmodel = {name}.from_pretrained(base, folder)"
    return f"from transformers import {name}\n\nmodel = {name}.from_pretrained(folder)"
