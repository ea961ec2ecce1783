"""ONNX operators that move, slice or join data, and reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import helper
from tvm import relax

from qcompiler.importers.nodes import Node, Refused, Value
from qcompiler.passes.graph import const

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def reshape(node: Node) -> list[Value]:
    old, wanted = node.shape(), node.param("shape", 1)
    if wanted is None:
        raise Refused("it has no target shape")
    if not node.attrs.get("allowzero", 0):
        wanted = [old[i] if d == 0 else d for i, d in enumerate(wanted)]
    if -1 in wanted:
        known = math.prod(d for d in wanted if d != -1)
        if known == 0 or math.prod(old) % known:
            raise Refused(f"a tensor of shape {list(old)} can't be reshaped to {wanted}")
        wanted = [math.prod(old) // known if d == -1 else d for d in wanted]
    if math.prod(wanted) != math.prod(old):
        raise Refused(f"a tensor of shape {list(old)} can't be reshaped to {wanted}. Was the model exported for another input shape?")
    return [node.reshape(node.inputs[0], wanted)]


def flatten(node: Node) -> list[Value]:
    shape = node.shape()
    axis = int(node.attrs.get("axis", 1))
    axis = axis + len(shape) if axis < 0 else axis
    return [node.reshape(node.inputs[0], (math.prod(shape[:axis]), math.prod(shape[axis:])))]


def squeeze(node: Node) -> list[Value]:
    shape = node.shape()
    axes = node.axes("axes", 1, len(shape))
    if axes is None:
        axes = [i for i, d in enumerate(shape) if d == 1]
    if any(shape[a] != 1 for a in axes):
        raise Refused(f"axes {axes} of a tensor of shape {list(shape)} are not all 1")
    return [node.reshape(node.inputs[0], [d for i, d in enumerate(shape) if i not in axes])]


def unsqueeze(node: Node) -> list[Value]:
    shape = list(node.shape())
    wanted = node.param("axes", 1) or []
    for axis in sorted(node.axis(a, len(shape) + len(wanted)) for a in wanted):
        shape.insert(axis, 1)
    return [node.reshape(node.inputs[0], shape)]


def transpose(node: Node) -> list[Value]:
    rank = len(node.shape())
    axes = [int(a) for a in node.attrs.get("perm", range(rank - 1, -1, -1))]
    if sorted(a % max(rank, 1) for a in axes) != list(range(rank)):
        raise Refused(f"perm {axes} is no permutation of {rank} axes")
    return [node.inputs[0] if axes == list(range(rank)) else relax.op.permute_dims(node.tensor(0), axes)]


def concat(node: Node) -> list[Value]:
    axis = node.axis(int(node.attrs.get("axis", 1)), len(node.shape()))
    parts = [node.tensor(i) for i in range(len(node.inputs)) if node.shape(i)[axis] > 0] or [node.tensor(0)]
    return [parts[0] if len(parts) == 1 else relax.op.concat(parts, axis)]


def split(node: Node) -> list[Value]:
    shape, count = node.shape(), len(node.outputs)
    axis = node.axis(int(node.attrs.get("axis", 0)), len(shape))
    sizes = node.param("split", 1)
    if sizes is None:
        each = -(-shape[axis] // count)
        sizes = [each] * (count - 1) + [shape[axis] - each * (count - 1)]
    if len(sizes) != count or sum(sizes) != shape[axis] or min(sizes) < 0:
        raise Refused(f"an axis of {shape[axis]} can't be split into {sizes}")
    empty = np.zeros([0 if i == axis else d for i, d in enumerate(shape)], node.dtype())
    filled = [s for s in sizes if s > 0]
    if len(filled) < 2:
        return [node.inputs[0] if s else empty for s in sizes]
    parts = node.emit("split", relax.op.split(node.tensor(0), [int(v) for v in np.cumsum(filled)[:-1]], axis))
    items = iter(range(len(filled)))
    return [relax.TupleGetItem(parts, next(items)) if s else empty for s in sizes]


def slice_(node: Node) -> list[Value]:
    """numpy's slices. A negative step is a flip followed by a slice with a positive one."""
    shape = node.shape()
    starts, ends = node.param("starts", 1) or [], node.param("ends", 2) or []
    axes = node.axes("axes", 3, len(shape)) or list(range(len(starts)))
    steps = node.param("steps", 4) or [1] * len(starts)
    x, used, begin, end, strides = node.tensor(0), [], [], [], []
    ranges = [range(*slice(first, last, step).indices(shape[a])) for a, first, last, step in zip(axes, starts, ends, steps, strict=True)]
    if any(len(indices) == 0 for indices in ranges):
        lengths = dict(zip(axes, map(len, ranges), strict=True))
        return [np.zeros([lengths.get(a, d) for a, d in enumerate(shape)], node.dtype())]
    for a, indices, step in zip(axes, ranges, steps, strict=True):
        low = indices[0]
        if step < 0:
            x, low = node.emit("flip", relax.op.flip(x, a)), shape[a] - 1 - indices[0]
        if len(indices) < shape[a] or abs(step) != 1:
            used.append(a)
            begin.append(low)
            end.append(low + (len(indices) - 1) * abs(step) + 1)
            strides.append(abs(step))
    return [relax.op.strided_slice(x, used, begin, end, strides) if used else x]


