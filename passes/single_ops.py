"""Data movement and pooling: which Relax calls have an int8 operator, and that operator's attributes.

`describe(call)` is a table look-up: Relax operator -> (group kind, tensor operands, attributes as the operator table of
docs/architecture.md names them), or the sentence that says why the call has no int8 form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.base.selection import MAX_BOXES, count_boxes
from qcompiler.passes.graph import arguments, const_value, is_const, plain, relax_op, shape_of, slice_ranges


@dataclass(frozen=True)
class Described:
    kind: str
    operands: list[Any]
    attrs: dict[str, Any]


def describe(expr: Any) -> Described | str | None:
    """What `expr` is as one int8 operator, why it has none (a sentence without its full stop), or None when it isn't data movement or
    pooling."""
    op = relax_op(expr)
    return _TABLE[op](expr) if op in _TABLE else None


def slice_of_split(split: Any, index: int) -> Described:
    """Output `index` of a `relax.split` as a slice."""
    shape = shape_of(split.args[0])
    axis = int(split.attrs.axis) % len(shape)
    sections = plain(split.attrs.indices_or_sections)
    bounds = [0, *sections, shape[axis]] if isinstance(sections, list) else list(range(0, shape[axis] + 1, -(-shape[axis] // sections)))
    if bounds[-1] != shape[axis]:
        bounds.append(shape[axis])
    bounds = [min(b, shape[axis]) for b in bounds]
    begin, end = [0] * len(shape), list(shape)
    begin[axis], end[axis] = bounds[index], bounds[index + 1]
    return Described("slice", [split.args[0]], {"begin": begin, "end": end, "strides": [1] * len(shape)})


def _pool(expr: Any) -> Described | str:
    a = expr.attrs
    if str(a.layout) != "NHWC" or str(a.out_layout or a.layout) != "NHWC":
        return f"pooling has an int8 kernel for layout NHWC only, not {a.layout}"
    kernel, strides, dilation = (plain(v) for v in (a.pool_size, a.strides, a.dilation))
    top, left, bottom, right = plain(a.padding)
    extra = []
    for axis, (before, after) in enumerate([(top, bottom), (left, right)]):  # ceil_mode is the padding that makes floor give the same size
        size, out = shape_of(expr.args[0])[1 + axis], shape_of(expr)[1 + axis]
        reach = (out - 1) * strides[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        extra.append(max(0, reach - size - before - after))
    attrs = {"kernel": kernel, "strides": strides, "padding": [top, left, bottom + extra[0], right + extra[1]]}
    if relax_op(expr) == "relax.nn.max_pool2d":
        return Described("max_pool2d", [expr.args[0]], {**attrs, "dilation": dilation})
    if dilation != [1, 1]:
        return "average pooling with dilation has no int8 kernel"
    if bool(a.count_include_pad) and any(extra):
        return "average pooling that counts padding has no int8 kernel with ceil_mode"
    return Described("avg_pool2d", [expr.args[0]], {**attrs, "count_include_pad": bool(a.count_include_pad)})


def _mean(expr: Any) -> Described:
    rank = len(expr.args[0].ty.shape)
    axes = plain(expr.attrs.axis)
    return Described(
        "mean",
        [expr.args[0]],
        {"axes": sorted(range(rank) if axes is None else {x % rank for x in axes}), "keepdims": bool(expr.attrs.keepdims)},
    )


def _adaptive_mean(expr: Any) -> Described | str:
    size = plain(expr.attrs.output_size)
    if str(expr.attrs.layout) != "NHWC" or size not in ([1, 1], [1]):
        return f"adaptive average pooling has an int8 kernel for layout NHWC and output size 1x1 only, not {expr.attrs.layout} and {size}"
    return Described("mean", [expr.args[0]], {"axes": [1, 2], "keepdims": True})


BENDS = ("relax.nn.leakyrelu", "relax.nn.prelu")


def slopes_of(expr: Any) -> np.ndarray | None:
    """float64, one per channel of the last axis: the factors of negative numbers of a leaky rectifier or a prelu that has an int8 form; else None."""
    if relax_op(expr) == BENDS[0]:
        slopes = np.full(shape_of(expr)[-1:], float(expr.attrs.alpha))
        return slopes if np.isfinite(slopes).all() else None
    found = _prelu(expr) if relax_op(expr) == BENDS[1] else ""
    return None if isinstance(found, str) else np.array(found.attrs["slopes"], np.float64)


def _prelu(expr: Any) -> Described | str:
    x, slope = expr.args
    if not is_const(slope) or int(expr.attrs.axis) % len(x.ty.shape) != len(x.ty.shape) - 1:
        return "prelu has an int8 kernel for constant slopes per channel only"
    slopes = np.broadcast_to(const_value(slope), shape_of(x)[-1:])
    return Described("prelu", [x], {"slopes": slopes.tolist()}) if np.isfinite(slopes).all() else "a slope is not finite"


def _concat(expr: Any) -> Described | str:
    operands = arguments(expr)
    if not all(isinstance(o, relax.Var) for o in operands):
        return "concatenation with a constant has no int8 kernel"
    return Described("concat", operands, {"axis": int(expr.attrs.axis) % len(expr.ty.shape) if expr.attrs.axis is not None else 0})


def _reshape(expr: Any) -> Described:
    return Described("reshape", [expr.args[0]], {"shape": list(shape_of(expr))})


def _transpose(expr: Any) -> Described:
    rank = len(expr.args[0].ty.shape)
    axes = plain(expr.attrs.axes)
    return Described("transpose", [expr.args[0]], {"axes": list(range(rank))[::-1] if axes is None else [x % rank for x in axes]})


def _slice(expr: Any) -> Described | str:
    taken = slice_ranges(expr)
    if taken is None:
        return "a slice whose bounds are computed at run time has no int8 kernel"
    if any(t.step < 0 for t in taken):
        chosen = [None if t == range(d) else np.array(t, np.int64) for t, d in zip(taken, shape_of(expr.args[0]), strict=True)]
        return "an empty slice has no int8 kernel" if any(c is not None and not c.size for c in chosen) else _selection(expr, chosen)
    bounds = {"begin": [t.start for t in taken], "end": [max(t.start, t.stop) for t in taken], "strides": [t.step for t in taken]}
    return Described("slice", [expr.args[0]], bounds)


_BORDERS = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}  # Relax's names of a padding's mode, and numpy's


def _pad(expr: Any) -> Described | str:
    widths, mode = plain(expr.attrs.pad_width), str(expr.attrs.pad_mode)
    if min(widths) >= 0 and mode in _BORDERS:
        pairs = zip(shape_of(expr.args[0]), widths[::2], widths[1::2], strict=True)
        return _selection(expr, [np.pad(np.arange(n), (a, b), mode=_BORDERS[mode]) if a or b else None for n, a, b in pairs])  # type: ignore[call-overload]
    if mode != "constant":
        return f"padding of mode '{mode}' has no int8 kernel; supported: constant, {', '.join(_BORDERS)}"
    if min(widths) < 0:
        return "padding by a negative width has no int8 kernel"
    if not math.isfinite(float(expr.attrs.pad_value)):
        return "padding with an infinity has no int8 kernel"
    return Described(
        "pad",
        [expr.args[0]],
        {"pads": [list(p) for p in zip(widths[::2], widths[1::2], strict=True)], "value": float(expr.attrs.pad_value)},
    )


def _flip(expr: Any) -> Described | str:
    shape = shape_of(expr)
    return _selection(expr, [np.arange(n)[::-1] if k == int(expr.attrs.axis) % len(shape) else None for k, n in enumerate(shape)])


def _take(expr: Any) -> Described | str:
    x, indices = expr.args
    if is_const(x) or not is_const(indices) or expr.attrs.axis is None or (chosen := const_value(indices)).ndim != 1:
        return "operator 'take' has no int8 kernel but for a table's rows, and for constant indices along one axis"
    shape = shape_of(x)
    axis = int(expr.attrs.axis) % len(shape)
    if not chosen.size or chosen.min() < 0 or chosen.max() >= shape[axis]:
        return "operator 'take' has no int8 kernel for indices outside of its operand"
    return _selection(expr, [chosen if k == axis else None for k in range(len(shape))])


def _broadcast(expr: Any) -> Described | str:
    before, after = shape_of(expr.args[0]), shape_of(expr)
    if len(before) != len(after):
        return "repetition along new dimensions has no int8 kernel"
    return _selection(expr, [None if a == b else np.zeros(b, np.int64) for a, b in zip(before, after, strict=True)])


def _selection(expr: Any, chosen: list[np.ndarray | None]) -> Described | str:
    """Indices along each axis; None of one that is taken whole."""
    indices = [[] if c is None else [int(i) for i in c] for c in chosen]
    if (count := count_boxes(indices)) > MAX_BOXES:
        return f"{relax_op(expr)} of {count} pieces has no int8 kernel; supported: up to {MAX_BOXES}".replace("relax.", "")
    return Described("select", [expr.args[0]], {"indices": indices})


def _resize(expr: Any) -> Described | str:
    a = expr.attrs
    method = {"nearest_neighbor": "nearest", "linear": "linear"}.get(str(a.method))
    transformation = str(a.coordinate_transformation_mode)
    if str(a.layout) != "NHWC" or method is None:
        return f"resize has int8 kernels for layout NHWC, nearest and linear, not {a.layout} and {a.method}"
    if transformation not in _COORDINATES:
        return f"resize with coordinates '{transformation}' has no int8 kernel; supported: {', '.join(_COORDINATES)}"
    size = [int(d) for d in expr.args[1].values]
    return Described("resize2d", [expr.args[0]], {"size": size, "method": method, "transformation": transformation, "rounding": str(a.rounding_method)})


_COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
_TABLE: dict[str | None, Callable[[Any], Described | str]] = {
    "relax.nn.max_pool2d": _pool,
    "relax.nn.avg_pool2d": _pool,
    "relax.nn.adaptive_avg_pool2d": _adaptive_mean,
    "relax.mean": _mean,
    "relax.nn.prelu": _prelu,
    "relax.concat": _concat,
    **dict.fromkeys(("relax.reshape", "relax.squeeze", "relax.expand_dims", "relax.flatten"), _reshape),
    "relax.permute_dims": _transpose,
    "relax.strided_slice": _slice,
    "relax.nn.pad": _pad,
    "relax.flip": _flip,
    "relax.take": _take,
    "relax.broadcast_to": _broadcast,
    "relax.image.resize2d": _resize,
}
