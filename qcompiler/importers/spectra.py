"""Discrete Fourier transforms as products with constant matrices."""

from __future__ import annotations

import math

import numpy as np
from tvm import relax

from qcompiler.importers.nodes import Node, Refused, Value, real
from qcompiler.passes.graph import const

_LARGEST = 1 << 26  # elements of a matrix


def _matrix(length: int, points: int, parts: int, inverse: bool, onesided: bool) -> np.ndarray:
    """float32 [length * parts, outputs]: what takes `length` numbers of 1 (real) or 2 (complex) parts to their transform of `points` points.

    Numbers beyond `points` are left out, missing ones are zeros. onesided: the first half of the transform; with `inverse`, real results of half a
    transform. Source: ONNX operator documentation, DFT.
    """
    bins = points // 2 + 1 if onesided else points
    used = min(length, bins if inverse else points)
    steps = np.arange(used)[:, None] * np.arange(points if inverse else bins)[None, :] % points
    angle = 2 * np.pi / points * steps
    cosine, sine = np.cos(angle), np.sin(angle) * (1 if inverse else -1)
    if inverse and onesided:  # the other half is the conjugate: each number but the first (and the middle one) counts twice
        weight = np.full((used, 1), 2.0)
        weight[0] = 1.0
        if points % 2 == 0 and used == bins:
            weight[-1] = 1.0
        block = np.stack([cosine * weight, -sine * weight], 1)[:, :, :, None]
    else:
        block = np.stack([np.stack([cosine, sine], -1), np.stack([-sine, cosine], -1)], 1)
    block = block[:, :parts] / (points if inverse else 1)
    whole = np.zeros((length, *block.shape[1:]))
    whole[:used] = block
    return whole.reshape(length * parts, -1).astype(np.float32)


def _transformed(node: Node, x: Value, shape: tuple[int, ...], axis: int, points: int, inverse: bool, onesided: bool) -> Value:
    """The transform along `axis` of a tensor of `shape` whose last axis holds 1 or 2 parts."""
    parts = shape[-1]
    if parts not in (1, 2) or (inverse and onesided and parts != 2) or (onesided and not inverse and parts != 1):
        raise Refused(f"an input of shape {list(shape)} doesn't fit a {'onesided ' if onesided else ''}{'inverse ' if inverse else ''}transform")
    if points < 1 or shape[axis] * parts * points * 2 > _LARGEST:
        raise Refused(f"a transform of {points} points of an axis of {shape[axis]} is no product with a matrix of up to {_LARGEST} elements")
    matrix = _matrix(shape[axis], points, parts, inverse, onesided)
    others = [i for i in range(len(shape) - 1) if i != axis]
    moved = node.variable("moved", relax.op.permute_dims(x, [*others, axis, len(shape) - 1]))
    rows = [shape[i] for i in others]
    flat = node.variable("flat", relax.op.reshape(moved, (*rows, shape[axis] * parts)))
    product = node.emit("product", relax.op.matmul(flat, const(matrix)))
    width = 1 if inverse and onesided else 2
    split = node.emit("split", relax.op.reshape(product, (*rows, matrix.shape[1] // width, width)))
    order = [*others, axis, len(shape) - 1]
    return relax.op.permute_dims(split, [order.index(i) for i in range(len(shape))])


def dft(node: Node) -> list[Value]:
    shape = node.shape()
    given = [node.attrs.get("axis", 1)] if node.opset < 20 else (node.param("axis", 2) or [-2])
    axis = node.axis(int(given[0]), len(shape))
    if axis == len(shape) - 1:
        raise Refused("its axis is the one that holds real and imaginary parts")
    inverse, onesided = bool(node.attrs.get("inverse", 0)), bool(node.attrs.get("onesided", 0))
    points = (node.param("dft_length", 1) or [2 * (shape[axis] - 1) if inverse and onesided else shape[axis]])[0]
    return [_transformed(node, node.tensor(0), shape, axis, points, inverse, onesided)]


def stft(node: Node) -> list[Value]:
    """Frames taken from the signal, times the window, transformed."""
    shape, step = node.shape(), (node.param("frame_step", 1) or [0])[0]
    window = node.inputs[2] if node.has(2) else None
    length = (node.param("frame_length", 3) or [math.prod(node.shape(2)) if window is not None else shape[1]])[0]
    if step < 1 or not 0 < length <= shape[1]:
        raise Refused(f"frames of {length} every {step} don't fit a signal of {shape[1]}")
    count = (shape[1] - length) // step + 1
    places = np.arange(count)[:, None] * step + np.arange(length)[None, :]
    signal = node.tensor(0) if len(shape) == 3 else node.emit("parts", relax.op.expand_dims(node.tensor(0), 2))
    parts = shape[2] if len(shape) == 3 else 1
    flat = node.emit("frames", relax.op.take(signal, const(places.reshape(-1)), 1, mode="clip"))
    frames = node.emit("framed", relax.op.reshape(flat, (shape[0], count, length, parts)))
    if window is not None:
        weights = const(real(window).reshape(length, 1)) if isinstance(window, np.ndarray) else node.emit("window", relax.op.reshape(window, (length, 1)))
        frames = node.emit("windowed", relax.op.multiply(frames, weights))
    return [_transformed(node, frames, (shape[0], count, length, parts), 2, length, False, bool(node.attrs.get("onesided", 1)))]
