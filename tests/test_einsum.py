"""Einsum of two operands is a product of matrices where it is one, and means what numpy says in any case."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qcompiler.importers.model import load
from qcompiler.passes.graph import Graph, relax_op
from qcompiler.verification import interpreter

PRODUCTS = [  # equation, shapes
    ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)),
    ("bqhd,bkhd->bhqk", (2, 3, 4, 5), (2, 6, 4, 5)),
    ("bhqk,bkhd->bqhd", (2, 4, 3, 6), (2, 6, 4, 5)),
    ("...ij,kj", (2, 3, 4), (5, 4)),
    ("abc,dca->bd", (2, 3, 4), (5, 4, 2)),
    ("bsd,dhk->bshk", (2, 3, 4), (4, 5, 2)),
    ("i,i", (7,), (7,)),
    ("ab,b", (3, 4), (4,)),
    ("b...d,...db->...b", (3, 2, 4), (2, 4, 3)),
]
OTHERS = [("ij,ij->ij", (3, 4), (3, 4)), ("i,j->ij", (3,), (4,)), ("ii,i->i", (3, 3), (3,)), ("ij,k->i", (2, 3), (4,))]


@pytest.mark.parametrize(("equation", "left", "right"), PRODUCTS + OTHERS)
@pytest.mark.parametrize("constant", [False, True])
def test_einsum(equation: str, left: tuple[int, ...], right: tuple[int, ...], constant: bool) -> None:
    x, y = (np.random.default_rng(i).standard_normal(s).astype(np.float32) for i, s in enumerate((left, right)))
    wanted = np.einsum(equation, x, y)
    inputs = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, a.shape) for n, a in (("x", x), ("y", y))][: 1 if constant else 2]
    result = helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, wanted.shape)
    constants = [numpy_helper.from_array(y, "y")] if constant else []
    graph = helper.make_graph([helper.make_node("Einsum", ["x", "y"], ["z"], equation=equation)], "g", inputs, [result], constants)
    module = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)).module
    operators = {relax_op(expr) for _, expr in Graph.of(module).bindings}
    assert ("relax.matmul" in operators) == ((equation, left, right) in PRODUCTS)
    found = interpreter.run(module, {"x": x} if constant else {"x": x, "y": y})["z"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
