"""TFLite operators -> ONNX nodes. What an operator means is said by LiteRT's reference kernels (tensorflow/lite/kernels/internal/reference/).

A converter gets the graph that is being written and the operator; operands are float forms, and a result that holds quantized numbers is rounded when it
is bound. Operators without a row here are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto

from qcompiler.importers.nodes import Refused
from qcompiler.importers.tflite_complex import SPECTRA
from qcompiler.importers.tflite_file import Operator
from qcompiler.importers.tflite_graph import Graph
from qcompiler.importers.tflite_recurrent import RECURRENT
from qcompiler.importers.tflite_state import KEPT
from qcompiler.importers.tflite_windows import CUSTOM, WINDOWS

Convert = Callable[[Graph, Operator], None]
_LAST = np.iinfo(np.int64).max


def _element(dtype: str) -> int:
    return int(TensorProto.DataType.Value({"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper())))


def axis_of(axis: int, rank: int) -> int:
    if not -rank <= axis < max(rank, 1):
        raise Refused(f"axis {axis} is out of range for a tensor of {rank} axes")
    return axis % max(rank, 1)


# -- elementwise --------------------------------------------------------------------------------------------------------------------------------


def plain(kind: str, operands: int = 1, **attributes: Any) -> Convert:
    """The same operator in ONNX."""
    return lambda g, op: g.chain(op, kind, [g.value(op, i) for i in range(operands)], **attributes)


def clip(name: str) -> Convert:
    return lambda g, op: g.result(op, g.activated(g.value(op), name))


def rsqrt(g: Graph, op: Operator) -> None:
    g.chain(op, "Reciprocal", g.node("Sqrt", [g.value(op)]))


def square(g: Graph, op: Operator) -> None:
    g.chain(op, "Mul", [g.value(op)] * 2)


def squared_difference(g: Graph, op: Operator) -> None:
    g.chain(op, "Mul", g.node("Sub", [g.value(op, 0), g.value(op, 1)]) * 2)


def floor_div(g: Graph, op: Operator) -> None:
    """Of integers ONNX's quotient, which is cut, not rounded down: one less where the signs differ and something is left."""
    x, y = g.value(op, 0), g.value(op, 1)
    dtype = g.operand(op, 0).dtype
    if dtype.startswith("float"):
        return g.chain(op, "Floor", g.node("Div", [x, y]))
    none = g.constant(np.array(0, dtype), "none")
    left = g.node("Not", g.node("Equal", [*g.node("Mod", [x, y]), none]))
    differ = g.node("Xor", [*g.node("Less", [x, none]), *g.node("Less", [y, none])])
    less = g.node("Cast", g.node("And", [*left, *differ]), to=_element(dtype))
    return g.chain(op, "Sub", [*g.node("Div", [x, y]), *less])


def floor_mod(g: Graph, op: Operator) -> None:
    """Of integers ONNX's Mod; of floats x - floor(x / y) * y, whose sign is y's too."""
    x, y = g.value(op, 0), g.value(op, 1)
    if not g.operand(op, 0).dtype.startswith("float"):
        return g.chain(op, "Mod", [x, y])
    whole = g.node("Floor", g.node("Div", [x, y]))[0]
    return g.chain(op, "Sub", [x, g.node("Mul", [whole, y])[0]])


def not_equal(g: Graph, op: Operator) -> None:
    g.chain(op, "Not", g.node("Equal", [g.value(op, 0), g.value(op, 1)]))


def leaky_relu(g: Graph, op: Operator) -> None:
    g.chain(op, "LeakyRelu", [g.value(op)], alpha=op.option("Alpha", 0.0))


def gelu(g: Graph, op: Operator) -> None:
    g.chain(op, "Gelu", [g.value(op)], approximate="tanh" if op.option("Approximate", False) else "none")


