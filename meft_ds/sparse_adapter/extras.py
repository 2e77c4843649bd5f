# SPDX-License-Identifier: Apache-2.0
"""Adapters as `Extras` of a model: what of a state dict is theirs, and how they are written and taken out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from meft_ds.offload.method import Extras
from meft_ds.sparse_adapter import attach, base
from meft_ds.sparse_adapter.files import needed_from, write_adapter
from meft_ds.sparse_adapter.folder import tell_of_adapter


class AdapterExtras(Extras):
    """See `Extras`."""

    def present(self, model: nn.Module) -> bool:
        return bool(attach.find_adapters(model))

    def owns(self, name: str) -> bool:
        return attach.ADAPTER_NAME in name.split(".")

    def needed(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return needed_from(model)

    def write(
        self, folder: Path, model: nn.Module, state: Mapping[str, Tensor] | None = None, *, beside_base: bool = False
    ) -> None:
        write_adapter(folder, model, state)
        if beside_base:
            tell_of_adapter(folder, model)

    def remember(self, model: nn.Module, names: Iterable[str], elsewhere: Iterable[str]) -> None:
        base.remember(model, names, elsewhere)

    def remove(self, model: nn.Module) -> None:
        for module in list(model.modules()):
            attach.detach(module)
            base.forget(module)
