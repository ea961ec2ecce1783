"""What an ONNX file says of its inputs, and what a user adds: whole shapes, and values that are the same in every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qcompiler.base.errors import ModelError, closest
from qcompiler.base.tensor import TensorInfo
from qcompiler.importers.nodes import Refused, check_bytes, real


@dataclass
class Inputs:
    """`ports`: what a caller feeds, in the file's order; `fixed`: inputs that a user made constants."""

    ports: list[TensorInfo] = field(default_factory=list)
    fixed: dict[str, np.ndarray] = field(default_factory=dict)


def read_inputs(where: str, declared: Sequence[onnx.ValueInfoProto], shapes: Mapping[str, Sequence[int]], values: Mapping[str, Any]) -> Inputs:
    """Static shapes and types of a graph's inputs. shapes: {input name: whole shape}; values: {input name: number, array, or text "1,2,3"}.

    Raises ModelError for a name, shape, type or value that the file doesn't allow.
    """
    names, found, bound = [v.name for v in declared], Inputs(), dict[str, int]()
    for name in [*shapes, *values]:
        if name not in names:
            raise ModelError(f"{where}: there is no input '{name}'.{closest(name, names)} Inputs: {', '.join(names) or 'none'}")
    resolved: dict[str, tuple[int, ...]] = {}
    for value in sorted(declared, key=lambda v: v.name not in shapes):  # what is given binds symbols first
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"{where}: input '{value.name}' is not a tensor; supported: tensors")
        shape = np.shape(values[value.name]) if value.name in values and value.name not in shapes else ()
        resolved[value.name] = resolve_shape(where, value, shape or shapes.get(value.name), bound)
        try:
            check_bytes(f"input '{value.name}'", resolved[value.name])
        except Refused as error:
            raise ModelError(f"{where}: {error}") from error
    for value in declared:
        dtype = _dtype(where, value)
        if value.name in values:
            found.fixed[value.name] = _fixed(where, value.name, resolved[value.name], dtype, values[value.name])
        else:
            found.ports.append(TensorInfo(value.name, resolved[value.name], dtype))
    return found


def _dtype(where: str, value: onnx.ValueInfoProto) -> str:
    """The type that a caller feeds; what the file has in fewer than 8 bits has no such type."""
    element = value.type.tensor_type.elem_type
    try:
        wanted = helper.tensor_dtype_to_np_dtype(element)
        if wanted.kind in "fiub" or wanted.name == "bfloat16":
            return str(real(np.zeros((), wanted)).dtype)
    except (Refused, KeyError):
        pass
    name = onnx.TensorProto.DataType.Name(element).lower() if element in onnx.TensorProto.DataType.values() else f"number {element}"
    raise ModelError(f"{where}: input '{value.name}' has element type {name}; supported: float16, bfloat16, float32, float64, integers of 8 to 64 bits, bool")


def _fixed(where: str, name: str, shape: tuple[int, ...], dtype: str, given: Any) -> np.ndarray:
    try:
        parts = [float(p) if "." in p or "e" in p.lower() else int(p) for p in given.split(",")] if isinstance(given, str) else given
        array = np.asarray(parts)
        cast = array.astype(dtype)
        if array.dtype.kind not in "iufb" or (not np.array_equal(cast, array) and np.dtype(dtype).kind != "f"):
            raise ValueError(f"{given} is no {dtype}")
        return np.broadcast_to(cast if cast.size > 1 else cast.reshape(()), shape).copy()
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{where}: input '{name}' is {dtype} {list(shape)}; its value can't be {given}: {error}") from error


def resolve_shape(where: str, value: onnx.ValueInfoProto, given: Sequence[int] | None, bound: dict[str, int]) -> tuple[int, ...]:
    """The static shape of an input. A symbolic first dimension is 1 unless given; `bound` collects what each symbol stands for.

    Raises ModelError when another dimension is symbolic and not given, or when what is given contradicts the file.
    """
    kind = value.type.tensor_type
    declared: list[int | str | None] | None = None
    if kind.HasField("shape"):
        declared = [int(d.dim_value) if d.HasField("dim_value") and d.dim_value >= 0 else _symbol(d.dim_param) for d in kind.shape.dim]
    hint = f"Give it with --input-shape {value.name}=... or input_shapes={{'{value.name}': (...)}}"
    if declared is None:
        if given is None:
            raise ModelError(f"{where}: input '{value.name}' has no shape. {hint}")
        return tuple(int(d) for d in given)
    spelled = "[" + ", ".join("?" if d is None else str(d) for d in declared) + "]"
    if given is not None and (len(given) != len(declared) or any(int(g) < 1 for g in given)):
        raise ModelError(f"{where}: input '{value.name}' has shape {spelled}; {list(given)} given. Supported: {len(declared)} positive numbers")
    shape: list[int] = []
    for axis, d in enumerate(declared):
        if given is not None:
            size = int(given[axis])
            if d is not None and d != 0 and bound.get(str(d), d if isinstance(d, int) else size) != size:
                raise ModelError(f"{where}: input '{value.name}' has shape {spelled}; {list(given)} given: dimension {axis} must be {bound.get(str(d), d)}")
        elif d == 0:
            raise ModelError(f"{where}: input '{value.name}' has shape {spelled}: it is empty along dimension {axis}. {hint}")
        elif isinstance(d, int):
            size = d
        elif d is not None and d in bound:
            size = bound[d]
        elif axis == 0:
            size = 1
        else:
            raise ModelError(f"{where}: dimension {axis}{f' ({d})' if d else ''} of input '{value.name}' {spelled} is symbolic. {hint}")
        if isinstance(d, str):
            bound[d] = size
        shape.append(size)
    return tuple(shape)


def _symbol(name: str) -> str | None:
    """A dimension's symbol; None for an anonymous one, as exporters spell it."""
    return None if name.strip() in ("", "?", "-1", "None") else name


def dense(sparse: onnx.SparseTensorProto) -> np.ndarray:
    """The whole of a sparse tensor. Raises ValueError, IndexError or Refused where it contradicts itself."""
    values, indices, shape = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices), [int(d) for d in sparse.dims]
    check_bytes("it", shape, values.itemsize)
    if min(shape, default=1) < 0 or values.ndim != 1 or indices.shape not in ((values.size,), (values.size, len(shape))):
        raise ValueError(f"{list(indices.shape)} indices of {list(values.shape)} values in a tensor of {shape}")
    places = tuple(indices.T) if indices.ndim == 2 else np.unravel_index(indices, shape)
    if any((p < 0).any() for p in places):
        raise ValueError("an index is negative")
    whole = np.zeros(shape, values.dtype)
    whole[places] = values
    return whole
