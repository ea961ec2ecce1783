"""One step of an LSTM or GRU that an exporter spelled out (PyTorch's LSTMCell and GRUCell) becomes the operator: its cell is kept in 16 bits then.

    i, f, g, o = split(x . W + h . R + b)       c' = sigmoid(f) * c + sigmoid(i) * tanh(g)       h' = sigmoid(o) * tanh(c')             -->    LSTM
    r = sigmoid(xr + hr)    z = sigmoid(xz + hz)    n = tanh(xn + r * hn)    h' = (h - n) * z + n    of the parts of x . W and h . R     -->    GRU

Products are Gemm or MatMul with constant weights, with a bias or without. Whatever differs stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qcompiler.base.value_ids import Naming
from qcompiler.importers.control import in_order, reads
from qcompiler.importers.sequences import known


def with_cells(model: onnx.ModelProto, naming: Naming) -> onnx.ModelProto:
    """The model with LSTM and GRU for steps that are spelled out; itself where there is none."""
    kinds = {n.op_type for n in model.graph.node}
    return _Cells(model, naming).run() if {"Sigmoid", "Tanh", "Mul", "Add"} <= kinds else model


@dataclass(frozen=True)
class _Linear:
    """x . weight^T + bias; weight float [rows, columns]."""

    x: str
    weight: np.ndarray
    bias: np.ndarray


@dataclass
class _Cells:
    model: onnx.ModelProto
    naming: Naming
    added: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.constants = known(self.model.graph)
        self.made_by = {o: n for n in self.model.graph.node for o in n.output if o}

    def run(self) -> onnx.ModelProto:
        made: dict[str, list[onnx.NodeProto]] = {}  # a step's last result -> what computes it now
        gone: set[str] = set()
        for node in self.model.graph.node:
            found = self.lstm(node) if node.op_type == "Mul" else self.gru(node) if node.op_type == "Add" else None
            if found is not None:
                made[node.output[0]] = found
                gone |= {o for n in found for o in n.output}
        if not made:
            return self.model
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        nodes = [n for node in self.model.graph.node for n in (made.get(node.output[0]) or ([] if set(node.output) & gone else [node]))]
        wanted, kept = {o.name for o in model.graph.output}, []
        for node in reversed(in_order(nodes)):  # a step's cell may be read by nodes before its last result
            if wanted.intersection(node.output):
                wanted.update(reads(node))
                kept.append(node)
        del model.graph.node[:]
        model.graph.node.extend(kept[::-1])
        model.graph.initializer.extend(self.added)
        return model

    # -- patterns -----------------------------------------------------------------------------------------------------------------------

    def lstm(self, last: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        ends = self.pair(last.output[0], "Mul", "Sigmoid", "Tanh")
        terms = None if ends is None else self.operands(ends[1], "Add")
        if ends is None or terms is None:
            return None
        for new, old in (terms, terms[::-1]):
            entering = self.pair(new, "Mul", "Sigmoid", "Tanh")
            kept = self.operands(old, "Mul")
            for forget, cell in (kept, kept[::-1]) if entering and kept else ():
                gate = self.operand(forget, "Sigmoid")
                places = None if gate is None or entering is None else [self.part(v) for v in (entering[0], ends[0], gate, entering[1])]  # i, o, f, g
                if places is None or None in places or len({p[0] for p in places if p}) != 1:
                    continue
                whole, size = places[0][0], places[0][2]  # type: ignore[index]
                order = [p[1] for p in places if p]
                linear = self.two(whole)
                if linear is None or sorted(order) != [0, 1, 2, 3] or any(p[2] != size for p in places if p):
                    continue
                return self.step("LSTM", linear, order, size, [cell], [last.output[0], ends[1]])
        return None

    def gru(self, last: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        for held, new in _both(list(last.input)):
            factors = self.operands(held, "Mul")
            for difference, update in (factors, factors[::-1]) if factors else ():
                less, z, n = self.made_by.get(difference), self.operand(update, "Sigmoid"), self.operand(new, "Tanh")
                if less is None or less.op_type != "Sub" or less.input[1] != new or z is None or n is None:
                    continue
                for xn, reset in _both(self.operands(n, "Add") or []):
                    for r, hn in _both(self.operands(reset, "Mul") or []):
                        gate = self.operand(r, "Sigmoid")
                        found = None if gate is None else self.gru_of(str(less.input[0]), z, gate, xn, hn, last.output[0])
                        if found is not None:
                            return found
        return None

    def gru_of(self, h: str, z: str, r: str, xn: str, hn: str, result: str) -> list[onnx.NodeProto] | None:
        whole_x, whole_h = self.part(xn), self.part(hn)
        if whole_x is None or whole_h is None or whole_x[1:] != whole_h[1:]:
            return None
        order = []
        for gate in (z, r):
            parts = {p[0]: p for v in self.operands(gate, "Add") or [] if (p := self.part(v)) is not None}
            if set(parts) != {whole_x[0], whole_h[0]} or len({p[1:] for p in parts.values()}) != 1 or parts[whole_x[0]][2] != whole_x[2]:
                return None
            order.append(parts[whole_x[0]][1])
        linear = self.linear(whole_x[0]), self.linear(whole_h[0])
        if linear[0] is None or linear[1] is None or linear[1].x != h or sorted([*order, whole_x[1]]) != [0, 1, 2]:
            return None
        return self.step("GRU", (linear[0], linear[1]), [*order, whole_x[1]], whole_x[2], [], [result])

    # -- what patterns are made of ------------------------------------------------------------------------------------------------------

    def operands(self, name: str, op: str) -> list[str] | None:
        node = self.made_by.get(name)
        return list(node.input) if node is not None and node.op_type == op and node.domain in ("", "ai.onnx") else None

    def operand(self, name: str, op: str) -> str | None:
        found = self.operands(name, op)
        return found[0] if found else None

    def pair(self, name: str, op: str, first: str, second: str) -> tuple[str, str] | None:
        """What stands behind `first` and `second` in op(first(a), second(b)), in whichever order."""
        for one, other in _both(self.operands(name, op) or []):
            a, b = self.operand(one, first), self.operand(other, second)
            if a is not None and b is not None:
                return a, b
        return None

    def part(self, name: str) -> tuple[str, int, int] | None:
        """(tensor, k, size) of its k-th part of `size` columns; of matrices, as whoever asks for the product behind sees."""
        node = self.made_by.get(name)
        if node is None or node.op_type not in ("Split", "Slice"):
            return None
        numbers = [self.constants.get(i) for i in node.input[1:]]
        if node.op_type == "Split":
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            if axis not in (1, -1) or not numbers or numbers[0] is None or len(set(numbers[0].tolist())) != 1:
                return None
            return str(node.input[0]), list(node.output).index(name), int(numbers[0][0])
        if len(numbers) < 3 or any(v is None or v.size != 1 for v in numbers):
            return None
        begin, end, axis, *step = (int(v.reshape(())) for v in numbers if v is not None)
        size = end - begin
        return (str(node.input[0]), begin // size, size) if axis in (1, -1) and size > 0 and begin % size == 0 and step in ([], [1]) else None

    def linear(self, name: str) -> _Linear | None:
        """A product of a matrix with constant weights, and its bias."""
        node = self.made_by.get(name)
        if node is None:
            return None
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Gemm":
            weight, bias = self.constants.get(node.input[1]), self.constants.get(node.input[2]) if len(node.input) > 2 else np.zeros(1, np.float32)
            plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)
            if weight is None or bias is None or not plain or weight.ndim != 2:
                return None
            return self.made(str(node.input[0]), weight if attributes.get("transB", 0) else weight.T, bias)
        if node.op_type == "MatMul":
            weight = self.constants.get(node.input[1])
            return None if weight is None or weight.ndim != 2 else self.made(str(node.input[0]), weight.T, np.zeros(1, np.float32))
        if node.op_type == "Add":
            for product, term in _both(list(node.input)):
                found, bias = self.linear(product), self.constants.get(term)
                if found is not None and bias is not None:
                    return self.made(found.x, found.weight, found.bias + bias)
        return None

    def made(self, x: str, weight: np.ndarray, bias: np.ndarray) -> _Linear | None:
        rows = len(weight)
        fits = bias.size in (1, rows) and weight.dtype == np.float32 and np.isfinite(weight).all() and np.isfinite(bias).all()
        return _Linear(x, weight, np.broadcast_to(bias.astype(np.float32).reshape(-1), (rows,))) if fits else None

    def two(self, name: str) -> tuple[_Linear, _Linear] | None:
        """(of the input, of the state) of a sum of two products; the state's comes first, as PyTorch writes it, where both could be."""
        terms = self.operands(name, "Add") or []
        found = [self.linear(t) for t in terms]
        if len(found) != 2 or found[0] is None or found[1] is None:
            return None
        square = [len(f.weight) == 4 * f.weight.shape[1] for f in found if f is not None]
        return (found[1], found[0]) if square[0] else (found[0], found[1]) if square[1] else None

    # -- the operator -------------------------------------------------------------------------------------------------------------------

    def step(self, op: str, linear: tuple[_Linear, _Linear], order: list[int], size: int, cell: list[str], results: list[str]) -> list[onnx.NodeProto] | None:
        """One step of `op`, as a sequence of length 1 in one direction. order: which part of the rows is each gate of the operator's."""
        x, h = linear
        if len(x.weight) != len(order) * size or h.weight.shape != (len(order) * size, size):
            return None
        rows = np.concatenate([np.arange(k * size, (k + 1) * size) for k in order])
        made, name = self.naming.made, results[0]
        operands = {"W": x.weight[rows][None], "R": h.weight[rows][None], "B": np.concatenate([x.bias[rows], h.bias[rows]])[None]}
        for what, array in operands.items():
            self.added.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), made(name, what)))
        axis = made(name, "axis")
        self.added.append(numpy_helper.from_array(np.zeros(1, np.int64), axis))
        entering = [x.x, h.x, *cell]
        rows_of = [made(name, f"rows{i}") for i in range(len(entering))]
        nodes = [helper.make_node("Unsqueeze", [value, axis], [out], name=out) for value, out in zip(entering, rows_of, strict=True)]
        states = [made(name, f"state{i}") for i in range(len(results))]
        weights = [made(name, what) for what in operands]
        attributes = {"hidden_size": size, **({"linear_before_reset": 1} if op == "GRU" else {})}
        nodes.append(helper.make_node(op, [rows_of[0], *weights, "", *rows_of[1:]], ["", *states], name=name, **attributes))
        return nodes + [helper.make_node("Squeeze", [state, axis], [out], name=out) for state, out in zip(states, results, strict=True)]


def _both(values: list[str]) -> list[tuple[str, str]]:
    return [(values[0], values[1]), (values[1], values[0])] if len(values) == 2 else []
