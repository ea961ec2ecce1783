"""An If whose condition is computed at run time: both branches are computed, and each result is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import OnnxNet, execute

import qcompiler
from qcompiler.base.errors import ModelError
from qcompiler.importers.model import load
from qcompiler.passes.graph import Graph
from qcompiler.passes.trained import Trained


def graph(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("r",), constants: dict[str, Any] | None = None) -> onnx.GraphProto:
    tensors = [numpy_helper.from_array(np.asarray(v), name) for name, v in (constants or {}).items()]
    return helper.make_graph(list(nodes), "branch", [], [helper.make_empty_tensor_value_info(o) for o in outputs], tensors)


def chosen(net: OnnxNet, condition: str, then: onnx.GraphProto, otherwise: onnx.GraphProto, outputs: int = 1) -> Any:
    return net.op("If", condition, then_branch=then, else_branch=otherwise, outputs=outputs)


def network(path: Path) -> Path:
    """Both branches name their values alike, and read what stands around them. One If in another, constants, an input handed through, two results."""
    net, node = OnnxNet(17), helper.make_node
    x, ask = net.input("x", 1, 4), net.input("ask", 1, dtype=TensorProto.BOOL)
    weights, shift = net.weight(4, 4), net.op("Neg", x)
    large = net.op("Greater", net.op("ReduceSum", x, keepdims=0), net.const(np.float32(0)))
    inner = node(
        "If", [ask], ["t"], then_branch=graph(node("Mul", ["s", x], ["r"])), else_branch=graph(outputs=("k",), constants={"k": np.full((1, 4), 3, np.float32)})
    )
    then = graph(node("MatMul", [x, weights], ["s"]), inner, node("Add", ["t", shift], ["r"]), outputs=("r", "s"))
    two = chosen(net, large, then, graph(node("Abs", [x], ["s"]), node("Add", ["s", shift], ["r"]), outputs=("r", "s")), 2)
    kept = chosen(net, ask, graph(node("Identity", [x], ["r"])), graph(node("Exp", [x], ["r"])))
    numbers = [graph(constants={"r": np.array([n, 7], np.int64)}) for n in (1, 2)]
    same = chosen(net, ask, numbers[0], numbers[0])
    return net.save(path, [*two, kept, chosen(net, ask, *numbers), net.op("Add", same, net.op("Cast", ask, to=TensorProto.INT64))])


def test_both_branches_are_computed_and_one_is_chosen(tmp_path: Path) -> None:
    runtime, rng = pytest.importorskip("onnxruntime"), np.random.default_rng(0)
    path = network(tmp_path / "net.onnx")
    session, model = runtime.InferenceSession(str(path)), load(path)
    taken = set()
    for ask in (True, False):
        for sign in (-1, 1):
            feeds = {"x": sign * np.abs(rng.standard_normal((1, 4))).astype(np.float32), "ask": np.array([ask])}
            found = execute(model.module, feeds)
            for a, b in zip(found.values(), session.run(None, feeds), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
                assert a.dtype == b.dtype
            taken.add(tuple(np.sign(next(iter(found.values()))).ravel()))
    notes = Trained.of(Graph.of(model.module).attrs).notes
    assert len(taken) > 1 and len(notes) == 5 and all("both are computed in every call. If it depends on an input" in n for n in notes)


def test_a_cascade_becomes_a_library_that_says_so(tmp_path: Path) -> None:
    """A second network decides where the first is sure enough, as wake words do."""
    net, node = OnnxNet(17), helper.make_node
    x, weights = net.input("x", 1, 32), [net.weight(*shape, spread=0.2) for shape in ((32, 32), (32, 1), (32, 32), (32, 1))]
    score = net.op("Sigmoid", net.op("MatMul", net.op("Relu", net.op("MatMul", x, weights[0])), weights[1]))
    sure = net.op("Greater", score, net.const(np.float32(0.5)))
    second = graph(node("MatMul", [x, weights[2]], ["a"]), node("Relu", ["a"], ["b"]), node("MatMul", ["b", weights[3]], ["c"]), node("Sigmoid", ["c"], ["r"]))
    path = net.save(tmp_path / "net.onnx", [chosen(net, sure, second, graph(node("Identity", [score], ["r"])))])
    samples = [{"x": net.rng.standard_normal((1, 32)).astype(np.float32)} for _ in range(16)]
    artifact = qcompiler.compile(path, calibration=samples, preset="fast")
    assert any("(If): which branch it takes is computed at run time" in n for n in artifact.manifest["notes"])
    session, model = qcompiler.Session(artifact.save(tmp_path / "net.so")), load(path)
    for sample in samples:
        (a,), (b,) = session.run(sample).values(), execute(model.module, sample).values()
        assert abs(float(a.item() - b.item())) < 0.1


REFUSED = {
    "shapes": (
        lambda net, x, ask: chosen(net, ask, graph(helper.make_node("Transpose", [x], ["r"])), graph(helper.make_node("Neg", [x], ["r"]))),
        r"computed at run time \(from 'ask'\), so both are computed, and its result '.*' is float32 \[4, 1\] in one and float32 \[1, 4\] in the other",
    ),
    "types": (
        lambda net, x, ask: chosen(net, ask, graph(helper.make_node("Cast", [x], ["r"], to=TensorProto.INT32)), graph(helper.make_node("Neg", [x], ["r"]))),
        "is int32 .* and float32 .*supported: the same in both. If it depends on .*--input-value",
    ),
    "an operator": (
        lambda net, x, ask: chosen(net, ask, graph(helper.make_node("NonZero", [x], ["r"])), graph(helper.make_node("Neg", [x], ["r"]))),
        r"and its then branch can't be: node 'r|node .*NonZero",
    ),
    "sequences": (
        lambda net, x, ask: net.op(
            "SequenceAt", chosen(net, ask, *(graph(helper.make_node("SplitToSequence", [x], ["r"], axis=a)) for a in (0, 1))), net.const(0, "int64")
        ),
        "its result '.*' is no tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_branches_that_only_their_condition_lets_run_are_refused(tmp_path: Path, what: str) -> None:
    net = OnnxNet(17)
    make, message = REFUSED[what]
    path = net.save(tmp_path / "net.onnx", [make(net, net.input("x", 1, 4), net.input("ask", dtype=TensorProto.BOOL))])
    with pytest.raises(ModelError, match=message):
        load(path)


def test_a_division_beside_a_refused_branch_is_judged_by_itself(tmp_path: Path) -> None:
    net = OnnxNet(17)
    x, ask = net.input("x", 1, 4), net.input("ask", dtype=TensorProto.BOOL)
    n = net.input("n", 4, dtype=TensorProto.INT32)
    bad = chosen(net, ask, graph(helper.make_node("Transpose", [x], ["r"])), graph(helper.make_node("NonZero", [x], ["r"])))
    path = net.save(tmp_path / "net.onnx", [bad, net.op("Div", n, n)])
    with pytest.raises(ModelError) as error:
        load(path)
    assert "(If)" in str(error.value) and "(Div)" not in str(error.value)
