"""Converts single ONNX nodes with Relax's own importer, or by the operator's definition in terms of simpler ones.

A node alone, with static operand types, is what the importer handles best: nothing is dynamic, every failure names its node, and the value of every
ONNX tensor keeps its name.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx.defs
import onnx.inliner
import onnx.shape_inference
from onnx import helper, numpy_helper
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx
from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

from qcompiler.importers.control import renamed
from qcompiler.importers.nodes import Beyond, Node, Refused, Value, check_bytes, real
from qcompiler.passes.graph import relax_op, shape_of, substitute

_READ_SEQUENCES = {"ConcatFromSequence", "SequenceAt", "SequenceErase", "SequenceInsert", "SequenceLength"}


def known_to_relax(op: str) -> bool:
    """Does Relax's importer have a converter for this operator type?"""
    return op in _get_convert_map()


def convert_with_relax(node: Node) -> list[Value]:
    """The node's outputs, converted by `tvm.relax.frontend.onnx`. Raises Refused with the importer's reason when it can't."""
    if node.op in _READ_SEQUENCES and not isinstance(getattr(node.present(0), "ty", None), relax.TupleType):
        raise Refused("its first operand is a tensor; a sequence is expected")  # the importer would go through its elements without end
    model = single_node_model(node)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = from_onnx(model, opset=node.opset, sanitize_input_names=False)
    except Exception as error:  # the importer raises whatever its converters raise
        text = str(error).strip().splitlines()
        raise Refused(f"no conversion exists for it as it stands here: {text[-1] if text else type(error).__name__}") from error
    if any(str(v.name_hint) != "main" for v in module.get_global_vars()):
        raise Refused("no conversion exists for it as it stands here: it would become loops")
    variables = {f"i{i}": v for i, v in enumerate(node.inputs) if v is not None and not isinstance(v, np.ndarray)}
    return list(_copied(node, module["main"], variables))


def single_node_model(node: Node) -> onnx.ModelProto:
    """A model of this node alone: operand k is called i<k> (constants are initializers), output k is o<k>."""
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    del proto.input[:], proto.output[:]
    inputs, initializers = [], []
    for i, value in enumerate(node.inputs):
        proto.input.append("" if value is None else f"i{i}")
        if isinstance(value, np.ndarray):
            initializers.append(numpy_helper.from_array(np.ascontiguousarray(real(value)).reshape(value.shape), f"i{i}"))
        if value is not None:
            inputs.append(helper.make_tensor_value_info(f"i{i}", helper.np_dtype_to_tensor_dtype(np.dtype(node.dtype(i))), node.shape(i)))
    proto.output.extend(f"o{i}" if name else "" for i, name in enumerate(node.outputs))
    outputs = [helper.make_empty_tensor_value_info(o) for o in proto.output if o]
    opsets = [helper.make_opsetid("", node.opset)] + ([helper.make_opsetid(node.domain, 1)] if node.domain else [])
    return helper.make_model(helper.make_graph([proto], "node", inputs, outputs, initializers), opset_imports=opsets, ir_version=8)


