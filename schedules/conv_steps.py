"""Dot steps in the order in which a channel tile runs them, where an ISA has a short form of the step (`Isa.short`).

The short form is exact only for some weights. Each tile therefore sorts its steps, when weights are packed, by which of its blocks need the long
form; the kernel runs one loop per class and finds the activations of each step in a table. Weights decide the order, the table and the bounds
of the loops, all of them constants, and never the code.

    table, per group and tile:  [CLASSES] the number of steps up to the end of each class, [depth] where each step reads x
"""

from __future__ import annotations

import numpy as np

from qcompiler.schedules.conv_plan import Channels, Geometry
from qcompiler.schedules.isa import Isa

CLASSES = 5  # of `step_classes`, and at last the steps over the ragged end of a pixel


def step_classes(blocks: int) -> list[int]:
    """Bit masks of the blocks that a class computes in the long form, short ones first: every mask of few blocks, of many only none and all."""
    return list(range(1 << blocks)) if blocks <= 2 else [0, (1 << blocks) - 1]


def step_offsets(geometry: Geometry, isa: Isa) -> np.ndarray:
    """Where each step reads x, in elements from the first one, in the order of packed weights."""
    offsets = np.zeros(1, np.int64)
    for extent, step in geometry.loops(isa.group):
        offsets = (offsets[:, None] + np.arange(extent) * step).reshape(-1)
    return offsets.astype(np.int32)


def sort_steps(blocks: np.ndarray, geometry: Geometry, isa: Isa, channels: Channels) -> tuple[np.ndarray, np.ndarray]:
    """Packed weights and the table, for weights [G, vectors, depth, lanes, group]."""
    assert isa.short is not None
    groups, _, depth = blocks.shape[:3]
    offsets = step_offsets(geometry, isa)
    ragged = np.zeros(depth, bool)
    if geometry.tail(isa.group) != isa.group:
        ragged[geometry.loops(isa.group)[-1][0] - 1 :: geometry.loops(isa.group)[-1][0]] = True
    long, short = isa.pack_weights(blocks), isa.short.pack_weights(blocks)
    needs_long = ~isa.short.takes(blocks)
    weights, table = [], []
    for g in range(groups):
        for begin, count in tile_spans(channels):
            span = slice(begin, begin + count)
            masks = np.array(step_classes(count))
            wanted = (needs_long[g, span] << np.arange(count)[:, None]).sum(0)
            found = (wanted[:, None] & ~masks == 0).argmax(1)  # the first class that computes all of `wanted` in the long form
            kind = np.where(ragged, CLASSES - 1, found)
            order = np.argsort(kind, kind="stable")
            is_long = (np.append(masks, [(1 << count) - 1] * (CLASSES - len(masks)))[kind][:, None] >> np.arange(count)) & 1
            packed = np.where(is_long[..., None], long[g, span].swapaxes(0, 1), short[g, span].swapaxes(0, 1))
            weights.append(packed[order].reshape(-1))
            table += [np.searchsorted(kind[order], np.arange(CLASSES), side="right").astype(np.int32), offsets[order]]
    return np.concatenate(weights), np.concatenate(table)


def tile_spans(channels: Channels) -> list[tuple[int, int]]:
    """(first vector, vectors) of the tiles of a group."""
    full = [(i * channels.blocks, channels.blocks) for i in range(channels.full)]
    return full + [(channels.full * channels.blocks, channels.last)] * (channels.last > 0)


def table_size(geometry: Geometry, isa: Isa, channels: Channels) -> int:
    return geometry.groups * len(tile_spans(channels)) * (CLASSES + geometry.depth(isa.group))

