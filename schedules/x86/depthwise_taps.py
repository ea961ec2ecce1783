"""Which input pixels a depthwise kernel interleaves, and which outputs each bundle of them serves.

A dot instruction sums `size` adjacent elements per lane (4 bytes for VPDPBUSD, 2 words for VPMADDWD), so a depthwise kernel interleaves, channel
by channel, the input pixels of up to `size` taps: a *bundle*. Interleaving costs more than the dot itself, so bundles are chosen once for a whole
tile of outputs, and every output that touches a bundle multiplies it with weights placed to suit, zero where a pixel is not one of its taps:

    3x3, stride 1, two output rows: a bundle is a column of 4 rows. Output row 0 uses weights (w0, w1, w2, 0), row 1 uses (0, w0, w1, w2).
    5x5: 4 rows of a column make a bundle; the fifth row's pixels go 4 columns to a bundle ("wide") or one by one ("tall").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Tap = tuple[int, int]  # (row, column)


@dataclass(frozen=True)
class Bundle:
    """`pixels`: input positions relative to the tile's first. `uses`: (output index in the tile, row-major; index of the weight pattern)."""

    pixels: tuple[Tap, ...]
    uses: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TapPlan:
    """Bundles in the order of emission (by column), and the distinct placements of kernel taps in a bundle (None: weight 0)."""

    bundles: tuple[Bundle, ...]
    patterns: tuple[tuple[Tap | None, ...], ...]

    @property
    def dots(self) -> int:
        """Dot instructions per channel vector for the whole tile."""
        return sum(len(b.uses) for b in self.bundles)

    @property
    def interleaves(self) -> int:
        return len(self.bundles)


def plan_taps(kernel: Tap, strides: Tap, dilation: Tap, tile: Tap, size: int, leftover: str) -> TapPlan:
    """The bundles of a tile of `tile` = (rows, columns) outputs.

    Rows of the input are taken `size` at a time. What remains below is a bundle of so many rows and one column (`leftover` "tall"), or is taken
    in powers of two, as many columns wide as fill a bundle ("wide").
    """
    taps = [(ky, kx) for ky in range(kernel[0]) for kx in range(kernel[1])]
    outputs = [(r, s) for r in range(tile[0]) for s in range(tile[1])]
    pixel_taps: dict[Tap, list[tuple[int, Tap]]] = {}
    for i, (r, s) in enumerate(outputs):
        for ky, kx in taps:
            pixel = (r * strides[0] + ky * dilation[0], s * strides[1] + kx * dilation[1])
            pixel_taps.setdefault(pixel, []).append((i, (ky, kx)))
    rows, columns = (sorted({p[axis] for p in pixel_taps}) for axis in (0, 1))
    boxes = [box for band, width in _bands(rows, size, leftover) for box in _boxes(band, columns, width)]
    patterns: dict[tuple[Tap | None, ...], int] = {}
    bundles = []
    for box in sorted(boxes, key=lambda b: (b[0][1], b[0][0])):
        pixels = tuple(p for p in box if p in pixel_taps)
        placed: dict[int, list[Tap | None]] = {}
        for slot, pixel in enumerate(pixels):
            for output, tap in pixel_taps[pixel]:
                placed.setdefault(output, [None] * size)[slot] = tap
        uses = tuple((o, patterns.setdefault(tuple(p), len(patterns))) for o, p in sorted(placed.items()))
        if uses:
            bundles.append(Bundle(pixels, uses))
    return TapPlan(tuple(bundles), tuple(patterns))


def _bands(rows: Sequence[int], size: int, leftover: str) -> list[tuple[list[int], int]]:
    """(rows of a band, columns of its bundles)."""
    bands, at = [], 0
    while at < len(rows):
        height = min(size, len(rows) - at)
        if height < size and leftover == "wide":
            height = 1 << (height.bit_length() - 1)
            bands.append((list(rows[at : at + height]), size // height))
        else:
            bands.append((list(rows[at : at + height]), 1))
        at += height
    return bands


def _boxes(band: Sequence[int], columns: Sequence[int], width: int) -> list[list[Tap]]:
    return [[(r, c) for c in columns[at : at + width] for r in band] for at in range(0, len(columns), width)]
