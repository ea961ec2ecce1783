"""ONNX operators that order elements or address them by index: running sums, sorting, scattering, one-hot vectors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import helper
from tvm import relax

from qcompiler.importers.nodes import Beyond, Node, Refused, Value, real
from qcompiler.passes.graph import const, dtype_of, make_op, shape_of

_REDUCTIONS = ("none", "add", "mul", "max", "min")


def cumulative(reduction: str) -> Callable[[Node], list[Value]]:
    """CumSum ("add") and CumProd ("mul")."""

    def convert(node: Node) -> list[Value]:
        x, shape = node.tensor(0), node.shape()
        attrs = {
            "axis": node.axis((node.param("axis", 1) or [0])[0], len(shape)),
            "reduction": reduction,
            "exclusive": bool(node.attrs.get("exclusive", 0)),
            "reverse": bool(node.attrs.get("reverse", 0)),
        }
        return [make_op("qc.cumulative", [x], attrs, shape, node.dtype())]

    return convert


def top_k(node: Node) -> list[Value]:
    """Where the k best are, then the elements there."""
    shape = list(node.shape())
    axis, k = node.axis(int(node.attrs.get("axis", -1)), len(shape)), (node.param("k", 1) or [0])[0]
    if not 0 <= k <= shape[axis]:
        raise Refused(f"k is {k} for an axis of {shape[axis]}")
    x = node.tensor(0)
    shape[axis] = k
    if k == 0:
        return [np.zeros(shape, node.dtype()), np.zeros(shape, np.int64)]
    keys = node.emit("wide", relax.op.astype(x, "int32")) if node.dtype() in ("int8", "uint8", "bool") else x
    attrs = {"axis": axis, "k": k, "largest": bool(node.attrs.get("largest", 1))}
    places = node.emit("places", make_op("qc.top_k", [keys], attrs, shape, "int64"))
    return [relax.op.gather_elements(x, places, axis), places]


def arg_extreme(largest: bool) -> Callable[[Node], list[Value]]:
    """ArgMax and ArgMin: the first (or last) of the best elements, whatever they are; TVM's own finds nothing among infinities."""

    def convert(node: Node) -> list[Value]:
        shape = list(node.shape())
        axis, length = node.axis(int(node.attrs.get("axis", 0)), len(shape)), shape[node.axis(int(node.attrs.get("axis", 0)), len(shape))]
        x = node.tensor(0)
        if node.dtype() in ("int8", "uint8", "bool"):
            x = node.emit("wide", relax.op.astype(x, "int32"))
        last = bool(node.attrs.get("select_last_index", 0))
        if last:
            x = node.emit("flip", relax.op.flip(x, axis))
        shape[axis] = 1
        place = make_op("qc.top_k", [x], {"axis": axis, "k": 1, "largest": largest}, shape, "int64")
        if last:
            place = relax.op.subtract(const(np.int64(length - 1)), node.emit("place", place))
        if node.attrs.get("keepdims", 1):
            return [place]
        return [relax.op.reshape(node.emit("kept", place), [d for i, d in enumerate(shape) if i != axis])]

    return convert


def gather_elements(node: Node) -> list[Value]:
    """Indices beyond the data read its border, not foreign memory."""
    shape = node.shape()
    axis = node.axis(int(node.attrs.get("axis", 0)), len(shape))
    return [relax.op.gather_elements(node.tensor(0), _inside(node, _wrapped(node, 1, shape[axis]), shape[axis]), axis)]


def gather_nd(node: Node) -> list[Value]:
    """The last axis of the indices addresses axes of the data behind the batch axes; what lies behind those is a row."""
    shape, form, batch = node.shape(), node.shape(1), int(node.attrs.get("batch_dims", 0))
    if shape[:batch] != form[:batch]:
        raise Refused(f"its batch axes are {list(shape[:batch])} in the data and {list(form[:batch])} in the indices")
    depth = batch + form[-1]
    strides = np.asarray(_strides(shape[:depth]), np.int64)
    parts = _combined(node, "parts", relax.op.multiply, _wrapped(node, 1, np.asarray(shape[batch:depth], np.int64)), strides[batch:])
    places = np.asarray(parts.sum(-1)) if isinstance(parts, np.ndarray) else node.emit("row", relax.op.sum(parts, [-1]))
    if batch:
        places = _combined(node, "places", relax.op.add, places, _positions(form[:-1], [*strides[:batch], *[0] * (len(form) - 1 - batch)]))
    rows = math.prod(shape[:depth])
    data = node.variable("rows", node.reshape(node.inputs[0], (rows, *shape[depth:])))
    return [relax.op.take(data, _inside(node, places, rows), 0, mode="clip")]


