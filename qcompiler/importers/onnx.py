"""ONNX model -> Relax module in ONNX's own layout, one node at a time.

Values are either constants (numpy arrays) or Relax variables of static shape. A node whose operands are all constants, or that asks for a shape, is
evaluated on the spot, so shape computations vanish; the rest is converted by our table (`operators.py`), by Relax's importer, or by the operator's
definition, in that order. Each variable is named by the ONNX tensor it holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from tvm import relax

from qcompiler.base.errors import ModelError, QCompilerError, bugs_named
from qcompiler.base.value_ids import Naming
from qcompiler.importers import onnx_file
from qcompiler.importers.classical import CLASSICAL
from qcompiler.importers.classical import DOMAIN as CLASSICAL_DOMAIN
from qcompiler.importers.contributed import CONTRIBUTED
from qcompiler.importers.control import CONTROL, in_order, reads
from qcompiler.importers.frontier import few
from qcompiler.importers.nodes import RANDOM, Beyond, Node, Refused, Undefined, Value, attributes, check_finite, cut_offer, is_tensor, real
from qcompiler.importers.onnx_inputs import dense, read_inputs
from qcompiler.importers.operators import CONVERTERS, Converter
from qcompiler.importers.qdq import take_out
from qcompiler.importers.qlinear import CONTRIB
from qcompiler.importers.recurrent import RECURRENT, without_unread
from qcompiler.importers.relax_import import check_folding, check_static, convert_with_relax, defined, definition, known_to_relax, single_node_model
from qcompiler.importers.valid import check_kinds, computes
from qcompiler.numerics.spec import QParams
from qcompiler.passes.graph import GraphBuilder, const, dtype_of, relax_op, shape_of
from qcompiler.passes.sequence import IMPORTED, run
from qcompiler.passes.trained import ATTRIBUTE

_STANDARD = ("", "ai.onnx")
ADVICE = "replace it before export, or cut the model before it"
WINDOWED = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"}
_OF_ONE_MACHINE = ("com.microsoft.nchwc", "com.ms.internal.nhwc")  # images in blocks or layouts of the processor that the file was optimized on
NO_CONVERSION = f"no conversion exists for this operator; {ADVICE}"
SHOWN = 8  # reasons in one error, and the values to cut at before fewer are looked for
NAMED = 3  # refused nodes of one reason
_TABLES: dict[str, Mapping[str, Converter]] = {"": CONVERTERS, CLASSICAL_DOMAIN: CLASSICAL, CONTRIB: CONTRIBUTED}


@dataclass
class Imported:
    """A module whose inputs and outputs keep the names, order and layout of the file; `sources`: value id -> (node name, operator type)."""

    module: tvm.IRModule
    sources: dict[str, tuple[str, str]]
    fixed: dict[str, np.ndarray]


def import_onnx(
    where: str,
    model: onnx.ModelProto,
    input_shapes: Mapping[str, Sequence[int]],
    requantize: bool = False,
    input_values: Mapping[str, Any] | None = None,
) -> Imported:
    """where: what messages call the model. requantize: as in `Trained`. input_values: inputs that are the same in every call.

    Raises ModelError for whatever the model holds that can't be compiled, every node of it at once.
    """
    _check_layouts(where, model)
    naming = Naming.beside(onnx_file.names(model))
    try:
        model, trained = take_out(model, requantize)
    except Refused as reason:
        raise ModelError(f"{where}: {reason}") from reason
    without_unread(model)
    importer = _Importer(where, onnx_file.default_opset(model), trained.values)
    importer.builder = GraphBuilder(naming.attributes() | ({ATTRIBUTE: trained.attribute()} if trained else {}))
    importer.builder.reserve(name for proto in model.graph.node for name in proto.output)
    importer.constants(model.graph)
    fixed = importer.inputs(model.graph, input_shapes, input_values or {})
    importer.graph(model.graph)
    variables = {name: str(v.name) for name, v in importer.values.items() if isinstance(v, relax.Var)}
    return Imported(run(IMPORTED, importer.finish(model.graph.output), variables), importer.sources, fixed)


@dataclass
class _Importer:
    where: str
    opset: int
    stated: Mapping[str, QParams]  # how the file rounds values
    values: dict[str, Value] = field(default_factory=dict)
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)
    builder: GraphBuilder = field(default_factory=GraphBuilder)

    def fail(self, proto: onnx.NodeProto, reason: object) -> ModelError:
        return ModelError(f"{self.where}: {_spelled(proto)}: {reason}")

    # -- what the graph starts from -----------------------------------------------------------------------------------------------------

    def constants(self, graph: onnx.GraphProto, names: Mapping[str, str] | None = None) -> None:
        for tensor in [*graph.initializer, *graph.sparse_initializer]:
            sparse = isinstance(tensor, onnx.SparseTensorProto)
            name = tensor.values.name if sparse else tensor.name
            try:
                self.values[(names or {}).get(name, name)] = dense(tensor) if sparse else numpy_helper.to_array(tensor)
            except (ValueError, TypeError, KeyError, IndexError, Refused) as error:
                raise ModelError(f"{self.where}: the data of tensor '{name}' is damaged: {error}") from error

    def inputs(self, graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]], values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Declares the inputs; returns those that `values` fixes. A tensor listed as input and initializer is a constant, as since ONNX IR version 4."""
        found = read_inputs(self.where, [v for v in graph.input if v.name not in self.values], shapes, values)
        self.values.update({name: self.rounded(name, value) for name, value in found.fixed.items()})
        for port in found.ports:
            self.values[port.name] = self.builder.input(port.name, port.shape, port.dtype)
        return found.fixed

    # -- nodes --------------------------------------------------------------------------------------------------------------------------

    def graph(self, graph: onnx.GraphProto) -> None:
        """All nodes. Every node that can't be converted is named, in one error; what reads the results of such a node is left out."""
        refusals: dict[str, list[str]] = {}  # reason -> nodes
        lost: set[str] = set()
        ends, beyond = {o.name for o in graph.output}, True
        nodes = in_order(graph.node)
        for proto in nodes:
            try:
                if lost & reads(proto):
                    self.check_known(proto)
                else:
                    self.node(proto)
                    continue
            except Beyond as reason:
                refusals.setdefault(str(reason), []).append(_spelled(proto))
            except ModelError as error:
                who = _spelled(proto)
                refusals.setdefault(str(error).removeprefix(f"{self.where}: ").removeprefix(f"{who}: "), []).append(who)
                beyond &= isinstance(error.__cause__, Beyond)
            lost |= set(proto.output) - {""}
            ends |= reads(proto)
        if refusals:
            raise ModelError(f"{self.where}: {_listed(refusals)}{self.offer(ends, nodes, {v.name for v in graph.input}) if beyond else ''}")

    def offer(self, ends: Container[str], nodes: Iterable[onnx.NodeProto], inputs: Collection[str]) -> str:
        """How to compile what stands before refused nodes. ends: what those read, what is lost with them reads, and the outputs of the network."""
        made = {name: value for name, value in self.values.items() if isinstance(value, relax.Var) and name not in inputs}
        values = {name: dtype_of(value) != "bool" for name, value in made.items() if isinstance(value.ty, relax.TensorType)}
        return cut_offer(few([name for name in values if name in ends], SHOWN, nodes, values, inputs))

    def check_known(self, proto: onnx.NodeProto) -> None:
        """Raises Beyond for an operator that has no conversion, whatever its operands are."""
        domain = "" if proto.domain in _STANDARD else proto.domain
        if defined(proto.op_type, self.opset, domain):
            return
        if domain not in _TABLES or (domain == CONTRIB and proto.op_type not in CONTRIBUTED):
            raise Beyond(f"operator '{domain}::{proto.op_type}' is not one of the ONNX standard, whatever its name; {ADVICE}")
        if proto.op_type not in _TABLES[domain] and (domain or (proto.op_type not in CONTROL and not known_to_relax(proto.op_type))):
            raise Beyond(NO_CONVERSION)

    def nodes(self, nodes: Iterable[onnx.NodeProto]) -> None:
        for proto in nodes:
            self.node(proto)

    def node(self, proto: onnx.NodeProto) -> None:
        for name in proto.input:
            if name and name not in self.values:
                raise self.fail(proto, f"its operand '{name}' is computed by no node before it")
        for name in proto.output:
            if name and name in self.values:
                raise self.fail(proto, f"its result '{name}' is computed by another node too; names must be unique")
        domain = "" if proto.domain in _STANDARD else proto.domain
        inputs, node = [self.values[name] if name else None for name in proto.input], None
        try:
            if domain:
                self.check_known(proto)
            node = Node(proto.op_type, domain, self.opset, inputs, list(proto.output), attributes(proto), proto, self.builder)
            check_finite(node)
            check_kinds(node)
            results = CONTROL[node.op](self, node) if node.op in CONTROL and not domain else self.fold(node) or self.convert(node)
            if results is not None:
                self.bind(node, results)
        except Refused as reason:
            raise self.fail(proto, reason) from reason
        except QCompilerError:
            raise
        except Exception as error:
            if not isinstance(error, MemoryError) and node is not None and computes(node):  # so the file is right, and we are not
                with bugs_named(f"the conversion of {self.where}, {_spelled(proto)}", str(proto)):
                    raise
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise self.fail(proto, f"its operands or attributes contradict its definition ({type(error).__name__}: {text[-1][:120]})") from error

    def fold(self, node: Node) -> list[Value] | None:
        """The results of a node that needs no run-time value, else None."""
        if node.op in ("Shape", "Size") and node.inputs[0] is not None:
            shape = node.shape()
            if node.op == "Size":
                return [np.asarray(np.prod(shape, dtype=np.int64))]
            return [np.asarray(shape[slice(node.attrs.get("start"), node.attrs.get("end"))], np.int64)]
        if node.op in (*RANDOM, *RECURRENT) or any(v is not None and not isinstance(v, np.ndarray) for v in node.inputs):
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
        axis, rank = node.attrs.get("axis"), len(node.shape()) if node.has(0) and is_tensor(node.inputs[0]) else None
        if isinstance(axis, int) and rank is not None and not -rank - 1 <= axis <= rank + 1:  # no operator has one beyond; some definitions count up to it
            raise Refused(f"axis {axis} is out of range for a tensor of rank {rank}")
        own = _TABLES[node.domain].get(node.op) if node.domain in _TABLES else None
        refused: Refused | None = None
        try:
            results = own(node) if own else None
            if results is not None:
                return results
            if known_to_relax(node.op) and not node.domain:
                return convert_with_relax(node)
        except Undefined:
            pass
        except Refused as reason:
            refused = reason
        nodes = definition(node)
        if nodes is None:
            raise refused or Beyond(NO_CONVERSION)
        for proto in nodes:
            if not proto.name:
                proto.name = node.proto.name or node.id
        try:
            self.nodes(nodes)
        except ModelError as error:  # about a node that the file does not have
            if refused is None:
                raise
            raise refused from error
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
                if op is not None and not tvm.ir.Op.get(op).has_attr("FLegalize"):
                    raise Refused(f"TVM can't compile {op}")
                result = result.value.numpy() if hasattr(result, "value") and hasattr(result.value, "numpy") else self.builder.emit(name, result)
            if isinstance(result, relax.Expr):
                check_static(result)
                if isinstance(result.ty, relax.TensorType) and 0 in shape_of(result):
                    if node.op in WINDOWED and all(node.shape(k) and 0 not in node.shape(k) for k in range(len(node.inputs)) if node.has(k)):
                        raise Refused(f"its result is empty (shape {list(shape_of(result))}). Is the input too small for this network?")
                    self.values[name] = np.zeros(shape_of(result), dtype_of(result))  # nothing to compute: a constant like any other
                    continue
                self.sources.setdefault(str(result.name), (node.proto.name or node.id, node.op))
            self.values[name] = self.rounded(name, result) if isinstance(result, np.ndarray) else result

    def rounded(self, name: str, value: np.ndarray) -> np.ndarray:
        """A value that needs no run: as the file rounds it, where it does."""
        return self.stated[name].rounded(value) if name in self.stated else value

    # -- the end ------------------------------------------------------------------------------------------------------------------------

    def finish(self, outputs: Sequence[onnx.ValueInfoProto]) -> tvm.IRModule:
        if not outputs:
            raise ModelError(f"{self.where}: the model has no outputs")
        results = []
        for output in outputs:
            if output.name not in self.values:
                raise ModelError(f"{self.where}: output '{output.name}' is computed by no node")
            value = self.values[output.name]
            if isinstance(value, np.ndarray):
                if value.size == 0:
                    raise ModelError(f"{self.where}: output '{output.name}' is empty (shape {list(value.shape)}). Is the input too small for this network?")
                value = self.builder.emit(self.builder.fresh(output.name), const(real(value)))
            if not isinstance(value.ty, relax.TensorType):
                raise ModelError(f"{self.where}: output '{output.name}' is not a tensor; supported: tensors")
            results.append((output.name, value))
        return self.builder.finish(results)


