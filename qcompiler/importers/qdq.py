"""QuantizeLinear and DequantizeLinear in a file: taken out of the graph, their parameters kept (`passes/trained.py`).

    conv -> QuantizeLinear -> DequantizeLinear -> ...    -->    conv -> Clip to what 8 bits can say -> ...
    int8 constant -> DequantizeLinear -> conv            -->    float constant -> conv
    float constant -> QuantizeLinear -> DequantizeLinear -->    the same, rounded

So the float network is what the file computes but for the rounding of activations. The Clip is needed: quantizers remove a ReLU where saturation does
its work. It is left out behind operators that only move data of the same quantization, and at network inputs, where it could not do anything.
Integer tensors that only move between two of these nodes, and operators that take and yield integers (QLinearConv, ...), are written as
DequantizeLinear, float operator, QuantizeLinear first (`qlinear.py`).

Parameters that this compiler's int8 arithmetic can't honour are left out, with a note; the plan then chooses others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompiler.importers.onnx_file import default_opset
from qcompiler.importers.qlinear import expand
from qcompiler.numerics.spec import QParams
from qcompiler.passes.trained import Trained

PAIR = ("QuantizeLinear", "DequantizeLinear")
MOVES = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Identity", "Dropout", "Expand", "Tile",
         "DepthToSpace", "SpaceToDepth", "GlobalMaxPool"}  # fmt: skip
"""Operators whose results are elements of their first operand: they keep its quantization."""
_SHIFT = {"int8": 0, "int4": 0, "uint8": 128, "uint4": 8}  # of a symmetric weight's zero point
_WEIGHT_AXIS = {"Conv": 0, "ConvTranspose": 1}
_BITS = {"int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127), "uint8": (0, 255), "int16": (-(1 << 15), (1 << 15) - 1), "uint16": (0, (1 << 16) - 1)}


@dataclass(frozen=True)
class Parameters:
    """Of one Q or DQ node: real = scale * (q - zero_point). axis: of several scales; block: elements of the axis per scale, 0: not blocked."""

    scale: np.ndarray
    zero_point: np.ndarray
    dtype: str
    axis: int
    block: int

    def along(self, shape: Sequence[int], array: np.ndarray) -> np.ndarray:
        """`scale` or `zero_point` so that it broadcasts against a tensor of `shape`."""
        if array.size == 1:
            return array.reshape(())
        axis = self.axis % len(shape)
        if self.block:
            spread: np.ndarray = np.repeat(array, self.block, axis=axis)
            return spread[tuple(slice(0, d) for d in shape)]
        return array.reshape([-1 if i == axis else 1 for i in range(len(shape))])

    def dequantize(self, q: np.ndarray) -> np.ndarray:
        """float32, as ONNX defines it."""
        centred = (q.astype(np.int64) - self.along(q.shape, self.zero_point)).astype(np.float32)
        return np.asarray(centred * self.along(q.shape, self.scale), np.float32)

    def quantize(self, real: np.ndarray) -> np.ndarray:
        """int64, as ONNX defines it: round half to even, saturate."""
        scaled = np.rint(real.astype(np.float32) / self.along(real.shape, self.scale)).astype(np.float64)
        low, high = _BITS[self.dtype]
        return np.asarray(np.clip(scaled + self.along(real.shape, self.zero_point), low, high), np.int64)

    def of_activation(self) -> QParams | str:
        """Parameters of a canonical int8 activation; or why there are none."""
        if self.dtype not in ("int8", "uint8"):
            return f"{self.dtype} activations have no kernel"
        if self.scale.size != 1 or self.block:
            return "an activation has one scale here, not one per channel or block"
        try:
            return QParams(float(self.scale.reshape(())), int(self.zero_point.reshape(())) - _SHIFT[self.dtype])
        except ValueError as error:
            return str(error)

    @property
    def range(self) -> tuple[float, float] | None:
        """What the type can say, for one scale and an integer type."""
        if self.scale.size != 1 or self.dtype not in _BITS:
            return None
        low, high = (float(np.float32(self.scale.reshape(())) * np.float32(b - int(self.zero_point.reshape(())))) for b in _BITS[self.dtype])
        return low, high


@dataclass
class Rounded:
    """A constant that is stated in integers: `value` is int64, its float form is `parameters.dequantize(value)`."""

    value: np.ndarray
    parameters: Parameters


def take_out(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Trained]:
    """(the float network, what was found). A model without quantized arithmetic is returned as it is."""
    model = expand(model)
    return _Rewriter(model).run() if any(n.op_type in PAIR for n in model.graph.node) else (model, Trained())


@dataclass
class _Rewriter:
    source: onnx.ModelProto
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    trained: Trained = field(default_factory=Trained)

    def __post_init__(self) -> None:
        graph = self.source.graph
        self.opset = default_opset(self.source)
        self.tensors = {t.name: t for t in graph.initializer}
        self.inputs = {i.name: i for i in graph.input if i.name not in self.tensors}
        self.outputs = {o.name for o in graph.output}
        self.made_by: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self.tensors[node.output[0]] = attribute.t
        self.alias: dict[str, str] = {}  # tensor of the file -> what its readers read now
        self.integer: dict[str, tuple[str, Parameters, onnx.NodeProto]] = {}  # result of a Q node -> what it rounds, how, and the node
        self.rounded: dict[str, Rounded] = {}  # constants
        self.stored: dict[str, tuple[str, QParams]] = {}  # float tensor -> (its rounded form, parameters)
        self.made: dict[str, np.ndarray] = {}  # new float constants

    def run(self) -> tuple[onnx.ModelProto, Trained]:
        for node in self.source.graph.node:
            if node.op_type == "QuantizeLinear":
                self.quantize(node)
            elif node.op_type == "DequantizeLinear":
                self.dequantize(node)
            else:
                self.keep(node)
        return self.finished(), self.trained

    def note(self, node: onnx.NodeProto, reason: str) -> None:
        self.trained.notes.append(f"node '{node.name or node.output[0]}' ({node.op_type}): {reason}; chosen anew")

    def array(self, name: str) -> np.ndarray | None:
        return numpy_helper.to_array(self.tensors[name]) if name in self.tensors else None

    def parameters(self, node: onnx.NodeProto) -> Parameters | None:
        """None where scale or zero point is computed when the network runs, or is no integer quantization."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        scale = self.array(node.input[1])
        zero = self.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if scale is None or (zero is None and len(node.input) > 2 and node.input[2]):
            return None
        dtype = str(zero.dtype) if zero is not None else ""
        if zero is None and node.op_type == "QuantizeLinear":
            kind = attributes.get("output_dtype", 0)
            dtype = TensorProto.DataType.Name(kind).lower() if kind else "uint8"
        elif zero is None:
            dtype = self.integer[node.input[0]][1].dtype if node.input[0] in self.integer else str(self.constant_type(node.input[0]))
        if dtype not in (*_BITS, "int32"):
            return None
        zero = np.zeros(scale.shape, np.int64) if zero is None else zero.astype(np.int64)
        return Parameters(scale.astype(np.float32), zero, dtype, int(attributes.get("axis", 1)), int(attributes.get("block_size", 0)))

    def constant_type(self, name: str) -> str:
        if name in self.rounded:
            return self.rounded[name].parameters.dtype
        if name in self.tensors:
            return str(np.dtype(helper.tensor_dtype_to_np_dtype(self.tensors[name].data_type)))
        kind = self.inputs[name].type.tensor_type.elem_type if name in self.inputs else 0
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(kind))) if kind else ""

    # -- the two nodes ------------------------------------------------------------------------------------------------------------------

    def quantize(self, node: onnx.NodeProto) -> None:
        found, x = self.parameters(node), self.alias.get(node.input[0], node.input[0])
        constant = self.made.get(x) if x in self.made else self.array(x)
        if found is None:
            return self.keep(node)
        if constant is not None and constant.dtype.kind == "f" and found.dtype in _BITS:
            self.rounded[node.output[0]] = Rounded(found.quantize(constant), found)
        elif node.output[0] in self.outputs and isinstance(params := found.of_activation(), QParams):
            self.real_output(x, node.output[0], found, params)
        else:
            self.integer[node.output[0]] = (x, found, node)
            if node.output[0] in self.outputs or any(n.op_type != "DequantizeLinear" for n in self.readers.get(node.output[0], [])):
                self.keep(node)  # someone reads the integers themselves
                params = found.of_activation()
                if isinstance(params, QParams):
                    self.trained.values.setdefault(x, params)

    def real_output(self, x: str, y: str, found: Parameters, params: QParams) -> None:
        """An output in integers is handed out as what they stand for."""
        self.trained.notes.append(f"output '{y}' is {found.dtype} in the model file; it is handed out dequantized, in float32")
        self.clip(x, y, found.range)
        self.trained.values[y] = params
        self.stored[y] = (y, params)
        self.integer[y] = (y, found, self.nodes[-1])

    def dequantize(self, node: onnx.NodeProto) -> None:
        q, y, found = node.input[0], node.output[0], self.parameters(node)
        if found is None:
            return self.keep(node)
        constant = self.array(q) if q not in self.rounded else self.rounded[q].value
        if constant is not None:
            self.rounded[y] = Rounded(constant.astype(np.int64), found)
            self.made[y] = found.dequantize(self.rounded[y].value)
        elif q in self.integer:
            x, before, _ = self.integer[q]
            if (before.scale != found.scale).any() or (before.zero_point != found.zero_point).any() or before.dtype != found.dtype:
                return self.keep_integer(node, q)
            self.pair(node, x, y, found)
        else:
            params = found.of_activation()
            if isinstance(params, QParams):
                self.trained.values[y] = params
            self.keep(node)

    def keep_integer(self, node: onnx.NodeProto, q: str) -> None:
        """A DQ that reads a Q's integers under other parameters: both stay."""
        if self.integer[q][2] not in self.nodes:
            self.keep(self.integer[q][2])
        self.keep(node)

    def pair(self, node: onnx.NodeProto, x: str, y: str, found: Parameters) -> None:
        params = found.of_activation()
        if isinstance(params, str):
            self.note(node, params)
            self.clip(x, y, found.range)
        elif x in self.stored and self.stored[x][1] == params:
            self.alias[y] = self.stored[x][0]
        elif x in self.stored:
            self.clip(self.stored[x][0], y, found.range)
            self.trained.values[y] = params
            self.stored[y] = (y, params)
        else:
            self.clip(x, y, None if self.moved(x, params) else found.range)
            held = self.alias.get(y, y)
            self.trained.values[held] = params
            self.stored[x] = self.stored[held] = (held, params)
            if held != x and x not in self.outputs:
                self.alias[x] = held  # a reader of the unrounded value reads the rounded one: there is one form of it
        if y in self.outputs and y in self.alias:
            self.emit(helper.make_node("Identity", [self.alias.pop(y)], [y]))

    def moved(self, x: str, params: QParams) -> bool:
        """Does `x` hold nothing that these parameters could clip: a network input, or elements of a value with the same parameters?"""
        maker = self.made_by.get(x)
        if maker is None or maker.op_type == "Concat":
            return True  # a concatenation's operands are requantized one by one
        if maker.op_type not in MOVES:
            return False
        before = self.trained.values.get(maker.input[0])
        return before is None or before == params

    def clip(self, x: str, y: str, bounds: tuple[float, float] | None) -> None:
        """`y` is `x` within bounds; without bounds it is `x`."""
        if bounds is None:
            self.alias[y] = x
        elif self.opset < 11:
            self.emit(helper.make_node("Clip", [x], [y], min=bounds[0], max=bounds[1]))
        else:
            names = [f"{y}~low", f"{y}~high"]
            self.made |= {n: np.array(b, np.float32) for n, b in zip(names, bounds, strict=True)}
            self.emit(helper.make_node("Clip", [x, *names], [y]))

    # -- every other node ---------------------------------------------------------------------------------------------------------------

    def keep(self, node: onnx.NodeProto) -> None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for i, name in enumerate(copy.input):
            copy.input[i] = self.alias.get(name, name)
        if copy.op_type in ("Identity", "Transpose") and copy.input[0] in self.rounded and copy.input[0] in self.made:
            return self.moved_constant(copy)
        self.emit(copy)
        if copy.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            self.weighted(copy)
        elif copy.op_type in ("Add", "Sub", "Mul"):
            self.constant_operand(copy)

    def emit(self, node: onnx.NodeProto) -> None:
        self.nodes.append(node)
        self.made_by |= dict.fromkeys(node.output, node)

    def moved_constant(self, node: onnx.NodeProto) -> None:
        """A rounded constant, transposed: still one."""
        rounded, y = self.rounded[node.input[0]], node.output[0]
        value, parameters = rounded.value, rounded.parameters
        if node.op_type == "Transpose":
            axes = next((list(a.ints) for a in node.attribute if a.name == "perm"), list(range(value.ndim))[::-1])
            value = value.transpose(axes)
            if parameters.scale.size > 1:
                parameters = replace(parameters, axis=axes.index(parameters.axis % len(axes)))
                if parameters.block:
                    parameters = replace(parameters, scale=parameters.scale.transpose(axes), zero_point=parameters.zero_point.transpose(axes))
        self.rounded[y] = Rounded(value, parameters)
        self.made[y] = parameters.dequantize(value)

    def weighted(self, node: onnx.NodeProto) -> None:
        """The weights and bias of a convolution or product, where they are stated in integers."""
        y, attributes = node.output[0], {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weight = self.rounded.get(node.input[1])
        if weight is None:
            return
        scales = weight_scales(node.op_type, attributes, weight)
        if isinstance(scales, str):
            return self.note(node, scales)
        self.trained.weights[y] = scales
        lowest = int((weight.value - _SHIFT[weight.parameters.dtype] == -128).sum())
        if lowest:
            self.trained.notes.append(f"node '{node.name or y}' ({node.op_type}): {lowest} of its weights are -128; they become -127, the least here")
        bias = self.rounded.get(node.input[2]) if len(node.input) > 2 else None
        x = self.trained.values.get(node.input[0])
        if bias is not None and x is not None and (attributes.get("alpha", 1.0), attributes.get("beta", 1.0)) == (1.0, 1.0):
            unit = np.float64(x.scale) * scales  # what a bias's scale states in float32
            stated = bias.parameters.along(bias.value.shape, bias.parameters.scale)
            if bias.value.shape == unit.shape and (unit.astype(np.float32) == stated).all() and not bias.parameters.zero_point.any():
                self.trained.biases[y] = bias.value * unit

    def constant_operand(self, node: onnx.NodeProto) -> None:
        constants = [self.rounded[i] for i in node.input if i in self.rounded]
        if len(constants) == 1:
            params = constants[0].parameters.of_activation()
            if isinstance(params, QParams):
                self.trained.constants[node.output[0]] = params
            else:
                self.note(node, f"its constant operand: {params}")

    # -- the end ------------------------------------------------------------------------------------------------------------------------

    def finished(self) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self.source)
        graph = model.graph
        for output in graph.output:
            if output.name in self.stored:
                output.type.tensor_type.elem_type = TensorProto.FLOAT
            if output.name in self.alias and output.name not in self.made_by:
                self.emit(helper.make_node("Identity", [self.alias[output.name]], [output.name]))
        used = {name for node in self.nodes for name in node.input} | self.outputs
        tensors = [t for t in graph.initializer if t.name in used]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(tensors)
        graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(v).reshape(np.shape(v)), k) for k, v in self.made.items() if k in used)
        return model


def weight_scales(op: str, attributes: dict[str, Any], weight: Rounded) -> np.ndarray | str:
    """float64 scales per output channel of a weight; or why it has none."""
    p, value = weight.parameters, weight.value
    if p.dtype not in _SHIFT:
        return f"{p.dtype} weights have no kernel"
    if p.block:
        return "weights with several scales along an output channel (blocks) have no kernel"
    if (p.zero_point != _SHIFT[p.dtype]).any():
        return "weights with a zero point have no kernel"
    axis = _WEIGHT_AXIS.get(op, value.ndim - 1)
    if op == "Gemm":
        axis = 0 if attributes.get("transB") else 1
        if attributes.get("alpha", 1.0) != 1.0:
            return "the product has a factor alpha"
    if p.scale.size > 1 and p.axis % value.ndim != axis:
        return "weights with several scales along an output channel have no kernel"
    scales = np.broadcast_to(p.scale.astype(np.float64).reshape(-1), (value.shape[axis],))
    return np.tile(scales, int(attributes.get("group", 1))) if op == "ConvTranspose" else scales.copy()
