"""A TFLite file as plain data: tensors with their constants and quantization, operators with their options. Every number in the file is checked here.

The description of the format (schema.fbs) is the one that comes with LiteRT. Tables are read where they lie, and lengths are held against the size of
the file first, so that a damaged file costs no more than a whole one.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.base.errors import ModelError
from qcompiler.base.files import read_regular
from qcompiler.importers.nodes import Refused, check_bytes

DAMAGED = (struct.error, IndexError, KeyError, ValueError, TypeError, OverflowError, AttributeError)
"""What reading a flatbuffer raises whose offsets and lengths are wrong."""
LARGEST = 100_000  # operators of a model
RESOURCE = "RESOURCE"  # the type of a tensor that is a handle of a variable
_NAME = 300  # bytes of a name
_DTYPES = {
    "FLOAT32": "float32", "FLOAT16": "float16", "FLOAT64": "float64", "INT8": "int8", "UINT8": "uint8", "INT16": "int16", "UINT16": "uint16",
    "INT32": "int32", "UINT32": "uint32", "INT64": "int64", "UINT64": "uint64", "BOOL": "bool", "INT4": "int4",
    "COMPLEX64": "complex64",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tensor:
    """shape: as stored, what the file leaves open as -1; data: of a constant; scale, zero_point: float32 and int64 [1 or channels] along `axis`, where the
    tensor holds quantized integers. 4-bit integers are held as int8. variable: its value stays from call to call; a handle of such a value (`RESOURCE`) has
    that as its type."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: np.ndarray | None = None
    scale: np.ndarray | None = None
    zero_point: np.ndarray | None = None
    axis: int = 0
    variable: bool = False

    @property
    def quantized(self) -> bool:
        return self.scale is not None

    @property
    def holds(self) -> bool:
        """Does it hold numbers? A tensor without elements is a constant, and may be computed as well."""
        return self.data is not None and self.data.size > 0


@dataclass(frozen=True, eq=False)
class Operator:
    """`op`: as the schema names it; `custom`: the name of a custom operator, whose options are bytes. inputs, outputs: indices of tensors, -1 where
    left out."""

    op: str
    custom: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Any = None

    def option(self, name: str, default: Any = 0) -> Any:
        """An option as a number, a list of numbers for a vector; `default` where the operator has no options at all."""
        if self.options is None:
            return default
        if hasattr(self.options, f"{name}AsNumpy"):
            found = getattr(self.options, f"{name}AsNumpy")()
            return [] if isinstance(found, int) else [int(v) for v in found]
        return getattr(self.options, name)()

    def text(self, name: str) -> str:
        """An option that is a text, empty where it is left out."""
        return _printable(getattr(self.options, name)()) if hasattr(self.options, name) else ""


@dataclass(frozen=True, eq=False)
class State:
    """What a network keeps from call to call. port, next: tensors, an input and the output that is its next value. value: the tensor of the file that holds
    the next value after a call. initial: what it is in the first call, of the port's shape and type."""

    port: int
    next: int
    value: int
    initial: np.ndarray


@dataclass
class Network:
    """`called`: what CALL_ONCE runs, by the number of the subgraph. `states`: empty as the file is read, see `tflite_state.py`."""

    tensors: list[Tensor] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    called: dict[int, Network] = field(default_factory=dict)
    states: list[State] = field(default_factory=list)


def schema() -> Any:
    """The classes of schema.fbs. Raises ModelError where the package that has them is missing."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise ModelError("TFLite models are read with the package ai-edge-litert, which is not installed: pip install 'qcompiler[tflite]'") from error
    return schema_py_generated


def read_network(path: Path) -> tuple[Network, str]:
    """(the first subgraph of a file, sha256 hex of the file). Raises ModelError for a file that can't be read or is damaged."""
    try:
        data = read_regular(path)
    except OSError as error:
        raise ModelError(f"{path}: can't read the model: {error.strerror or error}") from error
    try:
        return _Reader(data, schema()).run(), hashlib.sha256(data).hexdigest()
    except Refused as reason:
        raise ModelError(f"{path}: {reason}") from reason
    except DAMAGED as error:
        raise ModelError(f"{path}: not a TFLite model, or damaged ({type(error).__name__}: {str(error)[:120]}). Export or download it again") from error


