"""An integer network of this compiler as an int8 LiteRT model, so that LiteRT and XNNPACK can run the same network.

Same weights, scales, zero points and bounds. Differences that the format asks for: images are NHWC at the input too; a residual addition is an
operator of its own, whose operand is rounded to the scale of the sum (to twice that before a ReLU); float outputs are dequantized from int8 with the
scale that is given. Operators: convolution, depthwise convolution, dense, addition, mean, maximum pooling, reshape, and the conversions at the edges.
Needs the package ai-edge-litert for its description of the file format.
"""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
import tvm
from ai_edge_litert import schema_py_generated as schema

from qcompiler.passes.graph import Graph, const_value, match_op, shape_of

_TYPES = {"float32": schema.TensorType.FLOAT32, "int8": schema.TensorType.INT8, "int32": schema.TensorType.INT32}
_VERSIONS = {  # the first version of an operator that takes int8, per-channel weights included
    schema.BuiltinOperator.CONV_2D: 3,
    schema.BuiltinOperator.DEPTHWISE_CONV_2D: 3,
    schema.BuiltinOperator.FULLY_CONNECTED: 4,
    **dict.fromkeys((schema.BuiltinOperator.ADD, schema.BuiltinOperator.MEAN, schema.BuiltinOperator.MAX_POOL_2D, schema.BuiltinOperator.PAD), 2),
    schema.BuiltinOperator.DEQUANTIZE: 2,
}
_NO_ACTIVATION = schema.ActivationFunctionType.NONE


def tflite_model(integer: tvm.IRModule, output_scale: float) -> bytes:
    """The file of `integer`, a module with one float32 image [1, C, H, W] as input and one float32 output.

    output_scale: of the int8 value behind the output, zero point 0. Raises ValueError for an operator that this file does not write.
    """
    return _Writer(integer, output_scale).run()