def softmax(g: Graph, op: Operator) -> None:
    beta, x = op.option("Beta", 1.0), g.value(op)
    if beta != 1.0:
        x = g.node("Mul", [x, g.constant(np.array(beta, np.float32), "beta")])[0]
    g.chain(op, "Softmax", [x], axis=-1)


def l2_normalization(g: Graph, op: Operator) -> None:
    """x / max(sqrt(sum x^2), 1e-6) along the last axis (reference/l2normalization.h)."""
    x = g.value(op)
    length = g.node("ReduceL2", [x, g.int64([-1])], keepdims=1)
    g.chain(op, "Div", [x, g.node("Max", [*length, g.constant(np.array(1e-6, np.float32), "least")])[0]])


def select(g: Graph, op: Operator) -> None:
    """SELECT has a condition of the operands' shape, or one per row."""
    if op.op == "SELECT" and g.rank(op, 0) not in (0, g.rank(op, 1)):
        raise Refused("its condition chooses whole rows; supported: a condition of its operands' shape")
    g.chain(op, "Where", [g.value(op, i) for i in range(3)])


def cast(g: Graph, op: Operator) -> None:
    g.chain(op, "Cast", [g.value(op)], to=_element(g.tensors[op.outputs[0]].dtype))


def dequantize(g: Graph, op: Operator) -> None:
    """Of quantized numbers, or of float16."""
    x = g.value(op)
    g.bind(op.outputs[0], x if g.operand(op, 0).quantized else g.node("Cast", [x], to=TensorProto.FLOAT)[0])


def same(g: Graph, op: Operator) -> None:
    """QUANTIZE, whose result is rounded like any other; DENSIFY, whose operand is whole here."""
    g.bind(op.outputs[0], g.value(op))


def kept(g: Graph, op: Operator) -> None:
    """The next value of a state, which has the scale and zero point of its operand."""
    if g.tensors[op.outputs[0]].quantized:
        g.reals[op.outputs[0]] = g.value(op)
        g.quantized(g.value(op), g.tensors[op.outputs[0]], g.tensors[op.outputs[0]].name)
    else:
        g.chain(op, "Identity", [g.value(op)])


# -- reductions -----------------------------------------------------------------------------------------------------------------------------------


def reduction(kind: str) -> Convert:
    def convert(g: Graph, op: Operator) -> None:
        axes = [axis_of(a, g.rank(op)) for a in g.ints(op, 1, "axes")]
        g.chain(op, kind, [g.value(op), g.int64(axes)], keepdims=int(op.option("KeepDims", False)), noop_with_empty_axes=1)

    return convert


def logical_reduction(kind: str) -> Convert:
    def convert(g: Graph, op: Operator) -> None:
        axes = [axis_of(a, g.rank(op)) for a in g.ints(op, 1, "axes")]
        numbers = g.node("Cast", [g.value(op)], to=TensorProto.INT32)
        found = g.node(kind, [*numbers, g.int64(axes)], keepdims=int(op.option("KeepDims", False)), noop_with_empty_axes=1)
        g.chain(op, "Cast", found, to=TensorProto.BOOL)

    return convert


def extremum(kind: str) -> Convert:
    def convert(g: Graph, op: Operator) -> None:
        (axis,) = g.ints(op, 1, "axis")
        found = g.node(kind, [g.value(op)], axis=axis_of(axis, g.rank(op)), keepdims=0)
        g.chain(op, "Cast", found, to=_element(g.tensors[op.outputs[0]].dtype))

    return convert


def cumsum(g: Graph, op: Operator) -> None:
    axis = g.constant(np.array(g.ints(op, 1, "axis")[0], np.int64), "axis")
    g.chain(op, "CumSum", [g.value(op), axis], exclusive=int(op.option("Exclusive", False)), reverse=int(op.option("Reverse", False)))


