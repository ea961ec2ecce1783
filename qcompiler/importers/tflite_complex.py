"""Complex numbers in TFLite networks, which Fourier transforms make: a tensor complex64 [...] is float32 [..., 2] in ONNX, real and imaginary parts,
as its DFT has them. What an operator means is said by LiteRT's kernels (tensorflow/lite/kernels/rfft2d.cc, complex_support.cc)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcompiler.importers.nodes import Refused
from qcompiler.importers.tflite_file import Operator
from qcompiler.importers.tflite_graph import Graph

COMPLEX = "complex64"


def rfft2d(g: Graph, op: Operator) -> None:
    """The last two axes, cut or filled with zeros to the lengths given; of the last one the first half, as its numbers are real."""
    height, width = g.ints(op, 1, "length")
    if (rank := g.rank(op)) < 2:
        raise Refused(f"it transforms a tensor of {rank} axis; supported: from 2 on")
    x = g.node("Unsqueeze", [g.value(op), g.int64([-1])])[0]
    x = g.node("DFT", [x, *(g.constant(np.array(n, np.int64), "along") for n in (width, -2))], onesided=1)[0]
    if (height, g.operand(op, 0).shape[-2]) != (1, 1):
        x = g.node("DFT", [x, *(g.constant(np.array(n, np.int64), "along") for n in (height, -3))])[0]
    g.bind(op.outputs[0], x)


def part(index: int) -> Callable[[Graph, Operator], None]:
    return lambda g, op: g.chain(op, "Gather", [g.value(op), g.constant(np.array(index, np.int64), "part")], axis=-1)


def cast(g: Graph, op: Operator) -> None:
    """The real part alone is kept."""
    if g.tensors[op.outputs[0]].dtype != "float32":
        raise Refused(f"it makes {g.tensors[op.outputs[0]].dtype} of complex numbers; supported: float32")
    part(0)(g, op)


def magnitude(g: Graph, op: Operator) -> None:
    g.chain(op, "ReduceL2", [g.value(op), g.int64([-1])], keepdims=0)


def reshape(g: Graph, op: Operator) -> None:
    shape = g.shape_of(op, 1) if g.has(op, 1) else g.int64(op.option("NewShape", []))
    g.chain(op, "Reshape", [g.value(op), *g.node("Concat", [shape, g.int64([2])], axis=0)])


def squeeze(g: Graph, op: Operator) -> None:
    axes = [a % g.rank(op) for a in op.option("SqueezeDims", [])]
    g.chain(op, "Squeeze", [g.value(op), *([g.int64(axes)] if axes else [])])


def expand_dims(g: Graph, op: Operator) -> None:
    (axis,) = g.ints(op, 1, "axis")
    g.chain(op, "Unsqueeze", [g.value(op), g.int64([axis if axis >= 0 else axis - 1])])


def transpose(g: Graph, op: Operator) -> None:
    perm = g.ints(op, 1, "permutation")
    g.chain(op, "Transpose", [g.value(op)], perm=[*perm, len(perm)])


def of_real(g: Graph, op: Operator) -> None:
    raise Refused(f"it takes a part of '{g.operand(op, 0).name}', which holds no complex numbers")


SPECTRA = {"RFFT2D": rfft2d, **dict.fromkeys(("REAL", "IMAG", "COMPLEX_ABS"), of_real)}
ON_COMPLEX = {
    "REAL": part(0), "IMAG": part(1), "COMPLEX_ABS": magnitude, "CAST": cast, "RESHAPE": reshape, "SQUEEZE": squeeze, "EXPAND_DIMS": expand_dims,
    "TRANSPOSE": transpose,
}  # fmt: skip
"""Operators with a complex operand; others are refused there."""
