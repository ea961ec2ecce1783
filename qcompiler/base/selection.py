"""Selections: elements of a tensor picked by constant indices along its axes, as mirrored borders, flips and repetitions do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_BOXES = 64
"""Selections of more boxes have no integer form: each is a loop of its own in the kernel."""


@dataclass(frozen=True)
class Box:
    """A part of the result, `begin` and `shape`, and where it comes from: element `start + i * step` of the operand for its i-th along each axis. A step
    may be negative, or 0 for an element that is repeated."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]
    start: tuple[int, ...]
    step: tuple[int, ...]


def boxes(indices: Sequence[Sequence[int]], shape: Sequence[int]) -> list[Box]:
    """Disjoint boxes that make up the selection of `indices` (per axis; none of an axis that is taken whole) from an operand of `shape`."""
    runs = [list(_runs(chosen)) if chosen else [(0, extent, 0, 1)] for chosen, extent in zip(indices, shape, strict=True)]
    return [Box(*zip(*parts, strict=True)) for parts in itertools.product(*runs)]


def count_boxes(indices: Sequence[Sequence[int]]) -> int:
    """How many `boxes` makes of these."""
    return math.prod(sum(1 for _ in _runs(chosen)) if chosen else 1 for chosen in indices)


def _runs(chosen: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """(begin, count, start, step) of the longest runs of equal steps, from the first index on."""
    begin = 0
    while begin < len(chosen):
        end = begin + 1
        step = chosen[end] - chosen[begin] if end < len(chosen) else 1
        while end < len(chosen) and chosen[end] - chosen[end - 1] == step:
            end += 1
        yield begin, end - begin, chosen[begin], step
        begin = end