def topk(g: Graph, op: Operator) -> None:
    values, indices = g.node("TopK", [g.value(op), g.int64(g.ints(op, 1, "number"))], outputs=2, axis=-1)
    narrow = g.node("Cast", [indices], to=TensorProto.INT32)[0]
    for tensor, value in zip(op.outputs, (values, narrow), strict=True):
        g.bind(tensor, value)


# -- movement -----------------------------------------------------------------------------------------------------------------------------------


def reshape(g: Graph, op: Operator) -> None:
    shape = g.shape_of(op, 1) if g.has(op, 1) else g.int64(op.option("NewShape", []))
    g.chain(op, "Reshape", [g.value(op), shape])


def squeeze(g: Graph, op: Operator) -> None:
    axes = [axis_of(a, g.rank(op)) for a in op.option("SqueezeDims", [])]
    g.chain(op, "Squeeze", [g.value(op), *([g.int64(axes)] if axes else [])])


def expand_dims(g: Graph, op: Operator) -> None:
    g.chain(op, "Unsqueeze", [g.value(op), g.int64(g.ints(op, 1, "axis"))])


def transpose(g: Graph, op: Operator) -> None:
    perm = g.ints(op, 1, "permutation")
    if sorted(perm) != list(range(g.rank(op))):
        raise Refused(f"its permutation is {perm}, of a tensor of {g.rank(op)} axes")
    g.chain(op, "Transpose", [g.value(op)], perm=perm)


def concatenation(g: Graph, op: Operator) -> None:
    g.chain(op, "Concat", [g.value(op, i) for i in range(len(op.inputs))], axis=axis_of(op.option("Axis"), g.rank(op)))


def pack(g: Graph, op: Operator) -> None:
    axis = axis_of(op.option("Axis"), g.rank(op) + 1)
    parts = [g.node("Unsqueeze", [g.value(op, i), g.int64([axis])])[0] for i in range(len(op.inputs))]
    g.chain(op, "Concat", parts, axis=axis)


def unpack(g: Graph, op: Operator) -> None:
    axis = axis_of(op.option("Axis"), g.rank(op))
    parts = g.node("Split", [g.value(op)], outputs=len(op.outputs), axis=axis, num_outputs=len(op.outputs))
    for tensor, part in zip(op.outputs, parts, strict=True):
        g.bind(tensor, g.node("Squeeze", [part, g.int64([axis])])[0])


def split(g: Graph, op: Operator) -> None:
    """SPLIT has its axis before what it splits; SPLIT_V has sizes, of which one may be -1, and the axis behind."""
    if op.op == "SPLIT":
        (axis,), place, sizes = g.ints(op, 0, "axis"), 1, None
    else:
        (axis,), place, sizes = g.ints(op, 2, "axis"), 0, g.ints(op, 1, "sizes")
    axis = axis_of(axis, g.rank(op, place))
    if sizes is not None and -1 in sizes:
        sizes[sizes.index(-1)] = g.operand(op, place).shape[axis] - sum(s for s in sizes if s > 0)
    whole = [g.value(op, place), *([] if sizes is None else [g.int64(sizes)])]
    number: dict[str, Any] = {"num_outputs": len(op.outputs)} if sizes is None else {}
    parts = g.node("Split", whole, outputs=len(op.outputs), axis=axis, **number)
    for tensor, part in zip(op.outputs, parts, strict=True):
        g.bind(tensor, part)


def slice_(g: Graph, op: Operator) -> None:
    """A size of -1 is all of the rest."""
    begin, size = g.ints(op, 1, "begin"), g.ints(op, 2, "size")
    end = [_LAST if s == -1 else b + s for b, s in zip(begin, size, strict=True)]
    g.chain(op, "Slice", [g.value(op), g.int64(begin), g.int64(end)])