def _inside(node: Node, places: Value, size: int) -> Any:
    if isinstance(places, np.ndarray):
        return const(np.clip(places, 0, size - 1))
    return node.emit("inside", relax.op.clip(places, 0, size - 1))


def _wrapped(node: Node, index: int, size: Any) -> Value:
    """Operand `index`, int64, with negative indices counted from the end; `size`: what they count in, an integer or an array that broadcasts. Raises Refused
    for constants beyond it."""
    indices = node.inputs[index]
    if isinstance(indices, np.ndarray):
        if (wrong := (indices < -np.asarray(size)) | (indices >= size)).any():
            raise Refused(f"index {indices[wrong][0]} is out of range for an axis of {np.broadcast_to(size, indices.shape)[wrong][0]}")
        return np.where(indices < 0, indices.astype(np.int64) + size, indices)
    wide = indices if dtype_of(indices) == "int64" else node.emit("wide", relax.op.astype(indices, "int64"))
    behind = node.emit("behind", relax.op.add(wide, const(np.asarray(size, np.int64))))
    return node.emit("index", relax.op.where(node.emit("negative", relax.op.less(wide, const(np.int64(0)))), behind, wide))


def _combined(node: Node, what: str, combine: Callable[..., Any], left: Value, right: np.ndarray) -> Value:
    """`combine` of a value and a constant: folded where both are constants."""
    if isinstance(left, np.ndarray):
        return {"add": np.add, "multiply": np.multiply}[combine.__name__](left, right)
    return node.emit(what, combine(left, const(right)))


