"""Who is to blame when a node can't be converted: the file, or us."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import numpy as np
import onnx.defs
import onnx.shape_inference
from onnx.reference import ReferenceEvaluator

from qcompiler.importers.nodes import Node, Refused, is_tensor
from qcompiler.importers.relax_import import check_folding, single_node_model

_NUMPY = {"float": "float32", "double": "float64"}  # types whose name in ONNX is another than numpy's


def check_kinds(node: Node) -> None:
    """Raises Refused where truth values, integers and real numbers stand side by side as operands that the definition wants of one type, or where it wants
    others. Sizes don't count: a network in float16 or float64 is float32 here."""
    if (found := _mismatch(node, _sort)) is not None:
        raise Refused(f"operand {found} is of {node.dtype(found)}, which contradicts the operator's definition or its other operands")


def _sort(dtype: str) -> str:
    return next((sort for sort in ("bool", "int", "float") if sort in dtype), "other")


def typed(node: Node) -> bool:
    """Do the types of operands and attributes keep to the definition of the operator? numpy, and with it the reference implementation, mixes them."""
    if _mismatch(node, lambda dtype: dtype) is not None:
        return False
    schema = _schema(node)
    return schema is None or all(a.name in schema.attributes and int(a.type) == int(schema.attributes[a.name].type) for a in node.proto.attribute)


def _schema(node: Node) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op, node.opset if not node.domain else 1, node.domain)
    except (onnx.defs.SchemaError, TypeError):
        return None


def _mismatch(node: Node, kind: Callable[[str], str]) -> int | None:
    """The first operand whose type, told apart by `kind`, the definition does not allow there, or not beside the others. None for none."""
    schema = _schema(node)
    if schema is None:
        return None
    allowed = {c.type_param_str: {kind(_NUMPY.get(t, t)) for t in _tensors(c.allowed_type_strs)} for c in schema.type_constraints}
    bound: dict[str, str] = {}
    for index, value in enumerate(node.inputs):
        if value is None or not is_tensor(value):
            continue
        formal = schema.inputs[min(index, len(schema.inputs) - 1)] if schema.inputs else None
        if formal is None or (index >= len(schema.inputs) and formal.option != onnx.defs.OpSchema.FormalParameterOption.Variadic):
            return index
        found = kind(node.dtype(index))
        if found not in allowed.get(formal.type_str, {kind(_NUMPY.get(t, t)) for t in _tensors([formal.type_str])}):
            return index
        if formal.is_homogeneous and bound.setdefault(formal.type_str, found) != found:
            return index
    return None


def _tensors(types: Iterable[str]) -> list[str]:
    return [t.removeprefix("tensor(").removesuffix(")") for t in types if t.startswith("tensor(")]


def computes(node: Node) -> bool:
    """Does the reference implementation of the ONNX standard compute the node, with operands of these types and shapes? False where it has none, and for
    what may have no end or is too large to try."""
    if node.op == "Loop" or not typed(node):
        return False
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            feeds = {f"i{i}": v if isinstance(v, np.ndarray) else np.zeros(node.shape(i), node.dtype(i)) for i, v in enumerate(node.inputs) if v is not None}
            model = single_node_model(node)
            onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)  # numpy takes some shapes and attributes that the standard does not
            check_folding(model)
            del model.graph.initializer[:]
            ReferenceEvaluator(model).run(None, feeds)
    except Exception:  # whatever it raises, it does not compute the node
        return False
    return True
