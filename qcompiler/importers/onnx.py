"""ONNX file -> Relax module in ONNX's own layout, one node at a time.

Values are either constants (numpy arrays) or Relax variables of static shape. A node whose operands are all constants, or that asks for a shape, is
evaluated on the spot, so shape computations vanish; the rest is converted by our table (`operators.py`), by Relax's importer, or by the operator's
definition, in that order. Each variable is named by the ONNX tensor it holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import tvm
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tvm import relax

from qcompiler.base.errors import ModelError, closest
from qcompiler.base.value_ids import Naming
from qcompiler.importers import onnx_file
from qcompiler.importers.nodes import Node, Refused, Undefined, Value, attributes, check_bytes, real
from qcompiler.importers.operators import CONVERTERS
from qcompiler.importers.qdq import take_out
from qcompiler.importers.relax_import import check_folding, check_static, convert_with_relax, definition, known_to_relax, single_node_model
from qcompiler.passes.graph import GraphBuilder, const, relax_op
from qcompiler.passes.trained import ATTRIBUTE, settled

_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
_STANDARD = ("", "ai.onnx")


@dataclass
class Imported:
    """A module whose inputs and outputs keep the names, order and layout of the file; `sources`: value id -> (node name, operator type)."""

    module: tvm.IRModule
    sources: dict[str, tuple[str, str]]
    digest: str


def import_onnx(path: Path, input_shapes: Mapping[str, Sequence[int]], requantize: bool = False) -> Imported:
    """requantize: as in `Trained`. Raises ModelError for whatever the file holds that can't be compiled."""
    model, digest = onnx_file.read(path)
    naming = Naming.beside(onnx_file.names(model))
    try:
        model, trained = take_out(model, requantize)
    except Refused as reason:
        raise ModelError(f"{path}: {reason}") from reason
    importer = _Importer(path, onnx_file.default_opset(model))
    importer.builder = GraphBuilder(naming.attributes() | ({ATTRIBUTE: trained.attribute()} if trained else {}))
    importer.builder.reserve(name for proto in model.graph.node for name in proto.output)
    importer.constants(model.graph)
    importer.inputs(model.graph, input_shapes)
    importer.check_supported(model.graph.node)
    for proto in model.graph.node:
        importer.node(proto)
    variables = {name: str(v.name) for name, v in importer.values.items() if isinstance(v, relax.Var)}
    return Imported(settled(importer.finish(model.graph.output), variables), importer.sources, digest)


def resolve_shape(where: str, value: onnx.ValueInfoProto, given: Sequence[int] | None, bound: dict[str, int]) -> tuple[int, ...]:
    """The static shape of an input. A symbolic first dimension is 1 unless given; `bound` collects what each symbol stands for.

    Raises ModelError when another dimension is symbolic and not given, or when what is given contradicts the file.
    """
    kind = value.type.tensor_type
    declared: list[int | str | None] | None = None
    if kind.HasField("shape"):
        declared = [int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else _symbol(d.dim_param) for d in kind.shape.dim]
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
            if d is not None and bound.get(str(d), d if isinstance(d, int) else size) != size:
                raise ModelError(f"{where}: input '{value.name}' has shape {spelled}; {list(given)} given: dimension {axis} must be {bound.get(str(d), d)}")
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


