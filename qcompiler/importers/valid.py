"""Who is to blame when a node can't be converted: the file, or us."""

from __future__ import annotations

import warnings

import numpy as np
from onnx.reference import ReferenceEvaluator

from qcompiler.importers.nodes import Node
from qcompiler.importers.relax_import import check_folding, single_node_model


def computes(node: Node) -> bool:
    """Does the reference implementation of the ONNX standard compute the node, with operands of these types and shapes? False where it has none, and for
    what may have no end or is too large to try."""
    if node.op == "Loop":
        return False
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            feeds = {f"i{i}": v if isinstance(v, np.ndarray) else np.zeros(node.shape(i), node.dtype(i)) for i, v in enumerate(node.inputs) if v is not None}
            model = single_node_model(node)
            check_folding(model)
            del model.graph.initializer[:]
            ReferenceEvaluator(model).run(None, feeds)
    except Exception:  # whatever it raises, it does not compute the node
        return False
    return True
