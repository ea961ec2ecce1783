"""A whole network on the emulated GPU: every 8-bit value is the reference's, and float operators run there too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from cuda_emulated import EmulatedProgram
from onnx import TensorProto, helper
from random_nets import TARGETS, attack
from small_nets import TinyPlan, op, random_inputs, residual_net
from test_quantized_models import Net

from qcompiler.backend.lowering import lower
from qcompiler.base.targets import find_target
from qcompiler.passes import sequence
from qcompiler.passes.graph import Graph, GraphBuilder, const, substitute
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.pipeline.compile import quantize
from qcompiler.schedules.cuda.conv import GemmRow
from qcompiler.schedules.cuda.gemm_plan import Geometry, Tile
from qcompiler.schedules.table import OpCall, Row
from qcompiler.verification.interpreter import run


def network() -> tvm.IRModule:
    """`residual_net`, then float operators: a softmax, and a layer norm of its logarithm."""
    graph = Graph.of(residual_net())
    builder, env = GraphBuilder(graph.attrs), {}
    for p in graph.inputs:
        env[str(p.name)] = builder.input(str(p.name), [int(d) for d in p.ty.shape], "float32")
    for name, expr in graph.bindings:
        env[name] = builder.emit(name, substitute(expr, lambda v: env[str(v.name)]))
    soft = builder.emit("soft", op.nn.softmax(env["logits"]))
    gamma, beta = const(np.linspace(0.5, 2, 10, dtype=np.float32)), const(np.linspace(-1, 1, 10, dtype=np.float32))
    normal = builder.emit("normal", op.nn.layer_norm(builder.emit("log", op.log(soft)), gamma, beta, axes=[-1]))
    return builder.finish([("logits", env["logits"]), ("soft", soft), ("normal", normal)])


def many_blocks(row: Row, op: OpCall) -> dict[str, Any] | None:
    """Blocks share every tile of a convolution or dense layer whose reduction has two steps."""
    if not isinstance(row, GemmRow):
        return None
    tile = Tile(32, 32, 32, 16, 32, 1, 3)
    splits = [t for t in (replace(tile, split_k=n) for n in (3, 2)) if t.refuse_layer(Geometry.of(op)) is None]
    return (splits or [tile])[0].params()


@pytest.mark.parametrize(("name", "split"), [("cuda-sm80", False), ("cuda-sm80", True), ("cuda-sm75", False), ("cuda-sm75-dp4a", False)])
def test_network(name: str, split: bool, tmp_path: Path) -> None:
    module = network()
    inputs = random_inputs(module)
    integer = sequence.run(sequence.INTEGER, insert_qdq(module, TinyPlan(module, inputs)))
    wanted = run(integer, inputs, keep="all")
    program = lower(integer, find_target(name), many_blocks if split else None)
    assert sum(step.kernel.counters > 0 for step in program.steps) >= 3 * split
    assert all(step.kernel.launch for step in program.steps)
    exact = 0
    for step, value in EmulatedProgram(program, tmp_path).run(inputs):
        if step.auxiliary or step.writes not in wanted:
            continue
        if value.dtype == np.int8:
            np.testing.assert_array_equal(value, wanted[step.writes], step.writes)
            exact += 1
        else:
            np.testing.assert_allclose(value, wanted[step.writes], rtol=1e-4, atol=1e-5, err_msg=step.writes)
    rows = {step.kernel.row for step in program.steps}
    assert exact >= 15 and {"cuda/fused", "cuda/mean", f"{program.target.rows[0]}/conv2d"} <= rows, rows


@pytest.mark.parametrize("name", ["cuda-sm75-dp4a", "cuda-sm75", "cuda-sm90a"])
def test_a_file_with_weights_in_four_bits(name: str, tmp_path: Path) -> None:
    """What QuantizeLinear stores as int4, beside 8-bit activations, and as uint4 about its middle: they stay packed, and every value is the reference's."""
    net, rng, x = Net(), np.random.default_rng(0), (2, 8, 6, 5)

    def weight(shape: tuple[int, ...], kind: int, axis: int = 0) -> str:
        middle, scale = 8 * (kind == TensorProto.UINT4), rng.uniform(0.02, 0.06, shape[axis]).astype(np.float32)
        q = rng.integers(-8, 8, shape) + middle
        return net.node("DequantizeLinear", [net.tensor(q, kind), net.tensor(scale), net.tensor(np.full(shape[axis], middle), kind)], axis=axis)

    value = net.pair("x", 0.05, 120)
    first = net.pair(net.node("Relu", [net.node("Conv", [value, weight((36, 8, 1, 1), TensorProto.INT4)])]), 0.02, 0)
    second = net.pair(net.node("Conv", [first, weight((36, 36, 3, 3), TensorProto.UINT4)], pads=[1, 1, 1, 1]), 0.1, 128)
    total = net.pair(net.node("Add", [second, first]), 0.1, 128)
    flat = net.node("Flatten", [total])
    net.pair(net.node("MatMul", [flat, weight((36 * 30, 10), TensorProto.INT4, 1)]), 0.4, 128, output="y")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)]
    graph = helper.make_graph(net.nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], net.tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(tmp_path / "m.onnx"))
    module = quantize(tmp_path / "m.onnx", name).integer
    program, sample = lower(module, find_target(name)), {"x": rng.uniform(-6, 6, x).astype(np.float32)}
    rows = [step.kernel.row for step in program.steps if step.name in ("qc.conv2d", "qc.dense")]
    assert [row.endswith("-int4") for row in rows] == [True, True, name != "cuda-sm75-dp4a"], rows  # 10 outputs: dp4a rather unpacks nothing
    wanted = run(module, sample, keep="all")
    for step, got in EmulatedProgram(program, tmp_path).run(sample):
        if step.writes in wanted:
            np.testing.assert_array_equal(got, wanted[step.writes], step.writes)


def test_random_networks() -> None:
    """A few of those that `python tests/random_nets.py` makes by the hundred."""
    found = attack(range(8), TARGETS, compiled=False)
    assert not found["wrong"] + found["failed"] and found["exact"] >= 4 and found["values"] > 60, found