@dataclass
class _Importer:
    path: Path
    opset: int
    values: dict[str, Value] = field(default_factory=dict)
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)
    builder: GraphBuilder = field(default_factory=GraphBuilder)

    def fail(self, proto: onnx.NodeProto, reason: object) -> ModelError:
        return ModelError(f"{self.path}: {_spelled(proto)}: {reason}")

    # -- what the graph starts from -----------------------------------------------------------------------------------------------------

    def constants(self, graph: onnx.GraphProto, names: Mapping[str, str] | None = None) -> None:
        for tensor in graph.initializer:
            try:
                self.values[(names or {}).get(tensor.name, tensor.name)] = numpy_helper.to_array(tensor)
            except (ValueError, TypeError) as error:
                raise ModelError(f"{self.path}: the data of tensor '{tensor.name}' is damaged: {error}") from error
        for sparse in graph.sparse_initializer:
            dense = np.zeros(list(sparse.dims), numpy_helper.to_array(sparse.values).dtype)
            indices = numpy_helper.to_array(sparse.indices)
            dense[tuple(indices.T) if indices.ndim == 2 else np.unravel_index(indices, dense.shape)] = numpy_helper.to_array(sparse.values)
            self.values[sparse.values.name] = dense

    def inputs(self, graph: onnx.GraphProto, given: Mapping[str, Sequence[int]]) -> None:
        """Declares the model's inputs; a tensor listed as both input and initializer is a constant, as since ONNX IR version 4."""
        declared = [v for v in graph.input if v.name not in self.values]
        names = [v.name for v in declared]
        for name in given:
            if name not in names:
                raise ModelError(f"{self.path}: there is no input '{name}'.{closest(name, names)} Inputs: {', '.join(names) or 'none'}")
        bound: dict[str, int] = {}
        for value in sorted(declared, key=lambda v: v.name not in given):  # what is given binds symbols first
            if not value.type.HasField("tensor_type"):
                raise ModelError(f"{self.path}: input '{value.name}' is not a tensor; supported: tensors")
            self.values[value.name] = shape = resolve_shape(str(self.path), value, given.get(value.name), bound)
            try:
                check_bytes(f"input '{value.name}'", shape)
            except Refused as error:
                raise ModelError(f"{self.path}: {error}") from error
        for value in declared:
            try:
                dtype = str(real(np.zeros((), helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))).dtype)
            except (Refused, KeyError) as error:
                raise ModelError(f"{self.path}: input '{value.name}' has an element type that can't be compiled; supported: floats, integers, bool") from error
            self.values[value.name] = self.builder.input(value.name, self.values[value.name], dtype)

    def check_supported(self, nodes: Iterable[onnx.NodeProto]) -> None:
        """Names every node of an operator that nothing can convert, at once."""
        missing = [n for n in nodes if not self.convertible(n)]
        if missing:
            kinds = sorted({n.op_type if n.domain in _STANDARD else f"{n.domain}::{n.op_type}" for n in missing})
            shown = ", ".join(_spelled(n) for n in missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            advice = "Replace these operators before export, or cut the model before them"
            raise ModelError(f"{self.path}: no conversion exists for {', '.join(kinds)} ({shown}). {advice}")

    def convertible(self, proto: onnx.NodeProto) -> bool:
        if proto.op_type in CONVERTERS or known_to_relax(proto.op_type) or proto.op_type in ("If", "Constant"):
            return True
        if all(not i or isinstance(self.values.get(i), np.ndarray) for i in proto.input) and proto.op_type not in _RANDOM:
            return True
        try:
            schema = onnx.defs.get_schema(proto.op_type, self.opset, "" if proto.domain in _STANDARD else proto.domain)
        except onnx.defs.SchemaError:
            return False
        return bool(schema.has_function or schema.has_context_dependent_function) and proto.op_type not in _RANDOM

    # -- nodes --------------------------------------------------------------------------------------------------------------------------

    def node(self, proto: onnx.NodeProto) -> None:
        for name in proto.input:
            if name and name not in self.values:
                raise self.fail(proto, f"its operand '{name}' is computed by no node before it")
        for name in proto.output:
            if name and name in self.values:
                raise self.fail(proto, f"its result '{name}' is computed by another node too; names must be unique")
        domain = "" if proto.domain in _STANDARD else proto.domain
        inputs = [self.values[name] if name else None for name in proto.input]
        try:
            node = Node(proto.op_type, domain, self.opset, inputs, list(proto.output), attributes(proto), proto, self.builder)
            if proto.op_type == "If":
                return self.branch(node)
            results = self.fold(node) or self.convert(node)
            if results is not None:
                self.bind(node, results)
        except Refused as reason:
            raise self.fail(proto, reason) from reason
        except ModelError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AssertionError, ArithmeticError, MemoryError, RuntimeError, tvm.error.InternalError) as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise self.fail(proto, f"it can't be converted: {text[-1]}") from error

    def fold(self, node: Node) -> list[Value] | None:
        """The results of a node that needs no run-time value, else None."""
        if node.op in ("Shape", "Size") and node.inputs[0] is not None:
            shape = node.shape()
            if node.op == "Size":
                return [np.asarray(np.prod(shape, dtype=np.int64))]
            return [np.asarray(shape[slice(node.attrs.get("start"), node.attrs.get("end"))], np.int64)]
        if node.op in _RANDOM or any(v is not None and not isinstance(v, np.ndarray) for v in node.inputs):
            return None
        if node.op == "Loop":  # may have no end
            return None
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                model = single_node_model(node)
                check_folding(model)
                feeds = {f"i{i}": v for i, v in enumerate(node.inputs) if v is not None}
                del model.graph.initializer[:]
                results = ReferenceEvaluator(model).run(None, feeds)
        except Refused:
            raise
        except Exception:  # no reference implementation, or none for these types: convert it like any other node
            return None
        return [np.asarray(r) for r in results] if all(isinstance(r, (np.ndarray, np.generic)) for r in results) else None

    def convert(self, node: Node) -> list[Value] | None:
        """Results by our table, else by Relax's importer, else None after the nodes of the operator's definition were taken instead."""
        own = CONVERTERS.get(node.op) if node.domain == "" else None
        refused: Refused | None = None
        try:
            results = own(node) if own else None
            if results is not None:
                return results
            if known_to_relax(node.op):
                return convert_with_relax(node)
        except Undefined:
            pass
        except Refused as reason:
            refused = reason
        nodes = definition(node)
        if nodes is None:
            raise refused or Refused("there is no conversion for this operator")
        for proto in nodes:
            if not proto.name:
                proto.name = node.proto.name or node.id
            self.node(proto)
        return None

    def bind(self, node: Node, results: list[Value]) -> None:
        names = [o for o in node.outputs if o] if len(results) == sum(map(bool, node.outputs)) else node.outputs
        if len(results) < len(names):
            raise Refused(f"its conversion yields {len(results)} of {len(names)} results")
        for name, result in zip(names, results, strict=False):
            if not name:
                continue
            if isinstance(result, relax.Expr) and not isinstance(result, relax.Var):
                op = relax_op(result)
                if op is not None and op != "relax.cumsum" and not tvm.ir.Op.get(op).has_attr("FLegalize"):
                    raise Refused(f"TVM can't compile {op}")
                result = result.value.numpy() if hasattr(result, "value") and hasattr(result.value, "numpy") else self.builder.emit(name, result)
            if isinstance(result, relax.Expr):
                check_static(result)
                self.sources.setdefault(str(result.name), (node.proto.name or node.id, node.op))
            self.values[name] = result

    def branch(self, node: Node) -> None:
        """An If whose condition is known: its branch is taken in place."""
        condition = node.constant(0, "condition")
        graph: onnx.GraphProto = node.attrs["then_branch" if condition is not None and condition.all() else "else_branch"]
        outer = dict(self.values)
        local = {name for n in graph.node for name in n.output if name} | {t.name for t in graph.initializer}
        renamed = {name: self.builder.naming.made(node.id, name) for name in local if name in outer}
        self.constants(graph, renamed)
        for proto in graph.node:
            self.node(_renamed(proto, renamed))
        results = [self.values[renamed.get(v.name, v.name)] for v in graph.output]
        for name, value in zip(node.outputs, results, strict=True):
            self.values[name] = value

    # -- the end ------------------------------------------------------------------------------------------------------------------------

    def finish(self, outputs: Sequence[onnx.ValueInfoProto]) -> tvm.IRModule:
        if not outputs:
            raise ModelError(f"{self.path}: the model has no outputs")
        results = []
        for output in outputs:
            if output.name not in self.values:
                raise ModelError(f"{self.path}: output '{output.name}' is computed by no node")
            value = self.values[output.name]
            if isinstance(value, np.ndarray):
                value = self.builder.emit(self.builder.fresh(output.name), const(real(value)))
            if not isinstance(value.ty, relax.TensorType):
                raise ModelError(f"{self.path}: output '{output.name}' is not a tensor; supported: tensors")
            results.append((output.name, value))
        return self.builder.finish(results)


def _renamed(proto: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(proto)
    for tensors in (copy.input, copy.output):
        for i, name in enumerate(tensors):
            tensors[i] = names.get(name, name)
    return copy


def _spelled(proto: onnx.NodeProto) -> str:
    name = proto.name or next((o for o in proto.output if o), "")
    return f"node '{name}' ({proto.op_type})"
