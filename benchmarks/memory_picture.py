# SPDX-License-Identifier: Apache-2.0
"""What each way of training plans to hold and to move for a Llama-shaped model in bf16, and a picture of it.

    python benchmarks/memory_picture.py             # Llama-3.1-8B: a table, and one JSON line last
    python benchmarks/memory_picture.py --write     # also docs/images/memory.svg

Everything here is arithmetic on one GPU with the default settings; **nothing was measured, and nothing has run on a
GPU**. A test compares the figures of the three methods with what an engine plans for a tiny model on a CPU.

Not counted: activations, and what the forward and backward hold for a moment. Both depend on batch, length and gradient
checkpointing.

Per parameter, p parameters in all:

  full fine-tuning   device 16 p bytes: weight 2, gradient 2, fp32 master 4, moments 8 (ZeRO, arXiv 1910.02054)
  ZeRO-Offload       device 2 p (weights) and two buckets of gradients of ds_configs/zero2_offload.json; host 14 p;
                     bus 2 p each way (ZeRO-Offload, arXiv 2101.06840)

The methods, per value that crosses the bus (s values of S, t values of tiles, e values of tensors that train whole):

  gradient sum on the device, fp32             4      for s, t and e
  reply on the device, bf16                    2      for s, t and e; a CPU needs none
  S: moments, payload, reply on the host      12 s
  tiles: master, moments, original, both      18 t    (14 t of it on the device if `state_device` says so)
  whole tensors: master, moments, both        18 e    (their gradients go down in fp32)
  adapter, per value of a row                 16 host: master 4, replica 2, moments 8, payload 2;
                                              6 device, for `cache_rows` rows: value 2, gradient sum 4
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "memory.svg"
GIB = 2**30
BF16 = 2
_BUCKET = 200_000_000  # elements; ds_configs/zero2_offload.json
_STATE_SHARE = 0.05  # of the card's memory: what `state_device: "auto"` lets state take there


@dataclass(frozen=True, kw_only=True)
class Llama:
    """Sizes of a Llama with an output head of its own."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    kv: int
    vocab: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """[out, in] of one layer's linear layers: q, k, v, o, gate, up, down."""
        d, m = self.hidden, self.intermediate
        return [(d, d), (self.kv, d), (self.kv, d), (d, d), (m, d), (m, d), (d, m)]

    @property
    def ends(self) -> int:
        """Parameters of the embeddings and the output head."""
        return 2 * self.vocab * self.hidden

    @property
    def norms(self) -> int:
        return (2 * self.layers + 1) * self.hidden

    @property
    def two_dimensional(self) -> int:
        """Elements of all 2-D weights."""
        return self.ends + self.layers * sum(m * n for m, n in self.matrices)

    @property
    def parameters(self) -> int:
        return self.two_dimensional + self.norms


LLAMA_8B = Llama(name="Llama-3.1-8B", hidden=4096, intermediate=14336, layers=32, kv=1024, vocab=128256)


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes: on the device (weights of the base left out), on the host, and over the bus in one step, at most."""

    device: int = 0
    host: int = 0
    down: int = 0
    up: int = 0

    def __add__(self, other: Need) -> Need:
        return Need(
            device=self.device + other.device,
            host=self.host + other.host,
            down=self.down + other.down,
            up=self.up + other.up,
        )


def whole_tensors(values: int, *, gpu: bool = True) -> Need:
    """Tensors that train uncompressed: embeddings, norms, routers."""
    return Need(device=values * (4 + BF16 * gpu), host=values * (12 + BF16 + 4), down=4 * values, up=BF16 * values)


def subspace(model: Llama, *, nonzeros: int = 4, ends: bool = True, gpu: bool = True) -> Need:
    """Projectors at d = half of the shorter side. `ends`: what lies outside the layers trains too, as by
    default."""
    values = sum((min(shape) // 2) ** 2 for shape in model.matrices)
    need = Need(
        device=values * (4 + BF16 * gpu) + _projectors(model.matrices, nonzeros),
        host=values * (8 + 2 * BF16),
        down=BF16 * values,
        up=BF16 * values,
    )
    every_layer = sum([need] * model.layers, Need())
    whole = model.norms + model.ends if ends else model.norms - model.hidden
    return every_layer + whole_tensors(whole, gpu=gpu)


def _projectors(matrices: Sequence[tuple[int, int]], nonzeros: int) -> int:
    """Two views of each projector, 4 bytes per nonzero; k and v share one of their input, gate and up too."""
    (q, k, _, o, gate, _, down), sides = matrices, [m for m, _ in matrices]
    return 8 * nonzeros * (sum(sides) + q[1] + k[1] + o[1] + gate[1] + down[1])


def sparse_matrix(model: Llama, *, density: float = 0.01, on_device: bool, gpu: bool = True) -> Need:
    """Tiles; `on_device`: their masters and moments are there, and nothing crosses the bus."""
    values = math.floor(density * model.two_dimensional)
    state, device = values * (12 + BF16), values * (4 + BF16 * gpu)
    if on_device:
        return Need(device=device + state)
    return Need(device=device, host=state + 2 * BF16 * values, down=BF16 * values, up=BF16 * values)


def sparse_adapter(
    model: Llama,
    *,
    rows: int | None = None,
    experts: int | None = None,
    cache_rows: int = 4096,
    router_weights: bool = True,
    gpu: bool = True,
) -> Need:
    """Rows on the host and a cache of them on the device; at most all rows are active in a step."""
    d = model.hidden
    r = 2 * d if rows is None else rows
    n = round(4 * math.sqrt(r)) if experts is None else experts
    width = 2 * d
    layer = Need(
        device=min(cache_rows, r) * width * (BF16 + 4) + router_weights * BF16 * n * d,
        host=r * width * (4 + BF16 + 8 + BF16) + 9 * r,
        down=BF16 * r * width,
        up=BF16 * r * width,
    )
    return sum([layer + whole_tensors(n * d, gpu=gpu)] * model.layers, Need())


def state_fits_card(values: int, card_gib: float) -> bool:
    """Whether `state_device: "auto"` puts fp32 masters and moments of so many values on a card."""
    return 12 * values <= _STATE_SHARE * card_gib * GIB


@dataclass(frozen=True, kw_only=True)
class Row:
    """One bar: what it is, the base's weights on the device, and all else."""

    name: str
    weights: int
    need: Need