def gather(node: Node) -> list[Value] | None:
    """Constant indices: one index is a slice, several are `relax.take`. Indices computed at run time are left to Relax's importer."""
    indices = node.inputs[1]
    if not isinstance(indices, np.ndarray):
        return None
    shape = node.shape()
    axis = node.axis(int(node.attrs.get("axis", 0)), len(shape))
    if indices.size and not (-shape[axis] <= indices.min() and indices.max() < shape[axis]):
        raise Refused(f"an index is out of range for an axis of {shape[axis]}")
    indices = np.where(indices < 0, indices + shape[axis], indices).astype(np.int64)
    if indices.size == 1:
        i, result = int(indices.reshape(-1)[0]), [*shape[:axis], *indices.shape, *shape[axis + 1 :]]
        part = node.tensor(0) if shape[axis] == 1 else node.emit("slice", relax.op.strided_slice(node.tensor(0), [axis], [i], [i + 1], [1]))
        return [node.reshape(part, result)]
    return [relax.op.take(node.tensor(0), const(indices), axis, mode="clip")]


def pad(node: Node) -> list[Value]:
    """Negative pads crop first."""
    shape = node.shape()
    pads = node.param("pads", 1) or node.param("paddings", 1)  # "paddings": operator set 1
    if pads is None:
        raise Refused("it has no pads")
    axes = node.axes("axes", 3, len(shape)) or list(range(len(shape)))
    before, after = [0] * len(shape), [0] * len(shape)
    for a, b, e in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        before[a], after[a] = b, e
    mode = node.text("mode", "constant")
    if mode not in _PAD_MODES:
        raise Refused(f"mode '{mode}' is unknown; supported: {', '.join(_PAD_MODES)}")
    filling = node.constant(2, "constant_value") if node.has(2) else np.asarray(node.attrs.get("value", 0.0))
    value = float(np.ravel(filling)[0]) if filling is not None and filling.size else 0.0
    x = node.tensor(0)
    cropped = [a for a in range(len(shape)) if before[a] < 0 or after[a] < 0]
    if cropped:
        begin, end = [max(-before[a], 0) for a in cropped], [shape[a] - max(-after[a], 0) for a in cropped]
        x = relax.op.strided_slice(x, cropped, begin, end, [1] * len(cropped))
        before, after = [max(b, 0) for b in before], [max(e, 0) for e in after]
        x = node.emit("crop", x) if any(before) or any(after) else x
    if not any(before) and not any(after):
        return [x]
    return [relax.op.nn.pad(x, [w for pair in zip(before, after, strict=True) for w in pair], _PAD_MODES[mode], value)]


def expand(node: Node) -> list[Value]:
    old, wanted = node.shape(), node.param("shape", 1) or []
    shape = np.broadcast_shapes(old, tuple(wanted))
    x = node.reshape(node.inputs[0], [1] * (len(shape) - len(old)) + list(old))
    x = x if not isinstance(x, relax.Expr) or isinstance(x, relax.Var) else node.emit("ranked", x)
    return [x if tuple(old) == shape or math.prod(old) == math.prod(shape) else relax.op.broadcast_to(x, shape)]


