"""Operators that take and yield integers, written as DequantizeLinear, float operator, QuantizeLinear: what they are defined to compute.

    QLinearConv(x8, w8, b32) -> y8    -->    y8 = QuantizeLinear(Conv(DequantizeLinear(x8), DequantizeLinear(w8), DequantizeLinear(b32)))
    MaxPool(x8) -> y8                 -->    the same around the float MaxPool

An integer tensor `y` of the file becomes `y~int8`, and `y` is its float form, so that values keep their names. `qdq.py` takes the pairs out afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qcompiler.base.value_ids import Naming
from qcompiler.importers.control import captured

MOVES = ("MaxPool", "GlobalMaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Expand", "Tile", "Identity",
         "Dropout", "DepthToSpace", "SpaceToDepth", "Pad", "Resize")  # fmt: skip
"""Operators that yield elements of their first operand, integers as well as floats, or numbers between them: what ONNX leaves open there, how a Resize of
integers rounds, is to the nearest then."""
CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators
_UNARY = {  # (X, scale, zero point, scale of Y, zero point of Y)
    "QLinearSigmoid": "Sigmoid", "QLinearLeakyRelu": "LeakyRelu", "QLinearSoftmax": "Softmax", "QLinearAveragePool": "AveragePool",
    "QLinearGlobalAveragePool": "GlobalAveragePool", "QLinearReduceMean": "ReduceMean",
}  # fmt: skip
_BINARY = {"QLinearAdd": "Add", "QLinearMul": "Mul", "QLinearMatMul": "MatMul"}  # (A, scale, zero point, B, scale, zero point, scale of Y, zero point of Y)


ON_INTEGERS = (*_UNARY, *_BINARY, "QLinearConv", "QGemm", "QLinearConcat", "QLinearWhere")
"""Operators that `expand` rewrites."""


def expands(node: onnx.NodeProto) -> bool:
    """Is this an operator that `expand` rewrites, whatever its operands?"""
    return node.op_type in ON_INTEGERS and node.domain in ("", "ai.onnx", CONTRIB)


def expand(model: onnx.ModelProto, naming: Naming) -> onnx.ModelProto:
    """The model in terms of QuantizeLinear, DequantizeLinear and float operators; itself when it has no integer operators. naming: of the file."""
    if not any(expands(n) for n in model.graph.node) and not any(n.op_type == "QuantizeLinear" for n in model.graph.node):
        return model
    return _Expander(model, naming).run()


@dataclass
class _Expander:
    source: onnx.ModelProto
    naming: Naming
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tensors = {t.name: t for t in self.source.graph.initializer}
        for node in self.source.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.tensors[node.output[0]] = node.attribute[0].t
        self.outputs = {o.name for o in self.source.graph.output} | captured(self.source.graph)
        self.integers: dict[str, tuple[str, str, str, str]] = {}  # integer tensor of the file -> (its name now, its float form, scale, zero point)
        self.added: list[onnx.TensorProto] = []

    def run(self) -> onnx.ModelProto:
        for node in self.source.graph.node:
            if not self.rewritten(node):
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                for i, name in enumerate(copy.input):
                    if name in self.integers:
                        copy.input[i] = self.integers[name][0]
                self.nodes.append(copy)
                if node.op_type == "QuantizeLinear" and len(node.input) > 2 and node.input[2]:
                    self.integers[node.output[0]] = (node.output[0], "", node.input[1], node.input[2])
        model = onnx.ModelProto()
        model.CopyFrom(self.source)
        del model.graph.node[:]
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(self.added)
        return model

    def rewritten(self, node: onnx.NodeProto) -> bool:
        op, inputs = node.op_type, list(node.input)
        if not expands(node) and (op not in MOVES or node.domain not in ("", "ai.onnx")):
            return False
        if op == "QLinearConv":
            x, w = self.real(node, 0), self.real(node, 3, axis=0)
            operands = [x, w]
            if len(inputs) > 8 and inputs[8]:
                operands.append(self.bias(node, inputs[8], inputs[1], inputs[4]))
            self.emit(node, "Conv", operands, inputs[6], inputs[7])
        elif op == "QGemm":
            operands = [self.real(node, 0), self.real(node, 3, axis=0 if _attribute(node, "transB") else 1)]
            if len(inputs) > 6 and inputs[6]:
                operands.append(self.bias(node, inputs[6], inputs[1], inputs[4]))
            self.emit(node, "Gemm", operands, *(inputs[7:9] if len(inputs) > 8 else ("", "")))
        elif op in _BINARY:
            rows, columns = (-2, -1) if op == "QLinearMatMul" else (None, None)
            operands = [self.real(node, 0, axis=rows), self.real(node, 3, axis=columns)]
            self.emit(node, _BINARY[op], operands, inputs[6], inputs[7] if len(inputs) > 7 else "", axis=rows)
        elif op in _UNARY and not _attribute(node, "channels_last"):
            self.emit(node, _UNARY[op], [self.real(node, 0)], inputs[3], inputs[4] if len(inputs) > 4 else "")
        elif op == "QLinearConcat":
            self.emit(node, "Concat", [self.real(node, i) for i in range(2, len(inputs), 3)], inputs[0], inputs[1])
        elif op == "QLinearWhere":
            self.emit(node, "Where", [inputs[0], self.real(node, 1), self.real(node, 4)], inputs[7], inputs[8] if len(inputs) > 8 else "")
        elif op in MOVES and inputs[0] in self.integers and (len(node.output) == 1 or op == "Split") and self.one(self.integers[inputs[0]][2]):
            _, _, scale, zero = self.integers[inputs[0]]
            operands = [self.form(node, inputs[0], scale, zero), *inputs[1:]]
            if op == "Pad":
                if len(inputs) < 2:
                    return False  # before opset 11 it takes floats alone
                operands[2:3] = [self.form(node, inputs[2] if len(inputs) > 2 and inputs[2] else self.none(node, zero), scale, zero)]
            self.emit(node, op, operands, scale, zero)
        else:
            return False
        return True

    def emit(self, node: onnx.NodeProto, op: str, operands: list[str], scale: str, zero: str, axis: int | None = None) -> None:
        """The float operator, and its results as integers and as float again; those without scale are float. axis: of several scales."""
        if not scale:
            self.nodes.append(_made(node, op, operands, list(node.output)))
            return
        made, along = self.naming.made, {} if axis is None else {"axis": axis}
        self.nodes.append(_made(node, op, operands, [made(y, "exact") for y in node.output]))
        parameters = [scale, zero] if zero else [scale]
        for y in node.output:
            integer, real = (y, made(y, "real")) if y in self.outputs else (made(y, "int8"), y)
            self.nodes.append(helper.make_node("QuantizeLinear", [made(y, "exact"), *parameters], [integer], name=made(y, "q"), **along))
            self.nodes.append(helper.make_node("DequantizeLinear", [integer, *parameters], [real], name=made(y, "dq"), **along))
            self.integers[y] = (integer, real, scale, zero)

    def real(self, node: onnx.NodeProto, index: int, axis: int | None = None) -> str:
        """The float form of operand `index`, whose scale and zero point are the two operands behind it."""
        return self.form(node, node.input[index], node.input[index + 1], node.input[index + 2], axis)

    def form(self, node: onnx.NodeProto, name: str, scale: str, zero: str, axis: int | None = None) -> str:
        if name in self.integers:
            integer, real, before_scale, before_zero = self.integers[name]
            if real and self.same(scale, before_scale) and self.same(zero, before_zero):
                return real
            name = integer
        result = self.naming.made(node.name or node.output[0], len(self.nodes))
        parameters = [scale, zero] if zero else [scale]
        self.nodes.append(helper.make_node("DequantizeLinear", [name, *parameters], [result], name=result, **({} if axis is None else {"axis": axis})))
        return result

    def bias(self, node: onnx.NodeProto, name: str, x_scale: str, w_scale: str) -> str:
        """int32 in units of both scales' product."""
        scale = self.naming.made(node.name or node.output[0], "bias-scale")
        if x_scale in self.tensors and w_scale in self.tensors:
            product: np.ndarray = numpy_helper.to_array(self.tensors[x_scale]) * numpy_helper.to_array(self.tensors[w_scale])
            self.added.append(numpy_helper.from_array(np.asarray(product, np.float32), scale))
        else:
            self.nodes.append(helper.make_node("Mul", [x_scale, w_scale], [scale], name=scale))
        result = self.naming.made(node.name or node.output[0], "bias")
        self.nodes.append(helper.make_node("DequantizeLinear", [name, scale], [result], axis=0))
        return result

    def none(self, node: onnx.NodeProto, zero: str) -> str:
        """The integer 0, of the type of a zero point."""
        kind = self.tensors[zero].data_type if zero in self.tensors else onnx.TensorProto.UINT8
        self.added.append(helper.make_tensor(self.naming.made(node.output[0], "none"), kind, [], [0]))
        return str(self.added[-1].name)

    def one(self, scale: str) -> bool:
        """Is this one scale, known now? It is the scale of moved elements too."""
        return scale in self.tensors and int(np.prod(self.tensors[scale].dims)) == 1

    def same(self, a: str, b: str) -> bool:
        if a == b:
            return True
        return a in self.tensors and b in self.tensors and np.array_equal(numpy_helper.to_array(self.tensors[a]), numpy_helper.to_array(self.tensors[b]))


def _made(node: onnx.NodeProto, op: str, operands: list[str], outputs: list[str]) -> onnx.NodeProto:
    made = helper.make_node(op, operands, outputs, name=node.name)
    made.attribute.extend(a for a in node.attribute if a.name not in ("channels_last", "opset"))
    return made


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), 0)
