"""Writes small TFLite files, a tensor and an operator at a time, with the classes that LiteRT has for the format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

Quantization = tuple[Any, Any]  # scale and zero point, numbers or one per channel


class TfliteNet:
    """Tensors are known by their index. With `quantized`, every result that says nothing else is int8 under that scale and zero point."""

    def __init__(self, quantized: Quantization | None = None, dtype: str = "int8") -> None:
        self.quantized, self.dtype = quantized, dtype
        self.tensors: list[Any] = []
        self.buffers: list[Any] = [schema.BufferT()]
        self.operators: list[Any] = []
        self.codes: list[Any] = []
        self.inputs: list[int] = []
        self.called: list[TfliteNet] = []

    def tensor(
        self, shape: Sequence[int], dtype: str = "float32", quantization: Quantization | None = None, axis: int = 0, buffer: int = 0, name: str = ""
    ) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name or f"t{len(self.tensors)}", np.array(shape, np.int32), buffer
        tensor.type = getattr(schema.TensorType, dtype.upper())
        if quantization is not None:
            tensor.quantization = found = schema.QuantizationParametersT()
            found.scale = np.atleast_1d(np.asarray(quantization[0], np.float32))
            found.zeroPoint = np.broadcast_to(np.asarray(quantization[1], np.int64), found.scale.shape).copy()
            found.quantizedDimension = axis
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def input(self, shape: Sequence[int], dtype: str = "float32", quantization: Quantization | None = None, name: str = "") -> int:
        self.inputs.append(self.tensor(shape, dtype, quantization, name=name))
        return self.inputs[-1]

    def const(self, array: Any, quantization: Quantization | None = None, axis: int = 0) -> int:
        array = np.asarray(array)
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        self.buffers.append(buffer)
        return self.tensor(array.shape, str(array.dtype), quantization, axis, len(self.buffers) - 1)

    def variable(self, shape: Sequence[int], dtype: str = "float32", quantization: Quantization | None = None, name: str = "") -> int:
        """A tensor whose value stays from call to call, and that operators read and write."""
        index = self.tensor(shape, dtype, quantization, name=name)
        self.tensors[index].isVariable = True
        return index

    def handle(self, name: str) -> int:
        """Of the variable `name`, which READ_VARIABLE and ASSIGN_VARIABLE take."""
        result: int = self.op("VAR_HANDLE", [], (), dtype="resource", quantization=None, kind="VarHandleOptions", sharedName=name, container="")
        return result

    def first(self, **values: Any) -> None:
        """CALL_ONCE of a subgraph that gives variables their first values: arrays, or (array, quantization)."""
        inner = TfliteNet()
        inner.buffers, inner.codes = self.buffers, self.codes
        for name, value in values.items():
            array, quantization = value if isinstance(value, tuple) else (value, None)
            inner.op("ASSIGN_VARIABLE", [inner.handle(name), inner.const(array, quantization)], kind="AssignVariableOptions")
        self.called.append(inner)
        self.op("CALL_ONCE", [], kind="CallOnceOptions", initSubgraphIndex=len(self.called))

    def op(
        self,
        name: str,
        inputs: Sequence[int],
        *shapes: Sequence[int],
        dtype: str = "",
        quantization: Any = "",
        intermediates: Sequence[int] = (),
        custom: str = "",
        stored: bytes = b"",
        **options: Any,
    ) -> Any:
        """The result, or the list of them where the shapes are not one. options: fields of the operator's options as the schema names them. stored: the
        options of a custom operator."""
        quantization = self.quantized if quantization == "" else quantization
        dtype = dtype or (self.dtype if quantization is not None else "float32")
        results = [self.tensor(s, dtype, quantization) for s in shapes]
        operator, code = schema.OperatorT(), schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, name)
        code.deprecatedBuiltinCode, code.version, code.customCode = min(code.builtinCode, 127), options.pop("version", 1), custom or None
        operator.opcodeIndex, operator.inputs, operator.outputs = len(self.codes), list(inputs), results
        operator.intermediates = list(intermediates) or None
        operator.customOptions = np.frombuffer(stored, np.uint8) if stored else None
        kind = options.pop("kind", "")
        if kind:
            operator.builtinOptions = getattr(schema, f"{kind}T")()
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            for field, value in options.items():
                assert hasattr(operator.builtinOptions, field), field
                setattr(operator.builtinOptions, field, value)
        self.codes.append(code)
        self.operators.append(operator)
        return results[0] if len(results) == 1 else results

    def bytes(self, outputs: Sequence[int]) -> bytes:
        model = schema.ModelT()
        model.version, model.buffers, model.operatorCodes = 3, self.buffers, self.codes
        model.subgraphs = [net.graph(outputs if net is self else []) for net in (self, *self.called)]
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def graph(self, outputs: Sequence[int]) -> Any:
        graph = schema.SubGraphT()
        graph.tensors, graph.operators, graph.inputs, graph.outputs, graph.name = self.tensors, self.operators, self.inputs, list(outputs), "main"
        return graph

    def save(self, path: Path, outputs: Sequence[int]) -> Path:
        path.write_bytes(self.bytes(outputs))
        return path