def _scatter(node: Node, data: Value, rows: int, width: int, places: Value, updates: Value, reduction: str, shape: Sequence[int]) -> Value:
    """`data` as [rows, width], updated at rows `places` (int64, flat), in the shape given."""
    operands = []
    for value, form in ((data, (rows, width)), (places, (-1,)), (updates, (-1, width))):
        size = math.prod(value.shape if isinstance(value, np.ndarray) else shape_of(value))
        flat = node.reshape(value, [size // math.prod(d for d in form if d > 0) if d < 0 else d for d in form])
        operands.append(const(real(flat)) if isinstance(flat, np.ndarray) else flat if isinstance(flat, relax.Var) else node.emit("flat", flat))
    dtype = dtype_of(operands[0])
    return node.reshape(node.emit("scattered", make_op("qc.scatter", operands, {"reduction": reduction}, (rows, width), dtype)), shape)


def _reduction(node: Node) -> str:
    found = node.text("reduction", "none")
    if found not in _REDUCTIONS:
        raise Refused(f"reduction '{found}' is unknown; supported: {', '.join(_REDUCTIONS)}")
    return found


def _strides(shape: Sequence[int]) -> list[int]:
    """Elements between neighbours along each axis of a row-major tensor."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _positions(shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """int64 of `shape`: the sum over axes of index times stride."""
    total = np.zeros(shape, np.int64)
    for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        total += (np.arange(size, dtype=np.int64) * stride).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return total


def scatter_elements(node: Node) -> list[Value]:
    """Every update at its own position but for the coordinate along the axis, which its index states."""
    shape, form = node.shape(0), node.shape(1)
    axis = node.axis(int(node.attrs.get("axis", 0)), len(shape))
    strides = _strides(shape)
    along = _combined(node, "along", relax.op.multiply, _wrapped(node, 1, shape[axis]), np.asarray(strides[axis], np.int64))
    rest = _positions(form, [0 if i == axis else s for i, s in enumerate(strides)])
    places = _combined(node, "places", relax.op.add, along, rest)
    return [_scatter(node, node.inputs[0], math.prod(shape), 1, places, node.inputs[2], _reduction(node), shape)]


def scatter_nd(node: Node) -> list[Value]:
    """The last axis of the indices addresses the leading axes of the data; what lies behind those is a row."""
    shape, form = node.shape(0), node.shape(1)
    depth = form[-1]
    rows, width = math.prod(shape[:depth]), math.prod(shape[depth:])
    parts = _combined(node, "parts", relax.op.multiply, _wrapped(node, 1, np.asarray(shape[:depth], np.int64)), np.asarray(_strides(shape[:depth]), np.int64))
    places = np.asarray(parts.sum(-1)) if isinstance(parts, np.ndarray) else node.emit("places", relax.op.sum(parts, [-1]))
    return [_scatter(node, node.inputs[0], rows, width, places, node.inputs[2], _reduction(node), shape)]


def tensor_scatter(node: Node) -> list[Value]:
    """A cache with new entries from `write_indices[batch]` on along an axis; mode "circular" goes on at the beginning."""
    shape, form = node.shape(0), node.shape(1)
    axis = node.axis(int(node.attrs.get("axis", -2)), len(shape))
    outer, length, width = math.prod(shape[1:axis]), shape[axis], math.prod(shape[axis + 1 :])
    steps = np.arange(form[axis], dtype=np.int64)
    start = node.inputs[2] if node.has(2) else np.zeros(shape[0], np.int64)
    start = start if isinstance(start, np.ndarray) else node.emit("start", relax.op.reshape(start, (shape[0], 1, 1)))
    place = _combined(node, "along", relax.op.add, start.reshape(-1, 1, 1) if isinstance(start, np.ndarray) else start, steps)
    if node.text("mode", "linear") == "circular":
        place = place % length if isinstance(place, np.ndarray) else node.emit("turned", relax.op.floor_mod(place, const(np.int64(length))))
    line = _positions((shape[0], outer, 1), (outer * length, length, 0))
    places = _combined(node, "places", relax.op.add, place, line)
    return [_scatter(node, node.inputs[0], shape[0] * outer * length, width, places, node.inputs[1], "none", shape)]


def max_unpool(node: Node) -> list[Value]:
    """Zeros, with the elements at the flat positions that the indices state, in the size that pooling implies; a larger output_shape adds zeros behind."""
    shape = node.shape()
    rank = len(shape) - 2
    kernel = [int(k) for k in node.attrs["kernel_shape"]]
    strides, pads = [int(s) for s in node.attrs.get("strides", [1] * rank)], [int(p) for p in node.attrs.get("pads", [0] * 2 * rank)]
    size = [*shape[:2], *[(n - 1) * strides[i] + kernel[i] - pads[i] - pads[rank + i] for i, n in enumerate(shape[2:])]]
    wanted, count = node.param("output_shape", 2) or size, math.prod(size)
    if len(wanted) != len(size) or any(w < s for w, s in zip(wanted, size, strict=True)):
        raise Refused(f"output_shape {wanted} is smaller than the {size} that its windows cover")
    result = _scatter(node, np.zeros(size, node.dtype()), count, 1, _wrapped(node, 1, count), node.inputs[0], "none", size)
    if wanted == size:
        return [result]
    return [relax.op.nn.pad(node.emit("unpooled", result), [n for w, s in zip(wanted, size, strict=True) for n in (0, w - s)])]


def col2im(node: Node) -> list[Value]:
    """Columns added up where their windows lie; what falls into the padding is left out."""
    image, block = node.param("image_shape", 1) or [], node.param("block_shape", 2) or []
    rank, (batch, rows, columns) = len(image), node.shape()
    dilations, strides = ([int(v) for v in node.attrs.get(name, [1] * rank)] for name in ("dilations", "strides"))
    pads = [int(v) for v in node.attrs.get("pads", [0] * 2 * rank)]
    windows = [(n + pads[i] + pads[rank + i] - dilations[i] * (block[i] - 1) - 1) // strides[i] + 1 for i, n in enumerate(image)]
    channels = rows // math.prod(block)
    if math.prod(windows) != columns or channels * math.prod(block) != rows:
        raise Refused(f"columns of shape {list(node.shape())} don't fit an image of {image} in blocks of {block}")
    place, inside = np.zeros((math.prod(block), columns), np.int64), np.ones((math.prod(block), columns), np.bool_)
    for axis, stride in enumerate(_strides(image)):
        tap = np.asarray([t[axis] for t in itertools.product(*map(range, block))])[:, None] * dilations[axis]
        first = np.asarray([w[axis] for w in itertools.product(*map(range, windows))])[None, :] * strides[axis] - pads[axis]
        place += (tap + first) * stride
        inside &= (tap + first >= 0) & (tap + first < image[axis])
    plane = _positions((batch * channels, 1, 1), (math.prod(image), 0, 0))
    places = np.where(inside, place + plane, -1)
    shape = [batch, channels, *image]
    return [_scatter(node, np.zeros(shape, node.dtype()), math.prod(shape), 1, places, node.inputs[0], "add", shape)]


def one_hot(node: Node) -> list[Value]:
    """`on` where a counter along the new axis equals the index, `off` elsewhere."""
    depth, form = (node.param("depth", 1) or [0])[0], list(node.shape())
    axis = node.axis(int(node.attrs.get("axis", -1)), len(form) + 1)
    indices = node.inputs[0]
    if isinstance(indices, np.ndarray):
        indices = const(indices.astype(np.int64))
    elif node.dtype() != "int64":
        indices = node.emit("wide", relax.op.astype(indices, "int64"))
    wrapped = node.emit("wrapped", relax.op.where(
        node.emit("negative", relax.op.less(indices, const(np.int64(0)))), node.emit("behind", relax.op.add(indices, const(np.int64(depth)))), indices
    ))  # fmt: skip
    counter = np.arange(depth, dtype=np.int64).reshape([-1 if i == axis else 1 for i in range(len(form) + 1)])
    equal = node.emit("equal", relax.op.equal(node.emit("column", relax.op.expand_dims(wrapped, axis)), const(counter)))
    values = node.inputs[2]
    if isinstance(values, np.ndarray):
        off, on = (const(real(v)) for v in values)
    else:
        parts = [node.emit(what, relax.op.strided_slice(values, [0], [i], [i + 1])) for i, what in enumerate(("off", "on"))]
        off, on = (node.emit("value", relax.op.reshape(part, ())) for part in parts)
    return [relax.op.where(equal, on, off)]


def reverse_sequence(node: Node) -> list[Value]:
    """Along the time axis, the first `length[batch]` elements backwards."""
    shape = node.shape()
    batch, time = node.axis(int(node.attrs.get("batch_axis", 1)), len(shape)), node.axis(int(node.attrs.get("time_axis", 0)), len(shape))
    lengths = node.inputs[1]
    form = [shape[i] if i == batch else 1 for i in range(len(shape))]
    length = const(lengths.astype(np.int64).reshape(form)) if isinstance(lengths, np.ndarray) else node.emit("length", relax.op.reshape(lengths, form))
    steps = const(np.arange(shape[time], dtype=np.int64).reshape([-1 if i == time else 1 for i in range(len(shape))]))
    last = node.emit("last", relax.op.subtract(length, const(np.int64(1))))
    backwards = node.emit("backwards", relax.op.subtract(last, steps))
    place = node.emit("place", relax.op.where(node.emit("inside", relax.op.less(steps, length)), backwards, steps))
    return [relax.op.gather_elements(node.tensor(0), node.emit("places", relax.op.broadcast_to(place, shape)), time)]


def compress(node: Node) -> list[Value]:
    """The elements, or slices along an axis, where a condition known when compiling holds."""
    condition = node.inputs[1]
    if not isinstance(condition, np.ndarray):
        raise Beyond("how many elements it keeps depends on data: its condition is computed at run time; supported: a constant condition")
    x, places = node.tensor(0), np.flatnonzero(condition)
    if "axis" not in node.attrs:
        flat = node.emit("flat", relax.op.reshape(x, (math.prod(node.shape()),)))
        return [relax.op.take(flat, const(places), 0, mode="clip")]
    return [relax.op.take(x, const(places), node.axis(int(node.attrs["axis"]), len(node.shape())), mode="clip")]


def eye_like(node: Node) -> list[Value]:
    """A constant: only the shape of the operand counts."""
    dtype = helper.tensor_dtype_to_np_dtype(int(node.attrs["dtype"])) if "dtype" in node.attrs else np.dtype(node.dtype())
    rows, columns = node.shape()
    return [real(np.eye(rows, columns, int(node.attrs.get("k", 0)), dtype=np.float32 if dtype.kind == "f" else dtype))]
