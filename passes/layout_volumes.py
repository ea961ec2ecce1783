"""Volumes as images: the rules of `layout_rules.py` for convolution and pooling over three axes. A volume [1, C, D, H, W] is held as D images.

    conv3d(x, w)              -->   conv2d(concat of the depths that tap 0 of w reads, those of tap 1, ... by channels, w with its taps as channels)
    conv3d_transpose(x, w)    -->   the same with conv2d_transpose, for each depth of the output modulo the stride
    max_pool3d, avg_pool3d    -->   pooling of each image, then of depths, as the rows of one image

So what holds for images holds for volumes: one quantization, one set of kernels. A batch of volumes is left to `volumes.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from qcompiler.passes.axes import DHWC
from qcompiler.passes.graph import const, const_value, is_const, plain, relax_op, shape_of
from qcompiler.passes.held_values import HeldValues


def conv(layout: HeldValues, name: str, expr: Any) -> bool:
    (x, weight), a, shape = expr.args, expr.attrs, shape_of(expr)
    if shape[0] != 1 or is_const(x) or not is_const(weight):
        return False
    w, groups = const_value(weight), int(a.groups)
    outputs, inputs, taps, *window = w.shape
    if groups > 1 and taps > 1:
        return False
    strides, dilation, padding = plain(a.strides), plain(a.dilation), plain(a.padding)
    images = _padded(layout, name, layout.ordered(layout.of(x), DHWC), padding[0], padding[3])
    reach = (shape[2] - 1) * strides[0] + 1
    joined = _joined(layout, name, images, [range(t * dilation[0], t * dilation[0] + reach, strides[0]) for t in range(taps)])
    kernel = const(np.ascontiguousarray(w.transpose(0, 3, 4, 2, 1)).reshape(outputs, *window, taps * inputs))
    call = relax.op.nn.conv2d(
        joined, kernel, strides=strides[1:], padding=_flat(padding), dilation=dilation[1:], groups=groups,
        data_layout="NHWC", kernel_layout="OHWI", out_layout="NHWC",
    )  # fmt: skip
    return layout.bind(name, call, DHWC, shape)


def conv_transpose(layout: HeldValues, name: str, expr: Any) -> bool:
    (x, weight), a, shape = expr.args, expr.attrs, shape_of(expr)
    if shape[0] != 1 or is_const(x) or not is_const(weight) or int(a.groups) > 1:
        return False
    w, stride, padding, dilation = const_value(weight), int(a.strides[0]), plain(a.padding), plain(a.dilation)
    reads = phases(w.shape[2], stride, padding[0], dilation[0])
    if not all(reads):  # some depths are zero
        return False
    images, count = layout.ordered(layout.of(x), DHWC), -(-shape[2] // stride)
    starts = [start for read in reads for start, _ in read]
    front = max(0, -min(starts))
    images = _padded(layout, name, images, front, max(0, max(starts) + count - shape_of(images)[0]))
    parts = []
    for read in reads:
        joined = _joined(layout, name, images, [range(start + front, start + front + count) for start, _ in read])
        kernel = np.concatenate([w[:, :, tap].transpose(0, 2, 3, 1) for _, tap in read])
        call = relax.op.nn.conv2d_transpose(
            joined, const(np.ascontiguousarray(kernel)), strides=plain(a.strides)[1:], padding=_flat(padding), dilation=dilation[1:],
            output_padding=plain(a.output_padding)[1:], data_layout="NHWC", kernel_layout="IHWO", out_layout="NHWC",
        )  # fmt: skip
        if stride == 1:
            return layout.bind(name, call, DHWC, shape)
        _, channels, _, *image = shape
        parts.append(_emit(layout, name, "phase", relax.op.reshape(_emit(layout, name, "plane", call), [count, 1, *image, channels])))
    y = relax.op.reshape(_emit(layout, name, "phases", relax.op.concat(parts, 1)), [count * stride, *image, channels])
    if count * stride > shape[2]:
        y = relax.op.strided_slice(_emit(layout, name, "whole", y), [0], [0], [shape[2]])
    return layout.bind(name, y, DHWC, shape)


def phases(taps: int, stride: int, padding: int, dilation: int) -> list[list[tuple[int, int]]]:
    """For each depth of a transposed convolution's output modulo the stride, (first depth, tap) of what it reads: depth i * stride + phase reads depths
    i + (phase + padding - tap * dilation) / stride, of the taps for which the division leaves nothing."""
    places = [[(phase + padding - t * dilation, t) for t in range(taps)] for phase in range(stride)]
    return [[(p // stride, t) for p, t in phase if p % stride == 0] for phase in places]


def pool(layout: HeldValues, name: str, expr: Any) -> bool:
    a, shape = expr.attrs, shape_of(expr)
    if shape[0] != 1 or is_const(expr.args[0]) or bool(a.ceil_mode):
        return False
    op = relax.op.nn.max_pool2d if "max" in str(relax_op(expr)) else relax.op.nn.avg_pool2d
    size, strides, dilation, padding = plain(a.pool_size), plain(a.strides), plain(a.dilation), plain(a.padding)

    def pooled(x: Any, size: list[int], strides: list[int], padding: list[int], dilation: list[int]) -> Any:
        return op(x, size, strides, padding, dilation, False, bool(a.count_include_pad), layout="NHWC", out_layout="NHWC")

    images = layout.ordered(layout.of(expr.args[0]), DHWC)
    flat = pooled(images, size[1:], strides[1:], _flat(padding), dilation[1:])
    if size[0] == strides[0] == 1 and not (padding[0] or padding[3]):
        return layout.bind(name, flat, DHWC, shape)
    _, channels, depth, height, width = shape
    rows = relax.op.reshape(_emit(layout, name, "flat", flat), [1, shape_of(images)[0], height * width, channels])
    deep = pooled(_emit(layout, name, "rows", rows), [size[0], 1], [strides[0], 1], [padding[0], 0, padding[3], 0], [dilation[0], 1])
    return layout.bind(name, relax.op.reshape(_emit(layout, name, "deep", deep), [depth, height, width, channels]), DHWC, shape)


def _padded(layout: HeldValues, name: str, images: Any, front: int, back: int) -> Any:
    return _emit(layout, name, "padded", relax.op.nn.pad(images, [front, back, 0, 0, 0, 0, 0, 0])) if front or back else images


def _joined(layout: HeldValues, name: str, images: Any, depths: list[range]) -> Any:
    """The depths that each tap reads, side by side as channels."""
    whole = range(shape_of(images)[0])
    parts = [images if d == whole else _emit(layout, name, "depths", relax.op.strided_slice(images, [0], [d.start], [d[-1] + 1], [d.step])) for d in depths]
    return _emit(layout, name, "taps", relax.op.concat(parts, 3)) if len(parts) > 1 else parts[0]


def _flat(padding: list[int]) -> list[int]:
    """Before and behind height and width, of the same for depth, height and width."""
    return [*padding[1:3], *padding[4:]]


def _emit(layout: HeldValues, name: str, what: str, expr: Any) -> Any:
    return layout.builder.emit(layout.builder.made(name, what), expr)
