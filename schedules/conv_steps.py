"""Dot steps in the order in which a channel tile runs them, where an ISA has several forms of the step (`Isa.forms`).

Most forms are exact only for some weights. Each tile therefore sorts its steps, when weights are packed, by the cheapest forms that its blocks
can do with; the kernel runs one loop per class and finds the activations of each step in a table. Weights decide the order, the table and the
bounds of the loops, all of them constants, and never the code.

    table, per group and tile:  [classes + 1] the number of steps up to the end of each class, and of ragged ones; [depth] where a step reads x
"""

from __future__ import annotations

from itertools import product

import numpy as np

from qcompiler.schedules.conv_plan import Channels, Geometry
from qcompiler.schedules.isa import Isa


def step_classes(isa: Isa, blocks: int) -> list[tuple[int, ...]]:
    """The form of each block, per class, cheapest class first: for up to two blocks every combination, except that a block in the last form
    has none but the first one beside it; for more blocks one form for all."""
    last = len(isa.forms) - 1
    if blocks > 2:
        return [(form,) * blocks for form in range(last + 1)]
    mixed = [c for c in product(range(last + 1), repeat=blocks) if last not in c or set(c) <= {0, last}]
    return sorted(mixed, key=lambda c: (c.count(last), len(set(c) - {0}), c))


def table_pitch(isa: Isa, channels: Channels, depth: int) -> tuple[int, int]:
    """(where the offsets of a tile's part of the table begin, its length)."""
    head = 1 + max(len(step_classes(isa, blocks)) for _, blocks in tile_spans(channels))
    return head, head + depth


def step_offsets(geometry: Geometry, isa: Isa) -> np.ndarray:
    """Where each step reads x, in elements from the first one, in the order of packed weights: in the type of the table."""
    offsets = np.zeros(1, np.int64)
    for extent, step in geometry.loops(isa.group):
        offsets = (offsets[:, None] + np.arange(extent) * step).reshape(-1)
    return offsets.astype(np.uint16 if max(offsets[-1], len(offsets)) < 1 << 16 else np.int32)


def sort_steps(steps: np.ndarray, geometry: Geometry, isa: Isa, channels: Channels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For weights [G, vectors, depth, lanes, group]: packed weights, the table, and what the forms leave out of each lane, int64 [G, vectors, lanes]."""
    groups, _, depth = steps.shape[:3]
    offsets, (head, pitch) = step_offsets(geometry, isa), table_pitch(isa, channels, depth)
    ragged = np.zeros(depth, bool)
    if geometry.tail(isa.group) != isa.group:
        per_pixel = geometry.loops(isa.group)[-1][0]
        ragged[per_pixel - 1 :: per_pixel] = True
    missing = np.stack([form.missing(steps) for form in isa.forms])  # [form, G, vectors, depth, lanes]
    packed = np.stack([form.pack_weights(steps) for form in isa.forms])  # [form, G, vectors, depth, bytes]
    taken = np.stack([form.takes(steps) for form in isa.forms])  # [form, G, vectors, depth]
    spans = tile_spans(channels)
    table = np.zeros((groups, len(spans), pitch), offsets.dtype)
    weights, absent = [], np.zeros((*steps.shape[:2], isa.lanes), np.int64)
    for g, (t, (begin, blocks)) in product(range(groups), enumerate(spans)):
        classes = np.array(step_classes(isa, blocks))
        vectors = begin + np.arange(blocks)
        fits = taken[classes, g, vectors].all(1)  # [class, depth]
        kind = np.where(ragged, len(classes), fits.argmax(0))
        order = np.argsort(kind, kind="stable")
        forms = np.append(classes, classes[-1:], axis=0)[kind[order]]  # [depth, block]
        weights.append(packed[forms, g, vectors, order[:, None]].reshape(-1))
        absent[g, vectors] = missing[forms, g, vectors, order[:, None]].sum(0)
        table[g, t, : len(classes) + 1] = np.searchsorted(kind[order], np.arange(len(classes) + 1), side="right")
        table[g, t, head:] = offsets[order]
    return np.concatenate(weights), table.reshape(-1), absent


def tile_spans(channels: Channels) -> list[tuple[int, int]]:
    """(first vector, vectors) of the tiles of a group."""
    full = [(i * channels.blocks, channels.blocks) for i in range(channels.full)]
    return full + [(channels.full * channels.blocks, channels.last)] * (channels.last > 0)