def strided_slice(g: Graph, op: Operator) -> None:
    """Bit k of a mask is about axis k: no begin, no end, one element of which the axis goes."""
    steps = g.ints(op, 3, "strides")
    for name, what in (("EllipsisMask", "an ellipsis"), ("NewAxisMask", "new axes"), ("Offset", "ends counted from the begin")):
        if op.option(name, 0):
            raise Refused(f"it has {what}; supported: begin, end, strides, and axes that go")
    gone = [k for k in range(len(steps)) if op.option("ShrinkAxisMask") >> k & 1]
    begins, ends = (
        {k: _LAST if (step > 0) == last else first for k, step in enumerate(steps) if op.option(mask) >> k & 1}
        for mask, last, first in (("BeginMask", False, 0), ("EndMask", True, -_LAST))
    )
    for k in gone:
        steps[k], begins[k] = 1, g.ints(op, 1, "begin")[k]
        ends[k] = begins[k] + 1 or _LAST
    if 0 in steps:
        raise Refused("a stride is 0")
    part = g.node("Slice", [g.value(op), _bounds(g, op, 1, begins), _bounds(g, op, 2, ends), g.int64(list(range(len(steps)))), g.int64(steps)])[0]
    g.result(op, g.node("Squeeze", [part, g.int64(gone)])[0] if gone else part)


def _bounds(g: Graph, op: Operator, place: int, fixed: dict[int, int]) -> str:
    """An operand of integers, constant or computed, with the numbers `fixed` in their places."""
    if g.operand(op, place).data is not None:
        return g.int64([fixed.get(k, v) for k, v in enumerate(g.ints(op, place, "bounds"))])
    axes = range(len(g.ints(op, 3, "strides")))
    if not fixed:
        return g.cast(op, place)
    known = g.constant(np.array([k in fixed for k in axes]), "known")
    return g.node("Where", [known, g.int64([fixed.get(k, 0) for k in axes]), g.cast(op, place)])[0]


def pads_of(g: Graph, op: Operator) -> str:
    """[axes, 2] -> all begins, then all ends."""
    amounts = np.reshape(g.ints(op, 1, "paddings"), (-1, 2))
    if (amounts < 0).any() or len(amounts) != g.rank(op):
        raise Refused(f"its paddings are {amounts.tolist()}, of a tensor of {g.rank(op)} axes")
    return g.int64([int(v) for v in amounts.T.reshape(-1)])


def pad(g: Graph, op: Operator) -> None:
    g.chain(op, "Pad", [g.value(op), pads_of(g, op), *([g.value(op, 2)] if g.has(op, 2) else [])])


def mirror_pad(g: Graph, op: Operator) -> None:
    """REFLECT leaves the border out; SYMMETRIC repeats it, which for one element is its edge."""
    if op.option("Mode") == 0:
        return g.chain(op, "Pad", [g.value(op), pads_of(g, op)], mode="reflect")
    if max(g.ints(op, 1, "paddings"), default=0) > 1:
        raise Refused("it repeats more than one element behind the border (SYMMETRIC); supported: one, and REFLECT")
    return g.chain(op, "Pad", [g.value(op), pads_of(g, op)], mode="edge")