class _Writer:
    def __init__(self, integer: tvm.IRModule, output_scale: float) -> None:
        self.graph, self.output_scale = Graph.of(integer), output_scale
        self.params: dict[str, tuple[float, int]] = {k: (float(s), int(z)) for k, (s, z) in self.graph.attrs["qc.params"].items()}
        self.buffers: list[Any] = [schema.BufferT()]
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: dict[int, int] = {}
        self.indices: dict[str, int] = {}

    def run(self) -> bytes:
        (source,) = self.graph.inputs
        n, c, h, w = shape_of(source)
        self.indices[str(source.name)] = first = self.tensor(str(source.name), (n, h, w, c), "float32")
        for name, expr in self.graph.bindings:
            op = match_op(expr)
            if op is None:
                raise ValueError(f"'{name}' is a float operator; only int8 ones can be written")
            self.indices[name] = self.operator(name, expr, op[0].removeprefix("qc."), op[1], op[2])
        ((_, last),) = self.graph.outputs
        subgraph, model = schema.SubGraphT(), schema.ModelT()
        subgraph.tensors, subgraph.operators = self.tensors, self.operators
        subgraph.inputs, subgraph.outputs, subgraph.name = [first], [self.indices[str(last.name)]], "main"
        model.version, model.subgraphs, model.buffers, model.description = 3, [subgraph], self.buffers, "qcompiler"
        model.operatorCodes = []
        for code in self.codes:
            entry = schema.OperatorCodeT()
            entry.builtinCode, entry.deprecatedBuiltinCode, entry.version = code, min(code, 127), _VERSIONS.get(code, 1)
            model.operatorCodes.append(entry)
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    # -- operators ----------------------------------------------------------------------------------------------------------------------

    def operator(self, name: str, expr: Any, kind: str, args: list[Any], attrs: dict[str, Any]) -> int:
        shape = shape_of(expr)
        if kind == "quantize":
            return self.emit("QUANTIZE", [self.indices[str(args[0].name)]], self.value(name, shape), schema.QuantizeOptionsT())
        if kind == "dequantize":
            return self.emit("DEQUANTIZE", [self.indices[str(args[0].name)]], self.tensor(name, shape, "float32"), schema.DequantizeOptionsT())
        if kind in ("conv2d", "dense"):
            return self.weighted(name, shape, kind, args, attrs)
        x = self.indices[str(args[0].name)]
        if kind == "add":
            return self.add(name, shape, x, self.indices[str(args[1].name)])
        if kind == "mean":
            options = schema.ReducerOptionsT()
            options.keepDims = bool(attrs["keepdims"])
            return self.emit("MEAN", [x, self.constant(f"{name}~axes", np.array(attrs["axes"], np.int32))], self.value(name, shape), options)
        if kind == "reshape":
            options = schema.ReshapeOptionsT()
            options.newShape = list(shape)
            return self.emit("RESHAPE", [x, self.constant(f"{name}~shape", np.array(shape, np.int32))], self.value(name, shape), options)
        if kind == "max_pool2d":
            options = schema.Pool2DOptionsT()
            x = self.padded(name, x, attrs["padding"])
            options.padding, (options.strideH, options.strideW) = schema.Padding.VALID, attrs["strides"]
            (options.filterHeight, options.filterWidth), options.fusedActivationFunction = attrs["kernel"], _NO_ACTIVATION
            return self.emit("MAX_POOL_2D", [x], self.value(name, shape), options)
        raise ValueError(f"'{name}': qc.{kind} can't be written")

    def weighted(self, name: str, shape: tuple[int, ...], kind: str, args: list[Any], attrs: dict[str, Any]) -> int:
        source, weight, bias, multiplier = str(args[0].name), *(const_value(a) for a in args[1:4])
        is_float, residual = attrs["out_dtype"] == "float32", len(args) > 4
        sx, (sy, zy) = self.params[source][0], (self.output_scale, 0) if is_float else self.params[name]
        unit = 1.0 if is_float else sy * 2.0 ** -attrs.get("residual_shift", 0)
        scale = np.float64(multiplier) * unit / sx
        inner = f"{name}~product" if residual or is_float else name
        self.params[inner] = (2 * sy, 0) if residual and attrs["low"] == zy else (sy, zy)  # a product before ReLU has both signs
        x = self.indices[source]
        if kind == "conv2d":
            x = self.padded(name, x, attrs["padding"])
            depthwise = attrs["groups"] == shape[-1] > 1
            if attrs["groups"] != 1 and not depthwise:
                raise ValueError(f"'{name}': a grouped convolution can't be written")
            options = schema.DepthwiseConv2DOptionsT() if depthwise else schema.Conv2DOptionsT()
            options.padding, (options.strideH, options.strideW) = schema.Padding.VALID, attrs["strides"]
            options.dilationHFactor, options.dilationWFactor = attrs["dilation"]
            weight = weight.transpose(3, 1, 2, 0) if depthwise else weight
            if depthwise:
                options.depthMultiplier = 1
        else:
            depthwise, options = False, schema.FullyConnectedOptionsT()
        options.fusedActivationFunction = _NO_ACTIVATION
        if not residual and not is_float:
            options.fusedActivationFunction = self.activation(name, attrs, sy, zy)
        operands = [x, self.constant(f"{name}~weight", weight, scale, 3 if depthwise else 0), self.constant(f"{name}~bias", bias, scale * sx, 0)]
        code = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D" if kind == "conv2d" else "FULLY_CONNECTED"
        y = self.emit(code, operands, self.value(inner, shape), options)
        if residual:
            return self.add(name, shape, y, self.indices[str(args[4].name)], self.activation(name, attrs, sy, zy))
        return self.emit("DEQUANTIZE", [y], self.tensor(name, shape, "float32"), schema.DequantizeOptionsT()) if is_float else y

    def activation(self, name: str, attrs: dict[str, Any], scale: float, zero_point: int) -> int:
        """The activation function that clips to low and high. Raises ValueError when none does."""
        low = attrs["low"] == zero_point > -128
        if attrs["high"] < 127:
            if abs((attrs["high"] - zero_point) * scale - 6) > scale or attrs["low"] != zero_point:
                raise ValueError(f"'{name}': bounds {attrs['low']}, {attrs['high']} are no activation function")
            return int(schema.ActivationFunctionType.RELU6)
        return int(schema.ActivationFunctionType.RELU if low else _NO_ACTIVATION)

    def add(self, name: str, shape: tuple[int, ...], a: int, b: int, activation: int = _NO_ACTIVATION) -> int:
        options = schema.AddOptionsT()
        options.fusedActivationFunction = activation
        return self.emit("ADD", [a, b], self.value(name, shape), options)

    def padded(self, name: str, x: int, padding: list[int]) -> int:
        top, left, bottom, right = padding
        if not any(padding):
            return x
        n, h, w, c = self.tensors[x].shape
        amounts = np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32)
        source = self.tensors[x].name
        self.params[f"{name}~padded"] = self.params[source]
        y = self.value(f"{name}~padded", (n, h + top + bottom, w + left + right, c))
        return self.emit("PAD", [x, self.constant(f"{name}~pads", amounts)], y, schema.PadOptionsT())

    # -- the file -----------------------------------------------------------------------------------------------------------------------

    def emit(self, code: str, inputs: list[int], output: int, options: Any) -> int:
        operator, number = schema.OperatorT(), int(getattr(schema.BuiltinOperator, code))
        operator.opcodeIndex = self.codes.setdefault(number, len(self.codes))
        operator.inputs, operator.outputs, operator.builtinOptions = inputs, [output], options
        operator.builtinOptionsType = int(getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T")))
        self.operators.append(operator)
        return output

    def value(self, name: str, shape: tuple[int, ...]) -> int:
        scale, zero_point = self.params[name]
        return self.tensor(name, shape, "int8", np.array([scale]), np.array([zero_point]))

    def constant(self, name: str, data: np.ndarray, scale: np.ndarray | None = None, axis: int = 0) -> int:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
        self.buffers.append(buffer)
        zero_points = None if scale is None else np.zeros(scale.size, np.int64)
        return self.tensor(name, data.shape, str(data.dtype), scale, zero_points, axis, len(self.buffers) - 1)

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        scale: np.ndarray | None = None,
        zero_point: np.ndarray | None = None,
        axis: int = 0,
        buffer: int = 0,
    ) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, np.array(shape, np.int32), _TYPES[dtype], buffer
        if scale is not None and zero_point is not None:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale, tensor.quantization.zeroPoint = scale.astype(np.float32), zero_point.astype(np.int64)
            tensor.quantization.quantizedDimension = axis
        self.tensors.append(tensor)
        return len(self.tensors) - 1
