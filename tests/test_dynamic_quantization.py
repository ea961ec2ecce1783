"""Dynamically quantized models go back to the float products that they came from; what has no such form is computed as it is defined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_nets import OnnxNet
from quantized_cases import SHAPE, Graph
from recurrent_nets import feeds, network, saved
from test_partly_quantized import inputs, loss, model
from tools import require_module

import qcompiler
from qcompiler.base.errors import PlanError
from qcompiler.cli.main import main
from qcompiler.passes.graph import Graph as Module
from qcompiler.passes.graph import match_op
from qcompiler.pipeline.compile import compile_stages

RNG = np.random.default_rng(7)


def quantized(g: Graph, x: str) -> list[str]:
    names = [g.name() for _ in range(3)]
    g.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], names, name=f"node {names[0]}"))
    return names


def product(g: Graph, x: str, weight: np.ndarray, scale: np.ndarray, zero: np.ndarray | int = 0, dtype: str = "int8", form: str = "MatMulInteger") -> str:
    """As onnxruntime's quantize_dynamic writes it."""
    q, s, z = quantized(g, x)
    total = g.op(form, q, g.tensor(weight, dtype), z, g.tensor(zero, dtype))
    return g.op("Mul", g.op("Cast", total, to=TensorProto.FLOAT), g.op("Mul", s, g.tensor(scale)))


def net() -> tuple[Graph, str]:
    """Convolution, bias, product per tensor, product per column with zero points; a value read in float beside."""
    g = Graph("g")
    conv = product(g, "x", RNG.integers(0, 256, (8, 8, 1, 1)), np.float32(0.01), 128, "uint8", "ConvInteger")
    hidden = g.op("Relu", g.op("Add", conv, g.tensor(RNG.normal(size=(1, 8, 1, 1)))))
    first = product(g, hidden, RNG.integers(-127, 128, (6, 6)), np.float32(0.005))
    stream = g.op("Add", g.op("Tanh", first), hidden)
    return g, product(g, stream, RNG.integers(-100, 101, (6, 5)), RNG.uniform(0.002, 0.01, 5).astype(np.float32), RNG.integers(-20, 21, 5))


def test_products_are_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g, y = net()
    compilation, (noise,) = loss(model(g, y), tmp_path, inputs())
    assert noise < 10**-3.0
    plan = compilation.quantized.plan
    assert len(plan.scales) == 3 and not set(plan.scales) & set(plan.reasons), plan.reasons
    assert len([n for n in plan.notes if "taken back to a product of reals from" in n and "is calibrated" in n]) == 2
    assert any("(MatMul) and 1 more: taken back to a product of reals from MatMulInteger" in n for n in plan.notes)
    calls = [str(e.args[0].global_symbol) for _, e in Module.of(compilation.integer).bindings if "qc." in str(e)]
    assert calls.count("qc.conv2d") == 1 and calls.count("qc.dense") == 2
    assert main(["inspect", str(tmp_path / "m.so")]) == 0
    assert "taken back to a product of reals from ConvInteger" in capsys.readouterr().out
    np.save(tmp_path / "x.npy", np.stack([s["x"] for s in inputs()]))
    assert main(["explain", str(tmp_path / "m.onnx"), "--calibration", str(tmp_path / "x.npy")]) == 0
    assert "note: node" in (text := capsys.readouterr().out) and "MatMulInteger" in text


@pytest.mark.parametrize("unit", (0.01, 0.02))
def test_a_bias_that_is_rounded_in_every_run(unit: float, tmp_path: Path) -> None:
    """As older tools write it; under another scale than that of the sum it is no bias of the product, and the file is computed as it stands."""
    g, bias = Graph("g"), RNG.normal(size=8).astype(np.float32)
    q, s, z = quantized(g, "x")
    total = g.op("ConvInteger", q, g.tensor(RNG.integers(0, 256, (8, 8, 1, 1)), "uint8"), z, g.tensor(128, "uint8"))
    whole = g.op("Cast", g.op("Floor", g.op("Div", g.tensor(bias), g.op("Mul", s, g.tensor(np.float32(unit))))), to=TensorProto.INT32)
    total = g.op("Add", total, g.op("Reshape", whole, g.tensor(np.array([1, 8, 1, 1]), "int64")))
    y = g.op("Mul", g.op("Cast", total, to=TensorProto.FLOAT), g.op("Mul", s, g.tensor(np.float32(0.01))))
    compilation, (noise,) = loss(model(g, y), tmp_path, inputs())
    assert noise < 10**-3.0
    assert len(compilation.quantized.plan.scales) == (unit == 0.01)


def test_weights_are_the_files(tmp_path: Path) -> None:
    g, weight = Graph("g"), RNG.integers(-127, 128, (6, 5))
    onnx.save(model(g, product(g, "x", weight, np.float32(0.005))), str(tmp_path / "m.onnx"))
    plan = compile_stages(tmp_path / "m.onnx", calibration=inputs()).quantized.plan
    ((value, scales),) = (plan.weight(group) for group in plan.scales)
    np.testing.assert_array_equal(value.T, weight)
    np.testing.assert_array_equal(scales, np.full(5, np.float64(np.float32(0.005))))
    with pytest.raises(PlanError, match="calibration data is needed"):
        compile_stages(tmp_path / "m.onnx")


