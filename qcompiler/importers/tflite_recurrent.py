"""Recurrent TFLite operators. Their states are variable tensors: operands, and the last results of an operator (`tflite_state.STATEFUL`).

    UNIDIRECTIONAL_SEQUENCE_LSTM and its kin   -->    LSTM, RNN of ONNX; of int8 weights beside float activations DynamicQuantizeLSTM
    peepholes, projections, normalized gates, clipped cells, other activations    -->    the steps one by one, out of products and functions
    SVDF   -->    a product with the newest frame, put behind the memory of those before it; a convolution over all of the memory

Sources: tensorflow/lite/kernels/lstm_eval.cc, kernel_utils.cc (RnnBatchStep), internal/reference/lstm_cell.h, internal/reference/svdf.h. Kernels on integers
round what is between, and the hidden state, to 8 and 16 bits; here that is computed in float, and results and the states behind a call are rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qcompiler.importers.control import UNROLLED
from qcompiler.importers.nodes import Refused
from qcompiler.importers.qlinear import CONTRIB
from qcompiler.importers.tflite_file import Operator
from qcompiler.importers.tflite_graph import Graph
from qcompiler.importers.tflite_windows import product

_ORDER = (0, 3, 1, 2)  # ONNX's gates i, o, f, c among TFLite's i, f, c, o
_FUNCTIONS = {"TANH": "Tanh", "RELU": "Relu", "NONE": "Affine"}  # what ONNX calls them
_NODES = 24  # of a step that is written out, at the most


@dataclass(frozen=True)
class _Result:
    """What a direction computes: `y` [T, B, N] and `h` [B, N], `c` [B, H], the states behind the last step. Each is written when it is asked for."""

    y: Callable[[], str]
    h: Callable[[], str]
    c: Callable[[], str]


@dataclass(frozen=True)
class _Lstm:
    """A direction, gates in ONNX's order. w [4, H, I], r [4, H, N], bias [4, H]; peepholes [3, H] of i, o, f; norm [4, H]; projection [N, H] and its bias [N].
    integers: the int8 weights (w, r) and the scales [4 * H] of both, where the activations are float32."""

    w: np.ndarray
    r: np.ndarray
    bias: np.ndarray
    activation: str
    peepholes: np.ndarray | None = None
    norm: np.ndarray | None = None
    projection: np.ndarray | None = None
    projection_bias: np.ndarray | None = None
    cell_clip: float = 0.0
    projection_clip: float = 0.0
    integers: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def plain(self) -> bool:
        more = (self.peepholes, self.norm, self.projection)
        return all(m is None for m in more) and self.cell_clip == 0 and self.activation in _FUNCTIONS


# -- operands ---------------------------------------------------------------------------------------------------------------------------------


def array(g: Graph, op: Operator, place: int, shape: tuple[int, ...], what: str) -> np.ndarray:
    """A constant operand, real. Raises Refused for one that is computed, and for another shape (0: any)."""
    tensor = g.operand(op, place)
    found = _known(g, op.inputs[place])
    if found is None:
        raise Refused(f"its {what} ('{tensor.name}') are computed when the network runs; supported: constants")
    if len(found.shape) != len(shape) or any(n not in (0, m) for n, m in zip(shape, found.shape, strict=True)):
        raise Refused(f"its {what} ('{tensor.name}') have shape {list(found.shape)}; expected: {[n or 'any' for n in shape]}")
    if not np.isfinite(found).all():
        raise Refused(f"its {what} ('{tensor.name}') hold NaN or Inf. Mend the weights before export: training may have diverged")
    return found


def _known(g: Graph, index: int) -> np.ndarray | None:
    """float32; a constant, or one in halves or 8 bits behind DEQUANTIZE."""
    tensor = g.tensors[index]
    if tensor.data is not None:
        return _real(tensor.data, tensor.scale, tensor.zero_point, tensor.axis)
    maker = next((n for n in g.nodes if g.reals.get(index) in n.output), None)
    stored = g.constants.get(maker.input[0]) if maker is not None and maker.op_type in ("Cast", "DequantizeLinear") else None
    if stored is None or maker is None or maker.op_type == "Cast":
        return None if stored is None else stored.astype(np.float32)
    scale, zero = (np.atleast_1d(g.constants[n]) for n in maker.input[1:3])
    return _real(stored, scale, zero, next((a.i for a in maker.attribute if a.name == "axis"), 0))


def _real(data: np.ndarray, scale: np.ndarray | None, zero: np.ndarray | None, axis: int) -> np.ndarray:
    if scale is None or zero is None:
        return data.astype(np.float32)
    along = [-1 if i == axis and scale.size > 1 else 1 for i in range(data.ndim)]
    return np.asarray((data.astype(np.float32) - zero.reshape(along)) * scale.reshape(along), np.float32)


def bias(g: Graph, op: Operator, place: int, weight: int, size: int, unit: float | None = None) -> np.ndarray:
    """[size]; integers are in units of the scales of the input and of the operand `weight`, or of `unit`."""
    if not g.has(op, place):
        return np.zeros(size, np.float32)
    tensor, x, w = g.operand(op, place), g.operand(op, 0), g.operand(op, weight)
    if tensor.data is None or tensor.data.dtype.kind == "f":
        return array(g, op, place, (size,), "biases")
    if unit is None and (x.scale is None or w.scale is None or w.scale.size > 1):
        raise Refused(f"its bias '{tensor.name}' holds integers, and its operands are not quantized with a scale each")
    if tensor.data.shape != (size,):
        raise Refused(f"its bias '{tensor.name}' has shape {list(tensor.data.shape)}; expected: [{size}]")
    return np.asarray(tensor.data * np.float64(x.scale[0] * w.scale[0] if unit is None and x.scale is not None and w.scale is not None else unit), np.float32)


def steps_of(g: Graph, op: Operator, place: int = 0) -> tuple[str, int]:
    """(an operand as [T, B, I], T); [B, I] is one step."""
    shape = g.operand(op, place).shape
    if len(shape) == 2:
        return g.node("Unsqueeze", [g.value(op, place), g.int64([0])])[0], 1
    if len(shape) != 3:
        raise Refused(f"its operand '{g.operand(op, place).name}' has {len(shape)} axes; supported: 3 (steps, rows, elements), and 2 for one step")
    first = bool(op.option("TimeMajor", False))
    return g.value(op, place, None if first else [1, 0, 2]), shape[0 if first else 1]


# -- LSTM -------------------------------------------------------------------------------------------------------------------------------------


def read_lstm(g: Graph, op: Operator, at: tuple[int, ...], aux: int | None = None, norm: int | None = None) -> _Lstm:
    """at: where the weights of the input, of the state, peepholes, biases and the projection begin. aux: where those of a second input do. norm: where the
    coefficients of normalized gates do. An operator without an input gate has 1 - f in its place, which is the gate with the weights of f negated."""
    w_at, r_at, peep_at, bias_at, projection_at = at
    coupled = not g.has(op, w_at)
    present = range(int(coupled), 4)
    h = array(g, op, w_at + 1, (0, 0), "weights of its input").shape[0]
    n = array(g, op, r_at + 1, (h, 0), "weights of its state").shape[1]
    inputs = g.operand(op, 0).shape[-1]

    def gates(read: Callable[[int], np.ndarray], negated: bool = True) -> np.ndarray:
        found = {k: read(k) for k in present}
        if coupled:
            found[0] = -found[1] if negated else found[1]
        return np.stack([found[k] for k in _ORDER])

    w = gates(lambda k: array(g, op, w_at + k, (h, inputs), "weights of its input"))
    if aux is not None:
        w = np.concatenate([w, gates(lambda k: array(g, op, aux + k, (h, 0), "weights of its second input"))], axis=2)
    normalized = norm is not None and g.has(op, norm + 1)
    unit = {k: _unit(g, op, norm + k) if norm is not None and normalized and g.has(op, norm + k) else None for k in range(4)}
    found = _Lstm(
        w,
        gates(lambda k: array(g, op, r_at + k, (h, n), "weights of its state")),
        gates(lambda k: bias(g, op, bias_at + k, w_at + k, h, unit[k])),
        "TANH" if g.operand(op, 0).quantized else g.fused(op),
        cell_clip=float(op.option("CellClip", 0.0)),
        projection_clip=float(op.option("ProjClip", 0.0)),
        integers=None if coupled or aux is not None else _integers(g, op, w_at, r_at),
    )
    if g.has(op, peep_at + 1):
        peep = {k: array(g, op, peep_at + k, (h,), "peepholes") for k in (range(1, 3) if coupled else range(3))}
        found = replace(found, peepholes=np.stack([peep.get(0, -peep[1]), peep[2], peep[1]]))
    if norm is not None and normalized:
        found = replace(found, norm=gates(lambda k: array(g, op, norm + k, (h,), "coefficients of normalization"), False))
    if g.has(op, projection_at):
        own = g.operand(op, projection_at + 1).scale if g.has(op, projection_at + 1) else None
        shift = bias(g, op, projection_at + 1, projection_at, n, None if own is None else float(own[0]))
        found = replace(found, projection=array(g, op, projection_at, (n, h), "projection"), projection_bias=shift)
    elif n != h:
        raise Refused(f"it has {h} cells and {n} results, and no projection")
    return found


def _unit(g: Graph, op: Operator, place: int) -> float | None:
    """What a bias of integers behind a normalization is in units of (lstm.cc): 2^-10 of its coefficients' scale."""
    scale = g.operand(op, place).scale
    return None if scale is None else float(scale[0]) * 2.0**-10