def _check_layouts(where: str, model: onnx.ModelProto) -> None:
    """Raises ModelError for a model that ONNX Runtime optimized for one machine."""
    found = [node.domain for node in model.graph.node if node.domain in _OF_ONE_MACHINE]
    if found:
        raise ModelError(
            f"{where}: {len(found)} of its {len(model.graph.node)} nodes have images in a layout that ONNX Runtime made for the machine which it optimized the "
            f"model on ({', '.join(sorted(set(found)))}). Take the model from before, or save the optimized one at ORT_ENABLE_EXTENDED or below (session "
            "option graph_optimization_level)"
        )


def _listed(refusals: Mapping[str, Sequence[str]]) -> str:
    """Reasons, each behind the first nodes that it is of."""
    texts = []
    for reason, nodes in list(refusals.items())[:SHOWN]:
        more = f" and {len(nodes) - NAMED} nodes more" if len(nodes) > NAMED else ""
        texts.append(f"{', '.join(nodes[:NAMED])}{more}: {reason}")
    if beyond := sum(map(len, list(refusals.values())[SHOWN:])):
        texts.append(f"and {beyond} nodes more")
    return "; ".join(texts)


def _spelled(proto: onnx.NodeProto) -> str:
    name = proto.name or next((o for o in proto.output if o), "")
    return f"node '{name}' ({proto.op_type})"
