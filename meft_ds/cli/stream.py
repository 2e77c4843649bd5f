# SPDX-License-Identifier: Apache-2.0
"""Safetensors files written piece by piece: what is in memory at once is a piece, however large the tensors are."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_PIECE = 2**22  # values


@dataclass(frozen=True, kw_only=True)
class Source:
    """A tensor to write: what it is, and its values in order, in pieces of that dtype on the host."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def mapped(t: Tensor, dtype: torch.dtype | None = None) -> Source:
    """Return a tensor that is mapped from a file, cast if it has floating point values."""
    to = dtype if dtype is not None and t.is_floating_point() else t.dtype

    def pieces() -> Iterator[Tensor]:
        flat = t.detach().reshape(-1)
        for start in range(0, flat.numel(), _PIECE):
            piece = flat[start : start + _PIECE]
            yield piece.to(to)
            _forget_pages(piece)

    return Source(dtype=to, shape=tuple(t.shape), pieces=pieces)


def write(path: Path, tensors: Mapping[str, Source], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file over what is at `path`.

    Raises:
        ValueError: naming a tensor whose dtype the format does not have.
    """
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name, source in tensors.items():
        if source.dtype not in _NAMES:
            raise ValueError(f"{name}: safetensors files have no {source.dtype}; pass --dtype")
        begin, end = end, end + source.bytes
        header[name] = {"dtype": _NAMES[source.dtype], "shape": list(source.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for source in tensors.values():
            for piece in source.pieces():
                file.write(piece.contiguous().view(torch.uint8).numpy().data)
        assert file.tell() == 8 + len(text) + end


def _forget_pages(t: Tensor) -> None:
    """Let the kernel take back whole pages of a private mapping of a file, which nobody has written to."""
    with contextlib.suppress(AttributeError, OSError):  # no libc with madvise: the kernel takes them when it must
        begin = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (t.data_ptr() + t.numel() * t.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
