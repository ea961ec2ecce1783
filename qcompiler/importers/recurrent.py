"""LSTM, GRU and RNN: the projection of all steps' inputs as one matrix product, then `qc.f32.recurrence`, which takes the steps.

    Y, Y_h, Y_c = LSTM(x, W, R, B)     -->     states = qc.f32.recurrence(x . W + Wb, R, Rb, initial state, initial cell, lengths)      per direction

`states` are those of all steps, where the network reads Y, and behind them the last state and the last cell, where it reads Y_h or Y_c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from tvm import relax

from qcompiler.importers.control import reads, subgraphs
from qcompiler.importers.dynamic import ON_INTEGERS
from qcompiler.importers.nodes import Node, Refused, Value
from qcompiler.numerics.recurrence import DEFAULTS, FUNCTIONS, GATES, REAL
from qcompiler.passes.graph import const, make_op, shape_of
from qcompiler.passes.trained import ATTRIBUTE, CALIBRATED, INTEGER

RECURRENT = ("GRU", "LSTM", "RNN")
_NAMES = {name.lower(): name for name in REAL}
_USUAL = {"lstm": ("Sigmoid", "Tanh", "Tanh"), "gru": ("Sigmoid", "Tanh"), "rnn": ("Tanh",)}


def without_unread(model: onnx.ModelProto) -> None:
    """Takes the results of recurrent nodes that nothing reads out of `model`: exporters name all of them, and last states that are wanted cost something."""
    graphs = [model.graph]
    for graph in graphs:
        graphs += [g for node in graph.node for g in subgraphs(node)]
    read = {name for graph in graphs for node in graph.node for name in reads(node)} | {o.name for graph in graphs for o in graph.output}
    for node in (n for graph in graphs for n in graph.node if n.op_type in RECURRENT and n.domain in ("", "ai.onnx")):
        if read & set(node.output):
            node.output[:] = [name if name in read else "" for name in node.output]


def recurrent(node: Node) -> list[Value]:
    """The three results [Y, Y_h, Y_c], those left out as None. Raises Refused for peepholes, other activations and shapes that contradict one another."""
    return _Reader(node).results()


class _Reader:
    def __init__(self, node: Node) -> None:
        self.node, self.cell = node, node.op.lower()
        self.batch_first = bool(node.attrs.get("layout", 0))
        x = node.shape(0)
        if len(x) != 3:
            raise Refused(f"its input has shape {list(x)}; expected: 3 axes")
        self.batch, self.steps = (x[0], x[1]) if self.batch_first else (x[1], x[0])
        direction = node.text("direction", "forward")
        if direction not in ("forward", "reverse", "bidirectional"):
            raise Refused(f"direction '{direction}' is unknown; supported: forward, reverse, bidirectional")
        self.backwards = {"forward": [False], "reverse": [True]}.get(direction, [False, True])
        self.count, self.gates = len(self.backwards), GATES[self.cell]
        self.hidden = int(node.attrs.get("hidden_size", (0, *node.shape(2))[-1]))
        rows = self.gates * self.hidden
        self.w = self.parameter(1, "weights of its input", (self.count, rows, x[2]))
        self.r = self.parameter(2, "weights of its state", (self.count, rows, self.hidden))
        self.b = self.parameter(3, "bias", (self.count, 2 * rows)) if node.has(3) else np.zeros((self.count, 2 * rows), np.float32)
        if min(self.batch, self.steps, self.hidden) == 0:
            raise Refused(f"it has {self.steps} steps of {self.batch} rows and {self.hidden} hidden elements; supported: at least one of each")
        self.refuse_unsupported()

    def refuse_unsupported(self) -> None:
        if self.node.op == "LSTM" and self.node.has(7):
            peepholes = self.node.constant(7, "peepholes")
            assert peepholes is not None
            if peepholes.any():
                raise Refused("LSTMs with peepholes are not supported; train and export it without them")
        if self.node.attrs.get("input_forget", 0):
            raise Refused("an LSTM whose input and forget gates are coupled (input_forget) is not supported; supported: input_forget 0")

    def parameter(self, index: int, what: str, shape: Sequence[int]) -> np.ndarray:
        """A constant operand of just that shape."""
        value = self.node.constant(index, what)
        if value is None:
            raise Refused(f"its {what} are missing")
        if value.shape != tuple(shape):
            raise Refused(f"its {what} have shape {list(value.shape)}; expected: {list(shape)}")
        value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise Refused(f"its {what} hold NaN or Inf. Mend the weights before export: training may have diverged")
        return value

    # -- activations --------------------------------------------------------------------------------------------------------------------

    def functions(self, direction: int) -> dict[str, Any]:
        """Names, alphas and betas of a direction's functions. In the file, alphas and betas are lists of those functions that have any, in order."""
        count = FUNCTIONS[self.cell]
        names = [v.decode() if isinstance(v, bytes) else str(v) for v in self.node.attrs.get("activations", ())] or [*_USUAL[self.cell]] * self.count
        if len(names) != count * self.count:
            raise Refused(f"it has {len(names)} activations; expected: {count * self.count}")
        unknown = [n for n in names if n.lower() not in _NAMES]
        if unknown:
            raise Refused(f"activation '{unknown[0]}' is not supported; supported: {', '.join(REAL)}")
        given = [[float(v) for v in self.node.attrs.get(key, ())] for key in ("activation_alpha", "activation_beta")]
        takes = [("Affine", "HardSigmoid", "LeakyRelu", "ScaledTanh"), ("Affine", "HardSigmoid", "ScaledTanh")]
        found: list[dict[str, Any]] = []
        for name in (_NAMES[n.lower()] for n in names):
            numbers = []
            for values, holders, default in zip(given, takes, DEFAULTS.get(name, (None, None)), strict=True):
                number = values.pop(0) if values and name in holders else default
                if number is None and name in holders:
                    raise Refused(f"activation '{name}' needs activation_alpha and activation_beta")
                numbers.append(number or 0.0)
            found.append({"activations": name, "alpha": numbers[0], "beta": numbers[1]})
        mine = found[direction * count : (direction + 1) * count]
        return {key: [f[key] for f in mine] for key in ("activations", "alpha", "beta")}

    # -- operands -----------------------------------------------------------------------------------------------------------------------

    def x(self) -> Any:
        """[T, B, I]"""
        x = self.node.tensor(0)
        return self.node.emit("steps", relax.op.permute_dims(x, [1, 0, 2])) if self.batch_first else x

    def initial(self, index: int, what: str, direction: int) -> Any:
        """[B, H] of an initial state, zeros where it is left out."""
        if not self.node.has(index):
            return const(np.zeros((self.batch, self.hidden), np.float32))
        wanted = (self.batch, self.count, self.hidden) if self.batch_first else (self.count, self.batch, self.hidden)
        if self.node.shape(index) != wanted:
            raise Refused(f"its {what} has shape {list(self.node.shape(index))}; expected: {list(wanted)}")
        axis, value = int(self.batch_first), self.node.inputs[index]
        if isinstance(value, np.ndarray):
            return const(np.ascontiguousarray(value.take(direction, axis), np.float32))
        if self.count > 1:
            value = self.node.emit(f"{what}-{direction}", relax.op.strided_slice(value, [axis], [direction], [direction + 1]))
        return self.node.emit(f"{what}-{direction}-rows", relax.op.reshape(value, (self.batch, self.hidden)))

    def lengths(self) -> Any:
        """int32 [B]: how many steps each row takes. Raises Refused for known ones beyond the sequence."""
        if not self.node.has(4):
            return const(np.full(self.batch, self.steps, np.int32))
        if self.node.shape(4) != (self.batch,):
            raise Refused(f"its sequence_lens have shape {list(self.node.shape(4))}; expected: [{self.batch}]")
        value = self.node.inputs[4]
        if not isinstance(value, np.ndarray):
            return value if self.node.dtype(4) == "int32" else self.node.emit("lengths", relax.op.astype(value, "int32"))
        if value.min() < 0 or value.max() > self.steps:
            raise Refused(f"its sequence_lens reach from {value.min()} to {value.max()}; supported: 0 to {self.steps}, the steps of its input")
        return const(value.astype(np.int32))

    # -- results ------------------------------------------------------------------------------------------------------------------------

    def results(self) -> list[Value]:
        node = self.node
        wanted = [bool(o) for o in node.outputs] + [False] * (3 - len(node.outputs))
        finals = 2 if wanted[2] else int(wanted[1])
        x, lengths = self.x(), self.lengths()
        parts = [self.direction(d, x, lengths, wanted[0], finals) for d in range(self.count)]
        steps = self.steps if wanted[0] else 0
        y = self.joined("Y", [(p, 0, steps) for p in parts]) if wanted[0] else None
        last = [self.joined(name, [(p, steps + i, steps + i + 1) for p in parts]) if wanted[i + 1] else None for i, name in enumerate(("Y_h", "Y_c"))]
        return [y, *last][: len(node.outputs)]

    def direction(self, d: int, x: Any, lengths: Any, sequence: bool, finals: int) -> Any:
        """[T + finals, B, H]"""
        rows = self.gates * self.hidden
        name = "backwards" if self.backwards[d] else "forwards"
        product = self.node.emit(f"{name}-projection", relax.op.matmul(x, const(np.ascontiguousarray(self.w[d].T))))
        projected = self.node.emit(f"{name}-gates", relax.op.add(product, const(self.b[d, :rows])))
        attrs = {
            "cell": self.cell,
            "reverse": self.backwards[d],
            "linear_before_reset": bool(self.node.attrs.get("linear_before_reset", 0)),
            "sequence": sequence,
            "finals": finals,
            **self.functions(d),
        }
        clip = float(self.node.attrs.get("clip", 0.0))
        if clip > 0:
            attrs["clip"] = clip
        h0 = self.initial(5, "initial_h", d)
        c0 = self.initial(6, "initial_c", d) if self.cell == "lstm" else const(np.zeros((self.batch, self.hidden), np.float32))
        operands = [projected, const(self.r[d]), const(self.b[d, rows:]), h0, c0, lengths]
        shape = ((self.steps if sequence else 0) + finals, self.batch, self.hidden)
        states = self.node.emit(f"{name}-states", make_op("qc.f32.recurrence", operands, attrs, shape, "float32"))
        if self.node.attrs.get(ON_INTEGERS):
            for part, values in ((INTEGER, (product, states)), (CALIBRATED, (x, projected))):
                for value in values:
                    self.node.builder.annotate(ATTRIBUTE, part, str(value.name), "")
        return states

    def joined(self, name: str, rows: list[tuple[Any, int, int]]) -> Any:
        """Rows [begin, end) of each direction's states, as ONNX orders axes: [T, D, B, H] or [D, B, H], batch first where the node says so."""
        node, found = self.node, list[Any]()
        sequence = name == "Y"
        for d, (states, begin, end) in enumerate(rows):
            part = states
            if (begin, end) != (0, shape_of(states)[0]):
                part = node.emit(f"{name}-{d}-part", relax.op.strided_slice(states, [0], [begin], [end]))
            shape = (end - begin, 1, self.batch, self.hidden) if sequence else (1, self.batch, self.hidden)
            found.append(relax.op.reshape(part, shape))
        if len(found) == 1 and not self.batch_first:
            return found[0]
        parts = [node.emit(f"{name}-{d}", part) for d, part in enumerate(found)]
        whole = parts[0] if len(parts) == 1 else relax.op.concat(parts, 1 if sequence else 0)
        if not self.batch_first:
            return whole
        whole = whole if len(parts) == 1 else node.emit(name, whole)
        return relax.op.permute_dims(whole, [2, 0, 1, 3] if sequence else [1, 0, 2])
