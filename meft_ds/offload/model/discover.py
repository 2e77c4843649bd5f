# SPDX-License-Identifier: Apache-2.0
"""Which weights of a model are matrices that a method may work on, and which only look like it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from meft_ds.offload.model.weights import shape_of
from meft_ds.options import MOST_LISTED, compiled, listed


def weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (module name, module, key, weight) of linear layers [m, n] and of expert tensors [experts, m, n]."""
    for name, module in model.named_modules():
        if _is_linear(module):
            yield name, module, "weight", module.weight
        elif not isinstance(module, nn.modules.conv._ConvNd | parametrize.ParametrizationList):
            for key, p in module._parameters.items():
                if p is not None and _has_experts(f"{name}.{key}", shape_of(p)):
                    yield name, module, key, p


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies with its weight, adds its bias, and does nothing else.

    nn.Linear and Conv1D do, and subclasses whose forward says the same in other words (Falcon's).
    """
    from transformers.pytorch_utils import Conv1D

    if "weight" not in module._parameters:  # weight norm computes it
        return False
    if type(module) in (nn.Linear, Conv1D):
        return True
    more = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    return isinstance(module, nn.Linear) and not more and _agrees_with_linear(module)


@torch.no_grad()
def _agrees_with_linear(module: nn.Linear) -> bool:
    """Return whether the forward of the module's class gives what nn.Linear's does; try it with a small weight."""
    if type(module).forward is nn.Linear.forward:
        return True
    twin, draw = copy.copy(module), torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=draw, device="cpu") for shape in ((2, 4, 5), (3, 5), (3,)))
    given = {"weight": nn.Parameter(weight), "bias": None if module.bias is None else nn.Parameter(bias)}
    twin.__dict__.update(in_features=5, out_features=3, _parameters=given)
    try:
        y = type(module).forward(twin, x)
    except Exception:  # whatever it needs, nn.Linear does without
        return False
    return isinstance(y, torch.Tensor) and y.shape == (2, 4, 3) and torch.allclose(y, nn.Linear.forward(twin, x))


def _has_experts(name: str, shape: Sequence[int]) -> bool:
    """Return whether a parameter is one matrix per expert; embeddings of positions have three dimensions too."""
    return len(shape) == 3 and min(shape) > 1 and "embed" not in name.rpartition(".")[2]


def output_heads(model: nn.Module) -> set[nn.Module]:
    """Return the modules of the output head, as far as the model, or what it wraps, says which that is."""
    heads: set[nn.Module] = set()
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        try:
            head = getter() if callable(getter) else None
        except NotImplementedError:  # transformers' models that have none
            continue
        if isinstance(head, nn.Module):
            heads.update(head.modules())  # wrappers keep the layer inside
    return heads


class Sharing:
    """Which weights of a model are used in more than one place."""

    def __init__(self, model: nn.Module) -> None:
        self._holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        self._names = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))

    def shares(self, module: nn.Module, weight: nn.Parameter) -> bool:
        """Return whether `weight` is tied, or its module is in several places."""
        return self._holders[id(weight)] > 1 or self._names[id(module)] > 1


class Search:
    """The weights that a method may take: matched by `target_modules`, trainable, fit, and used in one place.

    Iterate over it once; then it knows why others are left out.

    Args:
        target_modules: regular expressions for whole module names; None: all.
        unfit: by id of a weight, why the method leaves it out.
        expected: reasons that nobody needs to be told of, unless `target_modules` asks for such a weight.

    Attributes:
        modules: names of all modules that have matrices.
        told: a line for each weight that is left out.
        untold: a line for each that is left out for an expected reason.
        unused: patterns that match no name.
    """

    def __init__(
        self, model: nn.Module, target_modules: Sequence[str] | None, unfit: Mapping[int, str], expected: Container[str]
    ) -> None:
        self._model, self._unfit = model, unfit
        self._patterns = None if target_modules is None else {p: compiled(p) for p in target_modules}
        self._expected = expected if target_modules is None else ()
        self.modules: list[str] = []
        self.told: list[str] = []
        self.untold: list[str] = []
        self.unused = set(self._patterns or ())

    def __iter__(self) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
        """Yield as `weights` does."""
        sharing = Sharing(self._model)
        for name, module, key, weight in weights(self._model):
            self.modules.append(name)
            if self._patterns is not None:
                matching = {p for p, pattern in self._patterns.items() if pattern.fullmatch(name)}
                self.unused -= matching
                if not matching:
                    continue
            why = "" if weight.requires_grad else "is frozen"
            why = why or self._unfit.get(id(weight), "")
            why = why or ("is tied or used by several modules" if sharing.shares(module, weight) else "")
            if why:
                lines = self.untold if why in self._expected else self.told
                lines.append(f"{whole_name(name, key)} {why}")
            else:
                yield name, module, key, weight

    def fault(self, what: str, about: str = "") -> ValueError:
        """Return the error for a model in which there is no matrix `what`, with names to choose from."""
        if self.unused:
            about = f" target_modules {sorted(self.unused)} matches no whole module name.{about}"
        left_out = listed([*self.told, *self.untold], MOST_LISTED)
        return ValueError(
            f"no matrix of {type(self._model).__name__} {what}.{about} Linear layers: {self.listed_modules}. "
            + (f"Left out: {left_out}" if left_out else "")
        )

    @property
    def listed_modules(self) -> str:
        return ", ".join(self.modules[:MOST_LISTED]) or "none"


def whole_name(module: str, key: str) -> str:
    """Return the name of a module's parameter `key`."""
    return f"{module}.{key}" if module else key


def count_layers(model: nn.Module) -> int:
    """Return the length of the model's lists of numbered blocks; at least 1."""
    return max((first_number(name) or 0 for name, _ in model.named_parameters()), default=0) + 1


def layer_of(model: nn.Module, layers: int) -> dict[str, int]:
    """Return the layer of every parameter, by name: the first number in it, or that of the parameter before."""
    found, last = {}, 0
    for name, _ in model.named_parameters():
        number = first_number(name)
        last = min(number, layers - 1) if number is not None else last
        found[name] = last
    return found


def first_number(name: str) -> int | None:
    """Return the first number among the parts of a name; None without one."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
