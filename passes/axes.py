"""Orders of axes: the arithmetic behind layout.py.

A value of the source network has axes 0, 1, 2, ... A variable may hold it with its axes in another order, without some axes of size 1, or with
extra ones. An `Order` says which: entry k is the value's axis that axis k of the variable is, None for an extra one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Order = tuple[int | None, ...]
NHWC: Order = (0, 2, 3, 1)
N1WC: Order = (0, None, 2, 1)  # a signal [N, C, W] as an image of height 1
DHWC: Order = (2, 3, 4, 1)  # a volume [1, C, D, H, W] as D images


@dataclass(frozen=True, eq=False)
class Held:
    """Axis k of `var` is axis `order[k]` of the value, whose shape is `shape`; axes of size 1 may be missing, None is an extra axis of size 1."""

    id: str
    var: Any
    order: Order
    shape: tuple[int, ...]

    @property
    def moving(self) -> list[int]:
        """The value's axes longer than 1, as the variable orders them: values equal in this are reshapes of each other."""
        return [a for a in self.order if a is not None and self.shape[a] != 1]


def complete(order: Order, shape: tuple[int, ...]) -> Order:
    """`order` with the value's missing axes (all of size 1) put in.

    As NHWC where that fits, in the value's own order where that fits, else behind their neighbours.
    """
    rank = len(shape)
    missing = [a for a in range(rank) if a not in order]
    if not missing:
        return order
    moving = [a for a in order if a is not None and shape[a] != 1]
    for candidate in ([NHWC] if rank == 4 else []) + [tuple(range(rank))]:
        if [a for a in candidate if a is not None and shape[a] != 1] == moving:
            return candidate
    result = [a for a in order if a is not None]
    for a in missing:
        result.insert(result.index(a - 1) + 1 if a else 0, a)
    return tuple(result)


def transposed(array: np.ndarray, order: Order) -> np.ndarray:
    """An array in the file's order as a variable of `order` would hold it; axes that `order` lacks are of size 1."""
    kept = [a for a in order if a is not None]
    moved = array.transpose(kept + [a for a in range(array.ndim) if a not in kept])
    return np.ascontiguousarray(moved.reshape([1 if a is None else array.shape[a] for a in order]))


def together(sequence: list[int], joined: list[list[int]]) -> tuple[list[int], list[int]]:
    """`sequence` with the axes of each list side by side and in order: brought to the place of the first of them; of the last of them."""
    first, last = list(sequence), list(sequence)
    for axes in joined:
        place = min(first.index(a) for a in axes)
        before = [a for a in first[:place] if a not in axes]
        first = before + axes + [a for a in first[place:] if a not in axes]
        place = max(last.index(a) for a in axes) + 1
        before = [a for a in last[:place] if a not in axes]
        last = before + axes + [a for a in last[place:] if a not in axes]
    return first, last


def matched(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """Which axes of `old` become which axes of `new`, as small as possible; axes of size 1 are left out. None for empty tensors."""
    if 0 in old:
        return None
    a, b = ([i for i, d in enumerate(s) if d != 1] for s in (old, new))
    groups: list[tuple[list[int], list[int]]] = []
    while a:
        left, right = [a.pop(0)], [b.pop(0)]
        p, q = old[left[0]], new[right[0]]
        while p != q:
            if p < q:
                left.append(a.pop(0))
                p *= old[left[-1]]
            else:
                right.append(b.pop(0))
                q *= new[right[-1]]
        groups.append((left, right))
    return groups


def renamed(sequence: list[int], groups: list[tuple[list[int], list[int]]]) -> list[int]:
    """The axes of the result, in the order that `sequence` (axes that are joined lie together) puts them."""
    joined = {old[0]: new for old, new in groups}
    return [a for old in sequence if old in joined for a in joined[old]]
