"""Taps of convolutions that meet padding alone, such as all but the middle one of 3x3 on an image of one pixel: operators are lowered without them.

    conv2d(x, w, padding)  -->  conv2d(x, w[:, rows, columns], less padding)

They add (zero point - zero point) * w. Which taps those are depends on the shape of the image, so modules have all of them: one network at several shapes has
one set of weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qcompiler.backend.node import Node, Taps

CONVOLUTIONS = ("qc.conv2d", "qc.f32.conv2d")
WEIGHT = 1  # number of the operand


def without_unread_taps(node: Node, image: Sequence[int]) -> Node:
    """A convolution, which reads images of that shape, without taps that meet padding alone."""
    weights = node.operands[WEIGHT]
    found = read_taps(image, weights.shape, node.attrs) if isinstance(weights, np.ndarray) else None
    if found is None:
        return node
    taps, padding = found
    operands = [o if isinstance(o, str) else read_of(i, o, taps) for i, o in enumerate(node.operands)]
    return replace(node, operands=operands, attrs={**node.attrs, "padding": padding}, taps=taps)


def read_taps(image: Sequence[int], weights: Sequence[int], attrs: Mapping[str, Any]) -> tuple[Taps, list[int]] | None:
    """(the taps that read at least one pixel, the padding that they need) of a convolution of an image [N, H, W, C] with weights [O, KH, KW, I]; None where
    they are all, or none."""
    strides, dilation, padding = attrs["strides"], attrs["dilation"], list(attrs["padding"])
    taps = [slice(None)]
    for axis in (0, 1):
        found = _along(image[1 + axis], weights[1 + axis], strides[axis], dilation[axis], padding[axis], padding[axis + 2])
        if found is None:
            return None
        kept, padding[axis], padding[axis + 2] = found
        taps.append(kept)
    return None if all(t == slice(0, size) for t, size in zip(taps[1:], weights[1:3], strict=True)) else (tuple(taps), padding)


def _along(size: int, taps: int, stride: int, dilation: int, before: int, after: int) -> tuple[slice, int, int] | None:
    """(taps, padding before, padding behind) of one axis; None where no tap reads anything."""
    count = (size + before + after - (taps - 1) * dilation - 1) // stride + 1  # of outputs
    read = []
    for tap in range(taps):
        offset = tap * dilation - before  # output i reads i * stride + offset
        first = max(0, -(offset // stride))  # the first output for which that is not negative
        if first < count and first * stride + offset < size:
            read.append(tap)
    if not read:
        return None
    begin, end = min(read[0], before // dilation), read[-1] + 1
    if (begin, end) == (0, taps):
        return slice(0, taps), before, after
    front = before - begin * dilation
    back = (count - 1) * stride + (end - 1 - begin) * dilation + 1 - size - front
    if back < 0 and (size + front - (end - 1 - begin) * dilation - 1) // stride + 1 != count:
        return slice(0, taps), before, after
    return slice(begin, end), front, max(back, 0)


def read_of(index: int, operand: np.ndarray, taps: Taps | None) -> np.ndarray:
    """What an operator that was lowered with some taps reads of an operand of the module: of the weights those."""
    return operand if taps is None or index != WEIGHT else np.ascontiguousarray(operand[taps])