def tile(node: Node) -> list[Value]:
    """A broadcast along axes of repetitions: read as `x[i % n]`, LLVM's vectors run past the end of x."""
    repeats = node.param("repeats", 1) or []
    shape = node.shape()
    if len(repeats) != len(shape) or min(repeats, default=0) < 0:
        raise Refused(f"repeats {repeats} are not {len(shape)} non-negative numbers")
    result = [d * r for d, r in zip(shape, repeats, strict=True)]
    if result == list(shape):
        return [node.inputs[0]]
    if 0 in result:
        return [np.zeros(result, node.dtype())]
    once = node.emit("once", relax.op.reshape(node.tensor(0), [d for n, r in zip(shape, repeats, strict=True) for d in ((n,) if r == 1 else (1, n))]))
    often = [d for n, r in zip(shape, repeats, strict=True) for d in ((n,) if r == 1 else (r, n))]
    return [relax.op.reshape(node.emit("often", relax.op.broadcast_to(once, often)), result)]


def cast(node: Node) -> list[Value]:
    """Every floating type is float32 here, so casts between them are nothing."""
    wanted = helper.tensor_dtype_to_np_dtype(int(node.attrs["to"]))
    target = "float32" if wanted.kind == "f" or wanted.name == "bfloat16" else str(wanted)
    if wanted.kind not in "fiub" and wanted.name != "bfloat16":
        raise Refused(f"a cast to {wanted} is not supported")
    return [node.inputs[0] if node.dtype() == target else relax.op.astype(node.tensor(0), target)]


def reduced_axes(node: Node) -> list[int]:
    """The axes that a Reduce* sums over, in order; none where empty axes mean that each element stands for itself."""
    rank = len(node.shape())
    axes = node.axes("axes", 1, rank)
    return sorted(axes) if axes else [] if node.attrs.get("noop_with_empty_axes", 0) else list(range(rank))


_Unary = Callable[[Any], Any]


def reduction(reduce: Callable[..., Any], before: _Unary | None = None, after: _Unary | None = None) -> Callable[[Node], list[Value]]:
    """`after(reduce(before(x)))`. Bool is reduced as bytes."""

    def convert(node: Node) -> list[Value]:
        axes, keepdims = reduced_axes(node), bool(node.attrs.get("keepdims", 1))
        x = node.tensor(0) if before is None else before(node.tensor(0))
        if not axes:
            return [node.inputs[0] if before is None and after is None else x if after is None else after(x if before is None else node.emit("each", x))]
        if before is not None or after is not None:
            found = reduce(x if before is None else node.emit("each", x), axes, keepdims)
            return [found if after is None else after(node.emit("reduced", found))]
        if node.dtype() != "bool":
            return [reduce(x, axes, keepdims)]
        found = reduce(node.emit("bytes", relax.op.astype(x, "uint8")), axes, keepdims)
        return [relax.op.astype(node.emit("reduced", found), "bool")]

    return convert


def log_sum_exp(node: Node) -> list[Value]:
    """With the largest element taken out, so that nothing overflows; unless that is infinite."""
    axes, keepdims = reduced_axes(node), bool(node.attrs.get("keepdims", 1))
    if not axes:
        return [node.inputs[0]]
    x, zero = node.tensor(0), const(np.float32(0))
    most = node.emit("most", relax.op.max(x, axes, True))
    finite = node.emit("finite", relax.op.less(node.emit("size", relax.op.abs(most)), const(np.float32(np.inf))))
    shift = node.emit("shift", relax.op.where(finite, most, zero))
    powers = node.emit("powers", relax.op.exp(node.emit("shifted", relax.op.subtract(x, shift))))
    logarithm = node.emit("logarithm", relax.op.log(node.emit("total", relax.op.sum(powers, axes, keepdims))))
    if not keepdims:
        shift = node.emit("flat", relax.op.reshape(shift, [d for i, d in enumerate(node.shape()) if i not in axes]))
    return [relax.op.add(logarithm, shift)]