def check_folding(model: onnx.ModelProto) -> None:
    """Raises Refused when the results of `model`, of one node with constant operands, are larger than any value may be. Nothing is computed for it."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    small = [t for t in model.graph.initializer if math.prod(t.dims) <= 1024]  # shapes, repeats, pads, ...: what decides the size of a result
    del probe.graph.initializer[:]
    probe.graph.initializer.extend(small)
    for value in onnx.shape_inference.infer_shapes(probe, data_prop=True).graph.output:
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            check_bytes("its result", [d.dim_value for d in kind.shape.dim], 1)


def _copied(node: Node, function: Any, variables: dict[str, Any]) -> Iterator[Value]:
    """Re-emit the body of an imported function; yields what each output of the node is."""
    env: dict[Any, Any] = {p: variables[str(p.name)] for p in function.params}
    bindings = [b for block in function.body.blocks for b in block.bindings]
    result = function.body.body
    aliases = {b.var: b.value for b in bindings if isinstance(b.value, relax.Var)}
    while isinstance(result, relax.Var) and result in aliases:
        result = aliases[result]
    tuples = {b.var: b.value for b in bindings if isinstance(b.value, relax.Tuple)}
    result = tuples.get(result, result) if isinstance(result, relax.Var) else result
    results = list(result.fields) if isinstance(result, relax.Tuple) else [result]
    final = {r: name for r, name in zip(results, [o for o in node.outputs if o], strict=True) if isinstance(r, relax.Var)}
    for binding in bindings:
        if isinstance(binding.value, (relax.Tuple, relax.ShapeExpr)) and binding.var in tuples:
            continue
        expr = _in_bounds(substitute(binding.value, lambda v: env.get(v, v)))
        if isinstance(expr, relax.Var):
            env[binding.var] = expr
        elif binding.var in final:
            env[binding.var] = expr if len(results) == 1 else node.builder.emit(final[binding.var], expr)
        else:
            env[binding.var] = node.emit((relax_op(expr) or "value").rsplit(".", 1)[-1], expr)
    for r in results:
        if isinstance(r, relax.Var):
            yield env[r]
        elif hasattr(r, "value") and hasattr(r.value, "numpy"):
            yield r.value.numpy()
        else:
            yield substitute(r, lambda v: env.get(v, v))


def _in_bounds(expr: Any) -> Any:
    """A lookup with indices beyond the table reads its end; as the importer writes it, it would read foreign memory."""
    if relax_op(expr) != "relax.take" or str(expr.attrs.mode) != "fast":
        return expr
    return relax.op.take(*expr.args, axis=None if expr.attrs.axis is None else int(expr.attrs.axis), mode="clip")


def defined(op: str, opset: int, domain: str) -> Any:
    """The schema of an operator that the ONNX standard defines in terms of others; None of any other operator."""
    try:
        schema = onnx.defs.get_schema(op, opset, domain)
    except onnx.defs.SchemaError:
        return None
    return schema if schema.has_function or schema.has_context_dependent_function else None


def definition(node: Node) -> list[onnx.NodeProto] | None:
    """The nodes that define this operator in terms of others (its "function body" in the ONNX standard); None when it has none.

    Tensors of the returned nodes are called as in the source for the node's operands and results, `<id>~<name>` inside.
    """
    schema = defined(node.op, node.opset, node.domain)
    if schema is None:
        return None
    model = single_node_model(node)
    try:
        if all(model.graph.node[0].input):
            inlined = onnx.inliner.inline_selected_functions(model, [(node.domain, node.op)], inline_schema_functions=True)
        else:  # the call above asks for the types of operands that are left out
            inlined = onnx.inliner.inline_local_functions(_with_function(model, schema))
    except Exception as error:
        raise Refused("its definition, as the ONNX package has it, can't be expanded for these operands") from error
    if any(p.op_type == node.op for p in inlined.graph.node):
        return None
    names = {f"i{i}": name for i, name in enumerate(node.proto.input)} | {f"o{i}": name for i, name in enumerate(node.proto.output)}
    for name in (n for proto in inlined.graph.node for n in [*proto.input, *proto.output] if n):
        names.setdefault(name, node.builder.naming.made(node.id, name))
    return [renamed(proto, names) for proto in inlined.graph.node]


def _with_function(model: onnx.ModelProto, schema: Any) -> onnx.ModelProto:
    """The model with its one node's definition as a local function."""
    proto = model.graph.node[0]
    if schema.has_context_dependent_function:
        types = {v.name: v.type.SerializeToString() for v in model.graph.input}
        body = schema.get_context_dependent_function(proto.SerializeToString(), [types.get(name, b"") for name in proto.input])
        model.functions.append(onnx.FunctionProto.FromString(body))
    else:
        model.functions.append(schema.function_body)
    return model


def check_static(var: Any) -> None:
    """Raises Refused when a converted value is not a tensor (or a tuple of tensors) of static shape."""
    types = var.ty.fields if isinstance(var.ty, relax.TupleType) else [var.ty]
    for ty in types:
        if not isinstance(ty, relax.TensorType):
            raise Refused(f"it yields a value that is not a tensor ({ty})")
        try:
            shape = shape_of(relax.Var("probe", ty)) if ty.shape is not None else None
        except (TypeError, ValueError, AttributeError):
            shape = None
        if shape is None:
            raise Beyond("the shape of its result depends on data; supported: operators whose shapes are known when compiling")
        if any(d < 0 for d in shape):
            raise Refused(f"its result has the shape {list(shape)}. Is the input too small for this network?")
        check_bytes("its result", shape)