def named(numbers: Any) -> dict[int, str]:
    """The names of an enumeration's numbers."""
    return {number: name for name, number in vars(numbers).items() if isinstance(number, int) and not name.startswith("_")}


class _Reader:
    def __init__(self, data: bytes, schema: Any) -> None:
        self.data, self.schema = data, schema
        self.types, self.kinds, self.unions = named(schema.TensorType), named(schema.BuiltinOperator), named(schema.BuiltinOptions)

    def run(self) -> Network:
        model = self.schema.Model.GetRootAs(self.data, 0)
        codes = [self.code(model.OperatorCodes(i)) for i in range(self.length(model.OperatorCodesLength))]
        network = self.network(model, 0, codes)
        for operator in network.operators:
            if operator.op == "CALL_ONCE":
                number = operator.option("InitSubgraphIndex")
                network.called[number] = network.called.get(number) or self.network(model, number, codes)
        return network

    def network(self, model: Any, number: int, codes: list[tuple[str, str]]) -> Network:
        if not 0 <= number < self.length(model.SubgraphsLength):
            raise ValueError(f"subgraph {number} of {model.SubgraphsLength()}")
        graph, network, names = model.Subgraphs(number), Network(), set[str]()
        for i in range(self.length(graph.TensorsLength)):
            network.tensors.append(self.tensor(model, graph.Tensors(i), i, names))
        count = self.length(graph.OperatorsLength)
        if count > LARGEST:
            raise Refused(f"the model has {count} operators; at most {LARGEST} are supported")
        network.operators = [self.operator(graph.Operators(i), codes, len(network.tensors)) for i in range(count)]
        network.inputs, network.outputs = (self.indices(v, len(network.tensors), False) for v in (graph.InputsAsNumpy(), graph.OutputsAsNumpy()))
        return network

    def length(self, of: Callable[[], int]) -> int:
        """Of a vector of tables, of which each takes 4 bytes at least."""
        found = of()
        if not 0 <= found <= len(self.data) // 4:
            raise ValueError(f"a vector of {found} elements in {len(self.data)} bytes")
        return found

    def indices(self, vector: Any, count: int, optional: bool = True) -> list[int]:
        found = [] if isinstance(vector, int) else [int(v) for v in vector]
        if any(not (-1 if optional else 0) <= v < count for v in found):
            raise ValueError(f"tensor {max(found, key=abs)} of {count}")
        return found

    def code(self, code: Any) -> tuple[str, str]:
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        custom = code.CustomCode()
        return self.kinds.get(number, f"operator number {number}"), _printable(custom)

    def operator(self, operator: Any, codes: list[tuple[str, str]], count: int) -> Operator:
        op, custom = codes[operator.OpcodeIndex()]
        options, union = None, operator.BuiltinOptions()
        if union is not None and operator.BuiltinOptionsType():
            options = getattr(self.schema, self.unions[operator.BuiltinOptionsType()])()
            options.Init(union.Bytes, union.Pos)
        if op == "CUSTOM":
            stored = operator.CustomOptionsAsNumpy()
            options = b"" if isinstance(stored, int) else stored.tobytes()
        inputs, outputs = self.indices(operator.InputsAsNumpy(), count), self.indices(operator.OutputsAsNumpy(), count)
        return Operator(op, custom, tuple(inputs), tuple(outputs), options)

    # -- tensors ------------------------------------------------------------------------------------------------------------------------

    def tensor(self, model: Any, tensor: Any, index: int, names: set[str]) -> Tensor:
        name = _printable(tensor.Name()) or f"tensor_{index}"
        while name in names:  # names may repeat
            name = f"{name}_{index}"
        names.add(name)
        dtype = _DTYPES.get(self.types.get(tensor.Type(), ""), "")
        if self.types.get(tensor.Type()) == RESOURCE:
            return Tensor(name, (), RESOURCE, variable=True)
        if not dtype:
            raise Refused(f"tensor '{name}' is of type {self.types.get(tensor.Type(), tensor.Type())}; supported: {', '.join(_DTYPES.values())}")
        stored, signature = ([] if isinstance(v, int) else [int(d) for d in v] for v in (tensor.ShapeAsNumpy(), tensor.ShapeSignatureAsNumpy()))
        shape = tuple(-1 if s == -1 else d for d, s in zip(stored, signature, strict=True)) if signature else tuple(stored)
        if any(d < 0 for d in stored) or len(shape) > 8:
            raise ValueError(f"tensor '{name}' has shape {stored}")
        data = self.constant(model, tensor, name, tuple(stored), dtype)
        scale, zero, axis = self.quantization(tensor, name, shape, dtype)
        variable = bool(tensor.IsVariable())  # LiteRT passes over a value that is stored with it
        return Tensor(name, shape, "int8" if dtype == "int4" else dtype, None if variable else data, scale, zero, axis, variable)

    def constant(self, model: Any, tensor: Any, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
        buffer = model.Buffers(tensor.Buffer()) if tensor.Buffer() < self.length(model.BuffersLength) else None
        if buffer is None:
            raise ValueError(f"buffer {tensor.Buffer()} of tensor '{name}' is missing")
        outside = slice(buffer.Offset(), buffer.Offset() + buffer.Size())  # beyond the tables, in files of more than 2 GB
        raw = np.frombuffer(self.data[outside], np.uint8) if outside.start > 1 else buffer.DataAsNumpy()
        if isinstance(raw, int) or raw.size == 0:
            return np.zeros(shape, dtype) if 0 in shape else None
        check_bytes(f"tensor '{name}'", shape, 1)
        if tensor.Sparsity() is not None:
            return self.dense(tensor.Sparsity(), raw, name, shape, dtype)
        if dtype == "int4":
            low, high = (np.left_shift(raw, 4).view(np.int8) >> 4), raw.view(np.int8) >> 4
            raw, dtype = np.stack([low, high], axis=-1).reshape(-1)[: math.prod(shape)].view(np.uint8), "int8"
        if raw.size != math.prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError(f"tensor '{name}' of shape {list(shape)} and type {dtype} has {raw.size} bytes")
        return np.frombuffer(raw.tobytes(), dtype).reshape(shape)

    def quantization(self, tensor: Any, name: str, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray | None, np.ndarray | None, int]:
        found = tensor.Quantization()
        if found is None or found.ScaleIsNone() or dtype.startswith(("float", "bool", "complex")):
            return None, None, 0
        if found.DetailsType() not in (0, 1):  # 1: of custom operators
            raise Refused(f"tensor '{name}' is quantized in blocks; supported: a scale for the tensor or for each channel")
        scale = found.ScaleAsNumpy().astype(np.float32)
        zero = np.zeros(1, np.int64) if found.ZeroPointIsNone() else found.ZeroPointAsNumpy().astype(np.int64)
        axis = found.QuantizedDimension()
        if scale.size == 0:
            return None, None, 0
        if scale.size > 1 and not (0 <= axis < len(shape) and shape[axis] == scale.size):
            raise ValueError(f"tensor '{name}' of shape {list(shape)} has {scale.size} scales along axis {axis}")
        if zero.size not in (1, scale.size):
            raise ValueError(f"tensor '{name}' has {scale.size} scales and {zero.size} zero points")
        zero = np.broadcast_to(zero, scale.shape).copy()
        limits = np.iinfo("int8" if dtype == "int4" else dtype)
        if ((zero < limits.min) | (zero > limits.max)).any():
            raise ValueError(f"a zero point of tensor '{name}' is no {dtype}")
        return scale, zero, axis

    def dense(self, sparsity: Any, raw: np.ndarray, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """The whole of a sparse tensor (schema.fbs, SparsityParameters): levels of the traversal order, blocks last, dense or compressed rows."""
        order, blocks = ([] if isinstance(v, int) else [int(d) for d in v] for v in (sparsity.TraversalOrderAsNumpy(), sparsity.BlockMapAsNumpy()))
        rank = len(shape)
        if sorted(order) != list(range(rank + len(blocks))) or any(not 0 <= b < rank for b in blocks) or self.length(sparsity.DimMetadataLength) != len(order):
            raise ValueError(f"the sparsity of tensor '{name}' contradicts its shape {list(shape)}")
        values = np.frombuffer(raw.tobytes(), dtype)
        coordinates = np.zeros((1, 0), np.int64)  # of every value down to the current level
        places = np.zeros(1, np.int64)
        sizes: dict[int, int] = {}
        for level, axis in enumerate(order):
            metadata = sparsity.DimMetadata(level)
            if metadata.Format() == self.schema.DimensionType.DENSE:
                sizes[axis] = size = metadata.DenseSize()
                check_bytes(f"tensor '{name}'", (len(places), max(size, 0), level + 1))
                places = (places[:, None] * size + np.arange(size)).reshape(-1)
                along = np.tile(np.arange(size), len(coordinates))
                coordinates = np.repeat(coordinates, size, axis=0)
            else:
                segments, indices = (_vector(self.schema, *pair) for pair in _segments(metadata))
                counts = np.diff(segments)
                if len(segments) <= places.max(initial=0) + 1 or (counts < 0).any() or segments[0] != 0 or segments[-1] != len(indices):
                    raise ValueError(f"the rows of sparse tensor '{name}' contradict each other")
                counts = counts[places]
                check_bytes(f"tensor '{name}'", (int(counts.sum()), level + 1))
                starts = np.repeat(segments[places] - np.cumsum(counts) + counts, counts)
                places = starts + np.arange(int(counts.sum()))
                along = indices[places]
                coordinates = np.repeat(coordinates, counts, axis=0)
            coordinates = np.column_stack([coordinates, along])
        if len(places) != len(values):
            raise ValueError(f"sparse tensor '{name}' has {len(values)} values at {len(places)} places")
        where = np.zeros((len(values), rank), np.int64)
        for level, axis in enumerate(order):
            if axis < rank:
                where[:, axis] += coordinates[:, level] * math.prod(sizes.get(rank + b, 1) for b, of in enumerate(blocks) if of == axis)
            else:
                where[:, blocks[axis - rank]] += coordinates[:, level]
        if (where < 0).any() or (where >= np.array(shape)).any():
            raise ValueError(f"a value of sparse tensor '{name}' lies outside of its shape {list(shape)}")
        whole = np.zeros(shape, dtype)
        whole[tuple(where.T)] = values
        return whole


def _printable(text: bytes | None) -> str:
    """A name as messages and manifests can hold it."""
    return "".join(c if c.isprintable() else "_" for c in (text or b"")[:_NAME].decode("utf-8", "replace"))


def _segments(metadata: Any) -> tuple[tuple[int, Any], tuple[int, Any]]:
    return (metadata.ArraySegmentsType(), metadata.ArraySegments()), (metadata.ArrayIndicesType(), metadata.ArrayIndices())


def _vector(schema: Any, kind: int, table: Any) -> np.ndarray:
    """The numbers of a SparseIndexVector."""
    vector = getattr(schema, named(schema.SparseIndexVector)[kind])()
    vector.Init(table.Bytes, table.Pos)
    values = vector.ValuesAsNumpy()
    return np.zeros(0, np.int64) if isinstance(values, int) else values.astype(np.int64)
