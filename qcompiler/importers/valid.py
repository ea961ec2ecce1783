"""Who is to blame when a node can't be converted: the file, or us."""

from __future__ import annotations

import warnings

import numpy as np
import onnx.defs
import onnx.shape_inference
from onnx.reference import ReferenceEvaluator

from qcompiler.importers.nodes import Node
from qcompiler.importers.relax_import import check_folding, single_node_model

_SPELLED = {"float32": "float", "float64": "double"}  # types whose name in ONNX is another than numpy's


def typed(node: Node) -> bool:
    """Do the types of operands and attributes keep to the definition of the operator? numpy, and with it the reference implementation, mixes them."""
    try:
        schema = onnx.defs.get_schema(node.op, node.opset if not node.domain else 1, node.domain)
    except (onnx.defs.SchemaError, TypeError):
        return True
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    bound: dict[str, str] = {}
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        formal = schema.inputs[min(index, len(schema.inputs) - 1)] if schema.inputs else None
        if formal is None or (index >= len(schema.inputs) and formal.option != onnx.defs.OpSchema.FormalParameterOption.Variadic):
            return False
        kind = _SPELLED.get(node.dtype(index), node.dtype(index))
        if f"tensor({kind})" not in allowed.get(formal.type_str, {formal.type_str}):
            return False
        if formal.is_homogeneous and bound.setdefault(formal.type_str, kind) != kind:
            return False
    return all(a.name in schema.attributes and int(a.type) == int(schema.attributes[a.name].type) for a in node.proto.attribute)


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