def rows(model: Llama = LLAMA_8B, card_gib: float = 24) -> list[Row]:
    """The bars of the picture."""
    p = model.parameters
    weights, buckets = BF16 * p, 2 * BF16 * _BUCKET
    full = Need(device=14 * p)
    offload = Need(device=buckets, host=14 * p, down=BF16 * p, up=BF16 * p)
    on_card = state_fits_card(math.floor(0.01 * model.two_dimensional), card_gib)
    found = {
        "full fine-tuning": full,
        "ZeRO-Offload": offload,
        "subspace": subspace(model),
        'subspace, "train": ["layers"]': subspace(model, ends=False),
        "sparse_adapter": sparse_adapter(model),
        "sparse_matrix": sparse_matrix(model, on_device=on_card),
    }
    return [Row(name=name, weights=weights, need=need) for name, need in found.items()]


def gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f}"


def table(found: Sequence[Row]) -> str:
    """Markdown, in GiB."""
    lines = [
        "| way of training | GPU, weights | GPU, the rest | GPU | host | bus per step, at most |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = (
            row.weights,
            row.need.device,
            row.weights + row.need.device,
            row.need.host,
            row.need.down + row.need.up,
        )
        lines.append(f"| {row.name} | " + " | ".join(map(gib, cells)) + " |")
    return "\n".join(lines)


# -- the picture -------------------------------------------------------------------------------------------------------

_WEIGHTS, _REST, _HOST, _TEXT, _LINE = "#5b7fa6", "#e08e45", "#8aa37b", "#24292f", "#d0d7de"
_LEFT, _TOP, _STEP, _BAR, _WIDE, _GAP = 214, 84, 38, 20, 250, 54


def picture(found: Sequence[Row], model: Llama = LLAMA_8B) -> str:
    """The SVG: GPU memory on the left, host memory on the right, on one scale."""
    most = max(max(row.weights + row.need.device, row.need.host) for row in found)
    per_byte = _WIDE / most
    width, height = _LEFT + 2 * _WIDE + 2 * _GAP + 10, _TOP + _STEP * len(found) + 44
    second = _LEFT + _WIDE + _GAP
    body = [
        _text(16, 26, f"{model.name} in bf16: memory that training plans to hold", size=16, weight="bold"),
        _text(16, 46, "GiB, one GPU, default settings, without activations. Planned: nothing has run on a GPU yet."),
        _text(_LEFT, _TOP - 14, "GPU memory", weight="bold"),
        _text(second, _TOP - 14, "host memory", weight="bold"),
        f'<line x1="{_LEFT}" y1="{_TOP - 6}" x2="{_LEFT}" y2="{height - 40}" stroke="{_LINE}"/>',
        f'<line x1="{second}" y1="{_TOP - 6}" x2="{second}" y2="{height - 40}" stroke="{_LINE}"/>',
    ]
    for index, row in enumerate(found):
        y = _TOP + _STEP * index
        weights, rest, host = (per_byte * b for b in (row.weights, row.need.device, row.need.host))
        body += [
            _text(_LEFT - 10, y + 15, row.name, anchor="end"),
            _bar(_LEFT, y, weights, _WEIGHTS),
            _bar(_LEFT + weights, y, rest, _REST),
            _text(_LEFT + weights + rest + 6, y + 15, gib(row.weights + row.need.device)),
            _bar(second, y, host, _HOST),
            _text(second + host + 6, y + 15, gib(row.need.host)),
        ]
    legend = [(_WEIGHTS, "weights"), (_REST, "gradients, state, buffers"), (_HOST, "state and buffers on the host")]
    for index, (colour, words) in enumerate(legend):
        x = _LEFT + 190 * index
        body += [_bar(x, height - 26, 12, colour, 12), _text(x + 18, height - 15, words)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">',
            f"<title>Planned GPU and host memory of six ways to train {model.name}</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, words: str, *, size: int = 13, weight: str = "normal", anchor: str = "start") -> str:
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{_TEXT}">{words}</text>'
    )


def _bar(x: float, y: float, width: float, colour: str, height: float = _BAR) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{colour}"/>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=float, default=24, help="GiB of the card, for state_device auto")
    parser.add_argument("--write", action="store_true", help="also draw docs/images/memory.svg")
    args = parser.parse_args()
    found = rows(card_gib=args.card)
    print(f"{LLAMA_8B.name}, {LLAMA_8B.parameters:,} parameters, bf16, one GPU; GiB, planned, without activations\n")
    print(table(found))
    if args.write:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        PICTURE.write_text(picture(rows()), encoding="utf-8")
        print(f"\nwrote {PICTURE}")
    print()
    print(
        json.dumps(
            {
                "benchmark": "memory_picture",
                "model": LLAMA_8B.name,
                "planned": True,
                "rows": {row.name: {"weights": row.weights, **row.need.__dict__} for row in found},
            }
        )
    )


if __name__ == "__main__":
    main()