def _integers(g: Graph, op: Operator, w_at: int, r_at: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    tensors = [[g.operand(op, at + k) for k in _ORDER] for at in (w_at, r_at)]
    every = [t for row in tensors for t in row]
    if g.operand(op, 0).quantized or any(t.data is None or t.dtype != "int8" or t.scale is None or t.scale.size > 1 for t in every):
        return None
    data = [np.concatenate([t.data for t in row if t.data is not None]) for row in tensors]
    scales = [np.concatenate([np.repeat(t.scale, t.shape[0]) for t in row if t.scale is not None]) for row in tensors]
    return data[0], data[1], scales[0], scales[1]


def lstm_direction(g: Graph, p: _Lstm, x: str, steps: int, h: str, c: str, backwards: bool = False) -> _Result:
    return _lstm_node(g, p, x, h, c, backwards) if p.plain else _unrolled(g, p, x, steps, h, c, backwards)


def _lstm_node(g: Graph, p: _Lstm, x: str, h: str, c: str, backwards: bool) -> _Result:
    size = p.bias.shape[1]
    b = g.constant(np.concatenate([p.bias.reshape(-1), np.zeros(4 * size, np.float32)])[None], "biases")
    h0, c0 = (g.node("Unsqueeze", [v, g.int64([0])])[0] for v in (h, c))
    name = _FUNCTIONS[p.activation]
    attributes: dict[str, Any] = {"hidden_size": size, "direction": "reverse" if backwards else "forward", "activations": ["Sigmoid", name, name]}
    if name == "Affine":
        attributes |= {"activation_alpha": [1.0, 1.0], "activation_beta": [0.0, 0.0]}
    if p.integers is None:
        weights = [g.constant(v.reshape(1, 4 * size, -1), what) for v, what in ((p.w, "weights"), (p.r, "recurrence"))]
        found = g.node("LSTM", [x, *weights, b, "", h0, c0], outputs=3, **attributes)
    else:
        w, r, w_scale, r_scale = p.integers
        stored = [g.constant(np.ascontiguousarray(v.T)[None], "weights") for v in (w, r)]
        numbers = [[g.constant(s[None].astype(np.float32), "scale"), g.constant(np.zeros((1, 4 * size), np.int8), "zero")] for s in (w_scale, r_scale)]
        operands = [x, *stored, b, "", h0, c0, "", *numbers[0], *numbers[1]]
        found = g.node("DynamicQuantizeLSTM", operands, outputs=3, domain=CONTRIB, **attributes)
    return _ends(g, found)


def _ends(g: Graph, found: list[str]) -> _Result:
    """Of the results Y [T, 1, B, N], Y_h and Y_c [1, B, N] of a node."""
    y, h, *c = found
    squeezed = [lambda value=value, axis=axis: g.node("Squeeze", [value, g.int64([axis])])[0] for value, axis in ((y, 1), (h, 0), (c[0] if c else h, 0))]
    return _Result(*squeezed)


def _unrolled(g: Graph, p: _Lstm, x: str, steps: int, h: str, c: str, backwards: bool) -> _Result:
    size = p.bias.shape[1]
    gates = g.node("MatMul", [x, g.constant(np.ascontiguousarray(p.w.reshape(4 * size, -1).T), "weights")])[0]
    r = g.constant(np.ascontiguousarray(p.r.reshape(4 * size, -1).T), "recurrence")
    if p.norm is None:
        gates = g.node("Add", [gates, g.constant(p.bias.reshape(-1), "biases")])[0]
    rows = list[str]()

    def peep(value: str, gate: int, cell: str) -> str:
        if p.peepholes is None or gate == 3:
            return value
        return g.node("Add", [value, *g.node("Mul", [cell, g.constant(p.peepholes[gate], "peephole")])])[0]

    def gate(parts: list[str], k: int, cell: str) -> str:
        value = peep(parts[k], k, cell)
        if p.norm is not None:
            value = g.node("LayerNormalization", [value, g.constant(p.norm[k], "norm"), g.constant(p.bias[k], "bias")], axis=-1, epsilon=1e-8)[0]
        return function(g, value, p.activation) if k == 3 else g.node("Sigmoid", [value])[0]

    for entering in _rows(g, gates, steps, backwards):
        parts = g.node("Split", g.node("Add", [entering, *g.node("MatMul", [h, r])]), outputs=4, axis=-1, num_outputs=4)
        i, f, new = (gate(parts, k, c) for k in (0, 2, 3))
        c = _clipped(g, g.node("Add", [*g.node("Mul", [f, c]), *g.node("Mul", [i, new])])[0], p.cell_clip)
        h = g.node("Mul", [gate(parts, 1, c), function(g, c, p.activation)])[0]
        if p.projection is not None and p.projection_bias is not None:
            whole = g.node("MatMul", [h, g.constant(np.ascontiguousarray(p.projection.T), "projection")])
            h = _clipped(g, g.node("Add", [*whole, g.constant(p.projection_bias, "bias")])[0], p.projection_clip)
        rows.append(h)
    return _of_rows(g, rows, h, c, backwards)


def _rows(g: Graph, whole: str, steps: int, backwards: bool) -> list[str]:
    """The [B, n] of each step of [T, B, n], in the order of the steps that are taken. Raises Refused where they are too many to be written out."""
    if not 0 < steps * _NODES <= UNROLLED:
        most = UNROLLED // _NODES
        raise Refused(
            f"it has peepholes, a projection or the like, which is computed step by step, and {steps} steps; supported: 1 to {most}, given in the file"
        )
    parts = g.node("Split", [whole], outputs=steps, axis=0, num_outputs=steps) if steps > 1 else [whole]
    rows = [g.node("Squeeze", [part, g.int64([0])])[0] for part in parts]
    return rows[::-1] if backwards else rows


def _of_rows(g: Graph, rows: list[str], h: str, c: str, backwards: bool) -> _Result:
    """The results of steps [B, n] in the order that they were taken in."""

    def stacked() -> str:
        parts = [g.node("Unsqueeze", [row, g.int64([0])])[0] for row in (rows[::-1] if backwards else rows)]
        return g.node("Concat", parts, axis=0)[0]

    return _Result(stacked, lambda: g.node("Identity", [h])[0], lambda: g.node("Identity", [c])[0])


def _clipped(g: Graph, value: str, bound: float) -> str:
    return g.node("Clip", [value, *(g.constant(np.array(b, np.float32), "bound") for b in (-bound, bound))])[0] if bound > 0 else value


def function(g: Graph, value: str, name: str) -> str:
    """An activation inside of a step."""
    return g.node("Tanh", [value])[0] if name == "TANH" else g.activated(value, name)


# -- the operators ----------------------------------------------------------------------------------------------------------------------------


def finished(g: Graph, op: Operator, tensor: int, y: str) -> None:
    """Binds [T, B, N], in the order of axes that the operator has; one step as [B, N]."""
    if g.rank(op) == 2:
        y = g.node("Squeeze", [y, g.int64([0])])[0]
    elif not op.option("TimeMajor", False):
        y = g.node("Transpose", [y], perm=[1, 0, 2])[0]
    g.bind(tensor, y)


def states_behind(g: Graph, op: Operator, values: list[Callable[[], str]]) -> None:
    """Binds the last results of an operator, which are the next values of its states."""
    if len(op.outputs) <= len(values):
        raise Refused("its states are no variable tensors, which is what LiteRT's kernels take")
    for tensor, value in zip(op.outputs[-len(values) :], values, strict=True):
        g.bind(tensor, value())


def lstm(g: Graph, op: Operator) -> None:
    """One step or a sequence, in one direction."""
    if op.op == "LSTM" and op.option("KernelType", 0) == 1:
        return basic_lstm(g, op)
    p, (x, steps) = read_lstm(g, op, (1, 5, 9, 12, 16), norm=20), steps_of(g, op)
    found = lstm_direction(g, p, x, steps, g.value(op, 18), g.value(op, 19))
    states_behind(g, op, [found.h, found.c])
    return finished(g, op, op.outputs[0], found.y())


def basic_lstm(g: Graph, op: Operator) -> None:
    """Operands: input, the last result, weights [4 * H, I + H] of gates i, c, f, o, bias, cell. Results: the new one, the new cell, and what is between."""
    whole = array(g, op, 2, (0, 0), "weights")
    size = whole.shape[0] // 4
    if g.operand(op, 0).shape[-1] + size != whole.shape[1] or whole.shape[0] % 4:
        raise Refused(f"its weights have shape {list(whole.shape)}; expected: four times its {size} cells, and as many columns as its input and they have")
    order = [0, 3, 2, 1]
    w = whole.reshape(4, size, -1)[order]
    b = bias(g, op, 3, 2, 4 * size).reshape(4, size)[order]
    p = _Lstm(w[:, :, :-size], w[:, :, -size:], b, "TANH", cell_clip=float(op.option("CellClip", 0.0)))
    x, steps = steps_of(g, op)
    found = lstm_direction(g, p, x, steps, g.value(op, 1), g.value(op, 4))
    g.bind(op.outputs[0], found.h())
    g.bind(op.outputs[1], found.c())


def both(g: Graph, op: Operator, forwards: Callable[[], _Result], backwards: Callable[[], _Result], states: Callable[[_Result], list[Any]]) -> None:
    """The results of both directions, side by side or each its own."""
    one, other = forwards(), backwards()
    states_behind(g, op, [*states(one), *states(other)])
    if op.option("MergeOutputs", False):
        return finished(g, op, op.outputs[0], g.node("Concat", [one.y(), other.y()], axis=2)[0])
    for tensor, found in zip(op.outputs[:2], (one, other), strict=True):
        finished(g, op, tensor, found.y())
    return None


def second_input(g: Graph, op: Operator, aux: int, weights: int, x: str) -> tuple[str, str, bool]:
    """(what goes forwards, what goes backwards, are there weights of a second input): a second input without weights is what goes backwards."""
    if not g.has(op, aux):
        return x, x, False
    other, _ = steps_of(g, op, aux)
    crossed = not g.has(op, weights)
    if not op.option("TimeMajor", False) and (op.option("MergeOutputs", False) if op.op.endswith("LSTM") else crossed):
        raise Refused("it has a second input, and batches first, where LiteRT's kernel reads other rows than with steps first; supported: steps first")
    if crossed:
        return x, other, False
    joined = g.node("Concat", [x, other], axis=2)[0]
    return joined, joined, True


def bidirectional_lstm(g: Graph, op: Operator) -> None:
    x, steps = steps_of(g, op)
    there, back, aux = second_input(g, op, 39, 41, x)
    first, second = (
        read_lstm(g, op, (1, 5, 9, 12, 16), 40 if aux else None),
        read_lstm(g, op, (18, 22, 26, 29, 33), 44 if aux else None),
    )
    both(
        g, op,
        lambda: lstm_direction(g, first, there, steps, g.value(op, 35), g.value(op, 36)),
        lambda: lstm_direction(g, second, back, steps, g.value(op, 37), g.value(op, 38), True),
        lambda found: [found.h, found.c],
    )  # fmt: skip


def rnn_direction(g: Graph, op: Operator, at: int, x: str, steps: int, backwards: bool = False, aux: int | None = None) -> _Result:
    """h' = function(W x + R h + bias). at: where W, R, the bias and the state are; aux: where the weights of a second input are."""
    r = array(g, op, at + 1, (0, 0), "weights of its state")
    size = r.shape[0]
    w = array(g, op, at, (size, 0), "weights of its input")
    if aux is not None:
        w = np.concatenate([w, array(g, op, aux, (size, 0), "weights of its second input")], axis=1)
    b, h, name = array(g, op, at + 2, (size,), "biases"), g.value(op, at + 3), g.fused(op)
    if r.shape[1] != size:
        raise Refused(f"the weights of its state have shape {list(r.shape)}; expected: as many columns as rows")
    if name in _FUNCTIONS:
        numbers = {"activation_alpha": [1.0], "activation_beta": [0.0]} if name == "NONE" else {}
        operands = [g.constant(v[None], what) for v, what in ((w, "weights"), (r, "recurrence"), (np.concatenate([b, np.zeros_like(b)]), "biases"))]
        attributes = {"hidden_size": size, "direction": "reverse" if backwards else "forward", "activations": [_FUNCTIONS[name]], **numbers}
        return _ends(g, g.node("RNN", [x, *operands, "", *g.node("Unsqueeze", [h, g.int64([0])])], outputs=2, **attributes))
    entering = g.node("Add", [*g.node("MatMul", [x, g.constant(np.ascontiguousarray(w.T), "weights")]), g.constant(b, "bias")])[0]
    columns, rows = g.constant(np.ascontiguousarray(r.T), "recurrence"), list[str]()
    for row in _rows(g, entering, steps, backwards):
        h = function(g, g.node("Add", [row, *g.node("MatMul", [h, columns])])[0], name)
        rows.append(h)
    return _of_rows(g, rows, h, h, backwards)


def rnn(g: Graph, op: Operator) -> None:
    found = rnn_direction(g, op, 1, *steps_of(g, op))
    states_behind(g, op, [found.h])
    finished(g, op, op.outputs[0], found.y())


def bidirectional_rnn(g: Graph, op: Operator) -> None:
    x, steps = steps_of(g, op)
    there, back, aux = second_input(g, op, 9, 10, x)
    both(
        g, op,
        lambda: rnn_direction(g, op, 1, there, steps, False, 10 if aux else None),
        lambda: rnn_direction(g, op, 5, back, steps, True, 11 if aux else None),
        lambda found: [found.h],
    )  # fmt: skip


def svdf(g: Graph, op: Operator) -> None:
    """Operands: frame [B, I], weights of features [F, I], weights in time [F, M], bias [F / rank], memory [B, F * M], whose newest column is the last."""
    features, time, x = g.operand(op, 1), g.operand(op, 2), g.operand(op, 0)
    f, m, rank = features.shape[0], time.shape[-1], op.option("Rank")
    if len(x.shape) != 2 or len(features.shape) != 2 or time.shape != (f, m) or features.shape[1] != x.shape[1] or rank < 1 or f % rank:
        shapes = f"{list(x.shape)}, {list(features.shape)} and {list(time.shape)}"
        raise Refused(f"its frame and weights have shapes {shapes} at rank {rank}; expected: [B, I], [F, I] and [F, M], F a multiple of the rank")
    memory = g.node("Reshape", [g.value(op, 4), g.int64([-1, f, 1, m])])[0]
    column = product(g, replace(op, inputs=op.inputs[:2]), "MatMul", g.value(op, 0), g.value(op, 1, [1, 0]), features)
    newest = g.node("Reshape", [column, g.int64([-1, f, 1, 1])])[0]
    older = g.node("Slice", [memory, *map(g.int64, ([1], [m], [3]))])[0]
    whole = g.node("Concat", [older, newest], axis=3)[0] if m > 1 else newest
    states_behind(g, op, [lambda: g.node("Reshape", [whole, g.int64([-1, f * m])])[0]])
    behind = g.node("Reshape", [g.real(op.outputs[-1]), g.int64([-1, f, 1, m])])[0]
    weights = array(g, op, 2, (f, m), "weights in time").reshape(f // rank, rank, 1, m)
    shift = [g.constant(bias(g, op, 3, 2, f // rank, _product_unit(g, op)), "bias")] if g.has(op, 3) else []
    value = g.node("Conv", [behind, g.constant(weights, "time"), *shift], group=f // rank, kernel_shape=[1, m])[0]
    y = g.node("Reshape", [value, g.int64([-1, f // rank])])[0]
    g.bind(op.outputs[0], y if x.quantized else function(g, y, g.fused(op)))  # the kernel on integers leaves it to the result's zero point


def _product_unit(g: Graph, op: Operator) -> float | None:
    """What the integers of SVDF's bias are in units of: the scales of its memory and its weights in time."""
    scales = [g.operand(op, place).scale for place in (4, 2)]
    return float(scales[0][0] * scales[1][0]) if scales[0] is not None and scales[1] is not None else None


RECURRENT = {
    "LSTM": lstm, "UNIDIRECTIONAL_SEQUENCE_LSTM": lstm, "BIDIRECTIONAL_SEQUENCE_LSTM": bidirectional_lstm, "RNN": rnn, "UNIDIRECTIONAL_SEQUENCE_RNN": rnn,
    "BIDIRECTIONAL_SEQUENCE_RNN": bidirectional_rnn, "SVDF": svdf,
}  # fmt: skip