def test_fused_products(tmp_path: Path) -> None:
    """DynamicQuantizeMatMul and MatMulIntegerToFloat, as ONNX Runtime's optimizer writes them."""
    pytest.importorskip("onnxruntime")
    g = Graph("g")
    weight, scale, zero, bias = RNG.integers(-100, 101, (6, 5)), RNG.uniform(0.002, 0.01, 5), np.zeros(5, int), RNG.normal(size=5)
    operands = [g.tensor(weight, "int8"), g.tensor(scale), g.tensor(zero, "int8"), g.tensor(bias)]
    first = g.op("DynamicQuantizeMatMul", "x", *operands, domain="com.microsoft")
    q, s, z = quantized(g, "x")
    second = g.op("MatMulIntegerToFloat", q, operands[0], s, operands[1], z, *operands[2:], domain="com.microsoft")
    compilation, noise = loss(model(g, first, second), tmp_path, inputs())
    assert max(noise) < 1e-3 and len(compilation.quantized.plan.scales) == 2


def test_what_has_another_form_is_computed_as_defined(tmp_path: Path) -> None:
    """Integers, scale and zero point as results; a product of integers whose sums are read as such."""
    g = Graph("g")
    q, s, z = quantized(g, "x")
    flat = quantized(g, g.op("Mul", "x", g.tensor(0.0)))
    sums = g.op("MatMulInteger", q, g.tensor(RNG.integers(-100, 101, (6, 5)), "int8"), z, g.tensor(RNG.integers(-9, 9, 5), "int8"))
    plain = g.op("ConvInteger", q, g.tensor(RNG.integers(0, 200, (4, 8, 3, 3)), "uint8"), z, g.tensor(90, "uint8"), pads=[1, 1, 1, 1], strides=[2, 2])
    both = g.op("MatMulInteger", q, g.op("Transpose", q, perm=[0, 1, 3, 2]), z, z)
    results = [q, s, z, flat[0], flat[2], sums, plain, both]
    proto = model(g, *results)
    onnx.save(proto, str(tmp_path / "m.onnx"))
    session = qcompiler.load(compile_stages(tmp_path / "m.onnx", calibration=inputs()).artifact.save(tmp_path / "m.so"))
    import onnxruntime

    runtime = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for sample in inputs():
        for name, want, got in zip(results, runtime.run(None, sample), session.run(sample).values(), strict=True):
            np.testing.assert_array_equal(got, want, err_msg=name)


def test_a_network_of_integers_can_be_verified(tmp_path: Path) -> None:
    g = Graph("g")
    y = g.op("MatMulInteger", "x", g.tensor(RNG.integers(-100, 101, (6, 5)), "int8"))
    proto = model(g, y)
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    onnx.save(proto, str(tmp_path / "m.onnx"))
    data = [{"x": RNG.integers(0, 256, SHAPE).astype(np.uint8)}]
    library = compile_stages(tmp_path / "m.onnx", calibration=data).artifact.save(tmp_path / "m.so")
    report = qcompiler.verify(library, tmp_path / "m.onnx", data)
    assert report.passed and [r.metrics.sqnr_db for r in report.outputs] == [np.inf] and report.layers


@pytest.mark.parametrize("per_channel", [False, True])
def test_lstm(tmp_path: Path, per_channel: bool) -> None:
    """DynamicQuantizeLSTM, as ONNX Runtime's quantize_dynamic makes it, both directions."""
    quantization = require_module("onnxruntime.quantization", "onnxruntime")
    source = network("LSTM", direction="bidirectional")
    quantization.quantize_dynamic(str(saved(source, tmp_path)), str(tmp_path / "q.onnx"), per_channel=per_channel)
    assert "DynamicQuantizeLSTM" in {n.op_type for n in onnx.load(str(tmp_path / "q.onnx")).graph.node}
    compilation = compile_stages(tmp_path / "q.onnx", "x86-avx2", [feeds(source, s) for s in range(8)], preset="fast", requantize=True)
    imported = compilation.artifact.imported
    assert imported is not None and imported.status == "equal" and min(o.sqnr_db for o in imported.outputs) > 25, str(imported)
    assert "qc.recurrence" in {op[0] for _, e in Module.of(compilation.integer).bindings if (op := match_op(e))}
    assert any("(DynamicQuantizeLSTM): taken back to an LSTM of the reals" in note for note in compilation.quantized.plan.notes)


def test_an_lstm_beside_other_operators_on_integers(tmp_path: Path) -> None:
    """It is on integers as they are, without being asked; what the file leaves in float stays float."""
    quantization = require_module("onnxruntime.quantization", "onnxruntime")
    net = OnnxNet(seed=3)
    x = net.input("x", 6, 1, 8)
    before = net.op("MatMul", x, net.weight(8, 8))
    weights = [net.const(RNG.standard_normal(shape) * 0.4) for shape in ((1, 48, 8), (1, 48, 12), (1, 96))]
    y = net.op("LSTM", before, *weights, hidden_size=12, outputs=3)[0]
    flat = net.op("Reshape", y, net.ints(6, 12))
    source = net.save(tmp_path / "net.onnx", [net.op("MatMul", flat, net.weight(12, 4))])
    quantization.quantize_dynamic(str(source), str(tmp_path / "q.onnx"), extra_options={"DefaultTensorType": TensorProto.FLOAT})
    kinds = {n.op_type for n in onnx.load(str(tmp_path / "q.onnx")).graph.node}
    assert {"DynamicQuantizeLSTM", "MatMulInteger"} <= kinds
    data = [{"x": RNG.standard_normal((6, 1, 8)).astype(np.float32)} for _ in range(16)]
    compilation = compile_stages(tmp_path / "q.onnx", "x86-avx2", data, preset="fast")
    assert "qc.recurrence" in {op[0] for _, e in Module.of(compilation.integer).bindings if (op := match_op(e))}
    assert not [f for f in compilation.artifact.manifest["float_ops"] if f["op"] in ("LSTM", "MatMul")], compilation.artifact.manifest["float_ops"]
    library = compilation.artifact.save(tmp_path / "q.so")
    assert qcompiler.verify(library, tmp_path / "q.onnx", data, min_sqnr=20).passed
