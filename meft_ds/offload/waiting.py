# SPDX-License-Identifier: Apache-2.0
"""Parameters whose update is under way: whatever touches one applies the update first.

While an update of a parameter is under way, the parameter's class is a subclass of its own class. The
`__torch_function__` of that subclass sees every torch call that gets the parameter. It has the update applied, which
puts the old class back, and then does what was asked. Reads of metadata (shape, dtype, grad ...) do not wait.

A program therefore needs no call of ours: EMA, `deepcopy`, `p.data`, pickling, foreach functions and NumPy see the new
values, and what it writes is not overwritten. Only tensors that share the parameter's memory and were made before the
step cannot be noticed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from meft_ds.offload.model.gradient_checkpointing import inside_backward

_PROPERTIES = (
    "shape dtype device layout ndim itemsize nbytes requires_grad grad is_leaf grad_fn output_nr retains_grad "
    "is_cuda is_cpu is_meta is_sparse is_sparse_csr is_quantized is_nested is_xpu is_mps "
    "_version _backward_hooks _post_accumulate_grad_hooks"
).split()
_METHODS = (
    "size numel nelement dim ndimension stride storage_offset element_size is_contiguous is_floating_point is_complex "
    "is_signed get_device requires_grad_ register_hook register_post_accumulate_grad_hook retain_grad is_same_size "
    "_is_view __hash__ __len__"
).split()


def _metadata() -> frozenset[Any]:
    """Return the functions that neither read nor write values. What one version of torch lacks is left out."""
    found: set[Any] = {torch.numel, torch.is_floating_point, torch.is_complex}
    for name in _PROPERTIES:
        prop = getattr(Tensor, name, None)
        found.update(getattr(prop, how) for how in ("__get__", "__set__", "__delete__") if hasattr(prop, how))
    found.update(getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name))
    return frozenset(found)


_METADATA = _metadata()


def watch(params: Iterable[nn.Parameter], apply: Callable[[], None]) -> None:
    """Have `apply` called before anything reads or writes one of `params`. It must end with `unwatch` of them all."""
    for p in params:
        p.__dict__["_meft_apply"] = apply
        p.__class__ = _waiting_class(type(p))


def unwatch(params: Iterable[nn.Parameter]) -> None:
    """Give parameters their own class back; those that nobody watches stay as they are."""
    for p in params:
        if isinstance(p, _Waiting):
            p.__class__ = type(p)._own_class  # type: ignore[attr-defined]
            p.__dict__.pop("_meft_apply", None)


class _Waiting:
    """Mixed into the class of a parameter that waits for its update."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _METADATA and not inside_backward():
            for p in _waiting((args, tuple(kwargs.values()))):
                p.__dict__["_meft_apply"]()
            if not any(True for _ in _waiting((args, tuple(kwargs.values())))):
                return func(*args, **kwargs)
        # A forward that backward repeats must see what the first one saw.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(_applied(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _applied(self).__reduce_ex__(protocol)


@functools.cache
def _waiting_class(own: type) -> type:
    # the name of its own class: messages, summaries and whoever compares names notice nothing
    return type(own.__name__, (_Waiting, own), {"_own_class": own, "__module__": own.__module__})


def _applied(p: Any) -> Any:
    p.__dict__["_meft_apply"]()
    assert not isinstance(p, _Waiting), "a parameter still waits although its update was applied"
    return p


def _waiting(x: Any) -> Iterator[nn.Parameter]:
    if isinstance(x, _Waiting):
        yield x  # type: ignore[misc]
    elif isinstance(x, tuple | list):
        for part in x:
            yield from _waiting(part)
    elif isinstance(x, dict):
        yield from _waiting(tuple(x.values()))