def batch_and_space(g: Graph, op: Operator) -> None:
    """Blocks of an image [N, H, W, C] (or [N, H, C]) as so many images, and back: reference/space_to_batch_nd.h."""
    block, ends = g.ints(op, 1, "block"), np.reshape(g.ints(op, 2, "paddings or crops"), (-1, 2))
    axes = len(block)
    shape = list(g.operand(op, 0).shape)
    if len(ends) != axes or not 1 <= axes < len(shape) or min(block, default=0) < 1 or (ends < 0).any() or -1 in shape:
        raise Refused(f"its block {block} and ends {ends.tolist()} don't fit a tensor of shape {shape}")
    count, rest = int(np.prod(block)), shape[axes + 1 :]
    if op.op == "SPACE_TO_BATCH_ND":
        zeros = [0] * len(rest)
        padded = g.node("Pad", [g.value(op), g.int64([0, *ends[:, 0].tolist(), *zeros, 0, *ends[:, 1].tolist(), *zeros])])[0]
        sizes = [s + int(e.sum()) for s, e in zip(shape[1:], ends, strict=False)]
        apart = [shape[0], *(n for s, b in zip(sizes, block, strict=True) for n in (s // b, b)), *rest]
        perm = [*range(2, 2 * axes + 1, 2), 0, *range(1, 2 * axes, 2), *range(2 * axes + 1, len(apart))]
        moved = g.node("Transpose", g.node("Reshape", [padded, g.int64(apart)]), perm=perm)[0]
        return g.chain(op, "Reshape", [moved, g.int64([shape[0] * count, *(s // b for s, b in zip(sizes, block, strict=True)), *rest])])
    apart = [*block, shape[0] // count, *shape[1 : axes + 1], *rest]
    perm = [axes, *(p for k in range(axes) for p in (axes + 1 + k, k)), *range(2 * axes + 1, len(apart))]
    moved = g.node("Transpose", g.node("Reshape", [g.value(op), g.int64(apart)]), perm=perm)[0]
    sizes = [s * b for s, b in zip(shape[1:], block, strict=False)]
    whole = g.node("Reshape", [moved, g.int64([shape[0] // count, *sizes, *rest])])[0]
    last = [s - int(e) for s, e in zip(sizes, ends[:, 1], strict=True)]
    return g.chain(op, "Slice", [whole, *map(g.int64, (ends[:, 0].tolist(), last, list(range(1, axes + 1))))])


def gather(g: Graph, op: Operator) -> None:
    if op.option("BatchDims", 0):
        raise Refused(f"it has {op.option('BatchDims')} batch axes; supported: none")
    g.chain(op, "Gather", [g.value(op, 0), g.value(op, 1)], axis=axis_of(op.option("Axis", 0), g.rank(op)))


def gather_nd(g: Graph, op: Operator) -> None:
    g.chain(op, "GatherND", [g.value(op, 0), g.cast(op, 1)])


def embedding_lookup(g: Graph, op: Operator) -> None:
    g.chain(op, "Gather", [g.value(op, 1), g.value(op, 0)], axis=0)


def tile(g: Graph, op: Operator) -> None:
    g.chain(op, "Tile", [g.value(op), g.shape_of(op, 1)])


def broadcast_to(g: Graph, op: Operator) -> None:
    g.chain(op, "Expand", [g.value(op), g.shape_of(op, 1)])


def reverse(g: Graph, op: Operator) -> None:
    axes = g.ints(op, 1, "axes")
    starts, ends, steps = ([v] * len(axes) for v in (-1, -_LAST, -1))
    g.chain(op, "Slice", [g.value(op), g.int64(starts), g.int64(ends), g.int64(axes), g.int64(steps)])


def shape(g: Graph, op: Operator) -> None:
    g.chain(op, "Cast", g.node("Shape", [g.value(op)]), to=_element(g.tensors[op.outputs[0]].dtype))


def zeros_like(g: Graph, op: Operator) -> None:
    zero = g.constant(np.zeros((), g.tensors[op.outputs[0]].dtype), "zero")
    g.chain(op, "Expand", [zero, *g.node("Shape", [g.value(op)])])


def fill(g: Graph, op: Operator) -> None:
    g.chain(op, "Expand", [g.value(op, 1), g.shape_of(op, 0)])


def one_hot(g: Graph, op: Operator) -> None:
    """Operands: indices, depth, the value there, the value elsewhere."""
    values = [g.node("Reshape", [g.value(op, i), g.int64([1])])[0] for i in (3, 2)]
    g.chain(op, "OneHot", [g.value(op), g.int64(g.ints(op, 1, "depth")), *g.node("Concat", values, axis=0)], axis=op.option("Axis", -1))


def converter(op: Operator) -> Convert | None:
    """How an operator is written as ONNX nodes; None where that is not known."""
    return CUSTOM.get(op.custom) if op.op == "CUSTOM" else OPERATORS.get(op.op)


OPERATORS: dict[str, Convert] = WINDOWS | RECURRENT | SPECTRA | {
    "ADD": plain("Add", 2), "SUB": plain("Sub", 2), "MUL": plain("Mul", 2), "DIV": plain("Div", 2), "MAXIMUM": plain("Max", 2), "MINIMUM": plain("Min", 2),
    "POW": plain("Pow", 2), "EQUAL": plain("Equal", 2), "GREATER": plain("Greater", 2), "GREATER_EQUAL": plain("GreaterOrEqual", 2), "LESS": plain("Less", 2),
    "LESS_EQUAL": plain("LessOrEqual", 2), "NOT_EQUAL": not_equal, "LOGICAL_AND": plain("And", 2), "LOGICAL_OR": plain("Or", 2),
    "LOGICAL_NOT": plain("Not"), "ABS": plain("Abs"), "NEG": plain("Neg"), "EXP": plain("Exp"), "LOG": plain("Log"), "SQRT": plain("Sqrt"), "RSQRT": rsqrt,
    "SQUARE": square, "SQUARED_DIFFERENCE": squared_difference, "FLOOR_DIV": floor_div, "FLOOR_MOD": floor_mod, "SIN": plain("Sin"), "COS": plain("Cos"),
    "FLOOR": plain("Floor"), "CEIL": plain("Ceil"), "ROUND": plain("Round"), "SIGN": plain("Sign"), "TANH": plain("Tanh"), "LOGISTIC": plain("Sigmoid"),
    "ELU": plain("Elu"), "HARD_SWISH": plain("HardSwish"), "PRELU": plain("PRelu", 2), "LEAKY_RELU": leaky_relu, "GELU": gelu, "RELU": clip("RELU"),
    "RELU6": clip("RELU6"), "RELU_N1_TO_1": clip("RELU_N1_TO_1"), "RELU_0_TO_1": clip("RELU_0_TO_1"), "SOFTMAX": softmax,
    "LOG_SOFTMAX": plain("LogSoftmax", axis=-1), "L2_NORMALIZATION": l2_normalization, "SELECT": select, "SELECT_V2": select, "CAST": cast,
    "DEQUANTIZE": dequantize, "QUANTIZE": same, "DENSIFY": same, KEPT: kept, "SUM": reduction("ReduceSum"), "MEAN": reduction("ReduceMean"),
    "REDUCE_MAX": reduction("ReduceMax"), "REDUCE_MIN": reduction("ReduceMin"), "REDUCE_PROD": reduction("ReduceProd"),
    "REDUCE_ANY": logical_reduction("ReduceMax"), "REDUCE_ALL": logical_reduction("ReduceMin"), "ARG_MAX": extremum("ArgMax"), "ARG_MIN": extremum("ArgMin"),
    "CUMSUM": cumsum, "TOPK_V2": topk, "RESHAPE": reshape, "SQUEEZE": squeeze, "EXPAND_DIMS": expand_dims, "TRANSPOSE": transpose,
    "CONCATENATION": concatenation, "PACK": pack, "UNPACK": unpack, "SPLIT": split, "SPLIT_V": split, "SLICE": slice_, "STRIDED_SLICE": strided_slice,
    "PAD": pad, "PADV2": pad, "MIRROR_PAD": mirror_pad, "SPACE_TO_BATCH_ND": batch_and_space, "BATCH_TO_SPACE_ND": batch_and_space, "GATHER": gather,
    "GATHER_ND": gather_nd, "EMBEDDING_LOOKUP": embedding_lookup, "TILE": tile, "BROADCAST_TO": broadcast_to, "REVERSE_V2": reverse, "SHAPE": shape,
    "ZEROS_LIKE": zeros_like, "FILL": fill, "ONE_HOT": one_hot, "RANGE": plain("Range", 3),
}  # fmt: skip
