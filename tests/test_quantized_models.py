"""Models that are quantized already: their scales, weights and biases become ours, without calibration data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tvm import relax

import qcompiler
from qcompiler.base.errors import PlanError
from qcompiler.base.value_ids import Naming
from qcompiler.calibration.data import open_samples
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.exporters.export_onnx import qdq_model
from qcompiler.importers.model import load
from qcompiler.importers.qdq import take_out
from qcompiler.numerics.spec import QParams
from qcompiler.passes.fold_constants import fold_constants
from qcompiler.passes.graph import Graph, GraphBuilder, const, const_value
from qcompiler.passes.groups import find_groups
from qcompiler.passes.trained import ATTRIBUTE, Trained
from qcompiler.pipeline.compile import compile_stages
from qcompiler.pipeline.library import Compilation
from qcompiler.plan.quant_plan import Derived, Fixed
from qcompiler.runtime import peers

RNG = np.random.default_rng(0)
X, Y = (1, 4, 6, 6), (0.05, 128)  # of the small nets: shape of their input, and its quantization (uint8)


class Net:
    """A graph written node by node; tensors are made on the way."""

    def __init__(self, opset: int = 21) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.opset = opset
        self.count = itertools.count()

    def tensor(self, array: Any, kind: int | None = None) -> str:
        name = f"t{next(self.count)}"
        array = np.asarray(array)
        self.tensors.append(numpy_helper.from_array(array, name) if kind is None else helper.make_tensor(name, kind, array.shape, array.reshape(-1).tolist()))
        return name

    def node(self, op: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        output = output or f"v{next(self.count)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"node {output}", **attributes))
        return output

    def pair(self, x: str, scale: float, zero: int, dtype: Any = np.uint8, output: str | None = None) -> str:
        """Quantize and dequantize."""
        names = [self.tensor(np.float32(scale)), self.tensor(np.array(zero, dtype))]
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [x, *names]), *names], output)

    def weight(self, shape: tuple[int, ...], axis: int = 0, dtype: Any = np.int8, zero: int = 0) -> str:
        q = RNG.integers(-100, 101, shape) + zero
        scale = RNG.uniform(0.001, 0.01, shape[axis]).astype(np.float32)
        return self.node("DequantizeLinear", [self.tensor(q.astype(dtype)), self.tensor(scale), self.tensor(np.full(shape[axis], zero, dtype))], axis=axis)

    def model(self, output: str, out_type: int = TensorProto.FLOAT, in_type: int = TensorProto.FLOAT) -> onnx.ModelProto:
        ports = [helper.make_tensor_value_info("x", in_type, X)], [helper.make_tensor_value_info(output, out_type, None)]
        graph = helper.make_graph(self.nodes, "g", *ports, self.tensors)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def compiled(model: onnx.ModelProto, folder: Path, calibration: Any = None, **options: Any) -> tuple[Compilation, Any]:
    """The compilation, and a function of one input array."""
    onnx.save(model, str(folder / "m.onnx"))
    compilation = compile_stages(folder / "m.onnx", calibration=calibration, **options)
    session = qcompiler.load(compilation.artifact.save(folder / "m.so"))
    return compilation, lambda x: next(iter(session.run({"x": x}).values()))


def samples(count: int = 4) -> list[np.ndarray]:
    return [np.random.default_rng(i).uniform(-6, 6, X).astype(np.float32) for i in range(count)]


def check(net: Net, output: str, folder: Path, step: float, unequal: float = 0.02) -> Compilation:
    """Compile without data; every output is within one step of what the file computes, all but a fraction are equal."""
    model = net.model(output)
    compilation, run = compiled(model, folder)
    reference = ReferenceEvaluator(model)
    different = 0.0
    for x in samples():
        want, got = reference.run(None, {"x": x})[0], run(x)
        assert np.abs(want).max() > 2 * step
        np.testing.assert_allclose(got, want, rtol=0, atol=1.01 * step)
        different += float((np.abs(got - want) > 0.01 * step).mean()) / 4
    assert different < unequal
    assert not compilation.quantized.plan.notes
    assert not compilation.artifact.manifest["float_ops"]
    return compilation


def test_our_own_export_comes_back_bit_for_bit(tmp_path: Path) -> None:
    calibration, evaluation, _ = demo_data()
    first = compile_stages(MODEL, calibration=calibration[:8])
    (tmp_path / "q.onnx").write_bytes(qdq_model(onnx.load(str(MODEL)), first).model.SerializeToString())
    second = compile_stages(tmp_path / "q.onnx")
    digests = [c.artifact.manifest["digests"]["constants"] for c in (first, second)]
    assert digests[0] == digests[1]
    sessions = [qcompiler.load(c.artifact.save(tmp_path / f"{i}.so")) for i, c in enumerate((first, second))]
    for sample in evaluation[:20]:
        outputs = [s.run(sample) for s in sessions]
        for name, value in outputs[0].items():
            np.testing.assert_array_equal(outputs[1][name], value)
    assert second.artifact.manifest["calibration_samples"] == 0
    again = compile_stages(tmp_path / "q.onnx", calibration=calibration[:8])
    assert again.artifact.manifest["digests"]["constants"] == digests[0], "neither bias correction nor rounding may touch a trained model"
    assert again.quantized.plan.digest != first.quantized.plan.digest  # stated, not chosen


def test_a_model_that_onnxruntime_quantized(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    calibration, evaluation, _ = demo_data()
    float_model = load(MODEL)
    path = peers.onnxruntime_int8(MODEL, open_samples(calibration[:20], float_model.inputs), tmp_path)
    compilation = compile_stages(path)
    assert not compilation.artifact.manifest["float_ops"]
    plan, file = compilation.quantized.plan, onnx.load(str(path))
    tensors = {t.name: numpy_helper.to_array(t) for t in file.graph.initializer}
    stated = {n.input[1]: (float(tensors[n.input[1]]), int(tensors[n.input[2]]) - 128) for n in file.graph.node if n.op_type == "QuantizeLinear"}
    fixed = [e for e in plan.edges.values() if isinstance(e, Fixed)]
    assert {(e.params.scale, e.params.zero_point) for e in fixed} == set(stated.values())
    assert all(isinstance(e, (Fixed, Derived)) for e in plan.edges.values())
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # its fused 8-bit kernels saturate on AVX2
    reference = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session = qcompiler.load(compilation.artifact.save(tmp_path / "q.so"))
    step = plan.params("logits").scale
    for sample in evaluation[:30]:
        want, got = reference.run(None, sample)[0], next(iter(session.run(sample).values()))
        assert np.abs(got - want).max() <= 1.01 * step
        assert got.argmax() == want.argmax()
    assert "stated in the model file" in plan.explain(find_groups(compilation.quantized.model.module))


def test_saturation_is_kept_where_it_replaces_a_relu(tmp_path: Path) -> None:
    net = Net()
    conv = net.node("Conv", [net.pair("x", *Y), net.weight((8, 4, 3, 3))])
    first = net.pair(conv, 0.04, 0)
    net.pair(net.node("Conv", [first, net.weight((8, 8, 1, 1))]), 0.05, 100, output="y")
    compilation = check(net, "y", tmp_path, 0.05)
    model = compilation.quantized.model
    assert [(g.kind, g.low) for g in find_groups(model.module) if g.id == first] == [("conv2d", 0.0)]
    assert compilation.quantized.plan.params(first) == QParams(float(np.float32(0.04)), -128)


def test_rounding_points_of_the_model_are_kept(tmp_path: Path) -> None:
    """A sum of two rounded convolutions is no fused residual, and a ReLU behind a rounding is an operator of its own."""
    net = Net()
    x = net.pair("x", *Y)
    a = net.pair(net.node("Conv", [x, net.weight((8, 4, 1, 1))]), 0.03, 128)
    b = net.pair(net.node("Conv", [x, net.weight((8, 4, 1, 1))]), 0.02, 120)
    total = net.pair(net.node("Add", [a, b]), 0.053, 110)
    net.pair(net.node("Relu", [total]), 0.061, 0, output="y")
    compilation = check(net, "y", tmp_path, 0.061)
    kinds = [g.kind for g in find_groups(compilation.quantized.model.module)]
    assert [kinds.count(k) for k in ("conv2d", "add", "unary")] == [2, 1, 1]


def test_moved_data_and_concatenations(tmp_path: Path) -> None:
    net = Net()
    x = net.pair("x", *Y)
    a = net.pair(net.node("Conv", [x, net.weight((8, 4, 1, 1))]), 0.05, 128)
    pooled = net.pair(net.node("MaxPool", [a], kernel_shape=[2, 2], strides=[2, 2]), 0.05, 128)
    b = net.pair(net.node("Conv", [x, net.weight((8, 4, 2, 2))], strides=[2, 2]), 0.04, 100)
    joined = net.pair(net.node("Concat", [pooled, b], axis=1), 0.06, 120)
    factors = net.tensor(RNG.integers(-100, 101, (16, 1, 1)).astype(np.int8))
    factors = net.node("DequantizeLinear", [factors, net.tensor(np.float32(0.01)), net.tensor(np.int8(3))])
    net.pair(net.node("Mul", [joined, factors]), 0.1, 127, output="y")
    compilation = check(net, "y", tmp_path, 0.1, unequal=0.08)  # 0.05 to 0.06: every sixth number is a tie, which float32 noise decides
    assert list(compilation.quantized.plan.constants.values()) == [QParams(float(np.float32(0.01)), 3)]


@pytest.mark.parametrize("op", ["Gemm", "MatMul", "ConvTranspose"])
def test_other_products(op: str, tmp_path: Path) -> None:
    net = Net()
    x = net.pair("x", 0.05, 3, np.int8)
    if op == "ConvTranspose":
        y = net.node(op, [x, net.weight((4, 6, 2, 2), axis=1)], strides=[2, 2])
    else:
        flat = net.node("Flatten", [x])
        y = net.node(op, [flat, net.weight((10, 144)) if op == "Gemm" else net.weight((144, 10), axis=1)], **({"transB": 1} if op == "Gemm" else {}))
    net.pair(y, 0.1, -5, np.int8, output="y")
    check(net, "y", tmp_path, 0.1)


def test_weights_rounded_in_the_graph_and_large_biases(tmp_path: Path) -> None:
    """A float weight between both nodes, a bias beyond float32's 24 bits."""
    net = Net()
    names = [net.tensor(np.array([2.0**-7, 2.0**-6, 0.01, 0.02], np.float32)), net.tensor(np.zeros(4, np.int8))]
    weight = net.node("QuantizeLinear", [net.tensor(RNG.standard_normal((4, 4, 1, 1)).astype(np.float32)), *names], axis=0)
    weight = net.node("DequantizeLinear", [weight, *names], axis=0)
    unit = np.float32(0.05) * np.array([2.0**-7, 2.0**-6, 0.01, 0.02], np.float32)
    bias = np.array([2**27 + 1, -5, 7, 2**26 + 3], np.int32)
    y = net.node("Conv", [net.pair("x", *Y), weight, net.node("DequantizeLinear", [net.tensor(bias), net.tensor(unit)], axis=0)], output="y")
    compilation, _ = compiled(net.model(y), tmp_path)
    (call,) = [e for n, e in Graph.of(compilation.integer).bindings if n == "y" or "qc.conv2d" in str(e)][:1]
    np.testing.assert_array_equal(call.args[3].value.numpy(), bias)
    assert not compilation.quantized.plan.notes


def test_integers_at_the_networks_ends(tmp_path: Path) -> None:
    net = Net()
    ends = [net.tensor(np.float32(0.05)), net.tensor(np.uint8(128))], [net.tensor(np.float32(0.1)), net.tensor(np.int8(4))]
    conv = net.node("Conv", [net.node("DequantizeLinear", ["x", *ends[0]]), net.weight((8, 4, 1, 1))])
    model = net.model(net.node("QuantizeLinear", [conv, *ends[1]], output="y"), TensorProto.INT8, TensorProto.UINT8)
    compilation, run = compiled(model, tmp_path)
    for x in samples():
        q = np.clip(np.rint(x / 0.05) + 128, 0, 255).astype(np.uint8)
        want, got = ReferenceEvaluator(model).run(None, {"x": q})[0], run(q)
        assert got.dtype == want.dtype == np.int8
        off = np.abs(got.astype(int) - want)
        assert off.max() <= 1 and (off == 0).mean() > 0.98
    assert "qc.conv2d" in str(compilation.integer)


def test_operators_on_integers(tmp_path: Path) -> None:
    """QLinearConv, pooling of integers, QLinearMatMul: the same as pairs around float operators."""
    net = Net()
    s = [net.tensor(np.float32(v)) for v in (0.05, 0.04, 0.1)]
    z = [net.tensor(np.uint8(v)) for v in (128, 0, 120)]
    w, ws, wz = net.tensor(RNG.integers(-100, 101, (8, 4, 3, 3)).astype(np.int8)), net.tensor(np.full(8, 0.004, np.float32)), net.tensor(np.zeros(8, np.int8))
    bias = net.tensor(RNG.integers(-3000, 3000, 8).astype(np.int32))
    conv = net.node("QLinearConv", [net.node("QuantizeLinear", ["x", s[0], z[0]]), s[0], z[0], w, ws, wz, s[1], z[1], bias], "conv")
    flat = net.node("Flatten", [net.node("MaxPool", [conv], "pooled", kernel_shape=[2, 2], strides=[2, 2])])
    dense = [net.tensor(RNG.integers(-100, 101, (32, 10)).astype(np.int8)), net.tensor(np.float32(0.01)), net.tensor(np.int8(0))]
    product = net.node("QLinearMatMul", [flat, s[1], z[1], *dense, s[2], z[2]], "product")
    net.node("DequantizeLinear", [product, s[2], z[2]], "y")
    compilation = check(net, "y", tmp_path, 0.1)
    assert compilation.quantized.plan.params("conv") == QParams(float(np.float32(0.04)), -128)


def test_contrib_operators_on_integers() -> None:
    """Against their definition: what `expand` writes, run in float."""
    from qcompiler.importers.qlinear import expand

    net = Net()
    s, z = [net.tensor(np.float32(v)) for v in (0.05, 0.03, 0.06)], [net.tensor(np.uint8(v)) for v in (128, 100, 90)]
    x = net.node("QuantizeLinear", ["x", s[0], z[0]])
    act = net.node("QLinearSigmoid", [x, s[0], z[0], s[1], z[1]], domain="com.microsoft")
    total = net.node("QLinearAdd", [x, s[0], z[0], act, s[1], z[1], s[2], z[2]], domain="com.microsoft")
    pooled = net.node("QLinearGlobalAveragePool", [total, s[2], z[2], s[1], z[1]], channels_last=0, domain="com.microsoft")
    net.node("DequantizeLinear", [pooled, s[1], z[1]], "y")
    expanded = expand(net.model("y"), Naming())
    assert not {n.op_type for n in expanded.graph.node} - {"QuantizeLinear", "DequantizeLinear", "Sigmoid", "Add", "GlobalAveragePool"}

    def rounded(real: np.ndarray, scale: float, zero: int) -> np.ndarray:
        return (np.clip(np.rint(real / np.float32(scale)) + zero, 0, 255) - zero) * np.float32(scale)

    value = samples()[0]
    a = rounded(value, 0.05, 128)
    b = rounded(a + rounded(1 / (1 + np.exp(-a)), 0.03, 100), 0.06, 90)
    want = rounded(b.mean((2, 3), keepdims=True), 0.03, 100)
    np.testing.assert_allclose(ReferenceEvaluator(expanded).run(None, {"x": value})[0], want, atol=0.031)


def broken(kind: str) -> tuple[Net, str]:
    """A net with something that int8 kernels can't say, and the words that say so."""
    net = Net()
    x = net.pair("x", *Y)
    if kind == "int16 activation":
        net.node("Conv", [net.pair("x", 0.001, 0, np.int16), net.weight((8, 4, 1, 1))])
        return net, "int16 activations have no int8 kernel; rounded in float32, as the file says"
    if kind == "channels":
        names = [net.tensor(np.linspace(0.04, 0.05, 4).astype(np.float32)), net.tensor(np.full(4, 128, np.uint8))]
        q = net.node("QuantizeLinear", ["x", *names], axis=1)
        net.node("Conv", [net.node("DequantizeLinear", [q, *names], axis=1), net.weight((8, 4, 1, 1))])
        return net, "an activation has one scale in int8 kernels"
    if kind == "zero point":
        q = net.tensor(np.linspace(0, 255, 8).astype(np.uint8).reshape(8, 1, 1, 1))
        net.node("Conv", [x, net.node("DequantizeLinear", [q, net.tensor(np.float32(0.01)), net.tensor(np.uint8(100))])], group=4)
        return net, "weights of uint8 farther than 128 steps from their zero point have no int8 kernel; they are quantized anew"
    if kind == "blocks":
        q = net.tensor(RNG.integers(-100, 101, (10, 144)).astype(np.int8))
        scales = net.tensor(RNG.uniform(0.005, 0.01, (10, 3)).astype(np.float32))
        w = net.node("DequantizeLinear", [q, scales, net.tensor(np.zeros((10, 3), np.int8))], axis=1, block_size=48)
        net.node("Gemm", [net.node("Flatten", [x]), w], transB=1)
        return net, "several scales along an output channel have no int8 kernel; they are quantized anew"
    if kind == "lowest":
        q = net.tensor(np.full((8, 4, 1, 1), -128, np.int8))
        net.node("Conv", [x, net.node("DequantizeLinear", [q, net.tensor(np.float32(0.01)), net.tensor(np.int8(0))])])
        return net, "32 of its weights are -128; they become -127"
    zero = 128 if kind == "shifted" else 120  # the same as int8, or within reach of it: nothing to say
    assert net.node("Conv", [x, net.weight((8, 4, 1, 1), dtype=np.uint8, zero=zero)])
    return net, ""


@pytest.mark.parametrize("kind", ["int16 activation", "channels", "zero point", "blocks", "lowest", "shifted", "near"])
def test_what_cannot_be_honoured_is_said(kind: str, tmp_path: Path) -> None:
    net, reason = broken(kind)
    model = net.model(net.nodes[-1].output[0])
    compilation, run = compiled(model, tmp_path)
    notes = "\n".join(compilation.quantized.plan.notes)
    assert bool(notes) == bool(reason)
    assert reason in notes
    assert compilation.artifact.manifest["notes"] == compilation.quantized.plan.notes
    for x in samples(2):
        want, got = ReferenceEvaluator(model).run(None, {"x": x})[0], run(x)
        assert ((got - want) ** 2).sum() < 1e-3 * (want**2).sum()


def test_int4_weights_keep_their_scales(tmp_path: Path) -> None:
    net = Net()
    q = RNG.integers(-8, 8, (8, 4, 1, 1))
    scale = RNG.uniform(0.05, 0.1, 8).astype(np.float32)
    weight = net.node("DequantizeLinear", [net.tensor(q, TensorProto.INT4), net.tensor(scale), net.tensor(np.zeros(8, int), TensorProto.INT4)], axis=0)
    net.pair(net.node("Conv", [net.pair("x", *Y), weight]), 0.05, 128, output="y")
    compilation = check(net, "y", tmp_path, 0.05)
    (group,) = [g for g in find_groups(compilation.quantized.model.module) if g.kind == "conv2d"]
    value, scales = compilation.quantized.plan.weight(group.id)
    np.testing.assert_array_equal(value.transpose(0, 3, 1, 2), q)
    np.testing.assert_array_equal(scales, scale.astype(np.float64))


def test_missing_ranges_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only who asks for more than the file says needs data."""
    net = Net()
    middle = net.node("Conv", [net.pair("x", *Y), net.weight((8, 4, 1, 1))], "middle")
    net.node("Conv", [middle, net.weight((8, 8, 1, 1))], "y")
    model = net.model("y")
    compilation, _ = compiled(model, tmp_path)
    assert compilation.quantized.plan.params("middle") is None
    assert compilation.quantized.plan.reasons["y"] == "the model file leaves it in float"
    with pytest.raises(PlanError, match="calibration data is needed: the model file states no ranges for 'middle'"):
        compiled(model, tmp_path, requantize=True)
    assert main(["compile", str(tmp_path / "m.onnx"), "--requantize", "--output", str(tmp_path / "out.so")]) == 2
    assert "states no ranges for 'middle'" in capsys.readouterr().err
    assert not (tmp_path / "out.so").exists()
    compilation, _ = compiled(model, tmp_path, calibration=[{"x": x} for x in samples()], requantize=True)
    assert compilation.quantized.plan.params("middle") is not None


def test_command_line_needs_no_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = Net()
    net.pair(net.node("Conv", [net.pair("x", *Y), net.weight((8, 4, 1, 1))]), 0.05, 128, output="y")
    onnx.save(net.model("y"), str(tmp_path / "m.onnx"))
    assert main(["explain", str(tmp_path / "m.onnx")]) == 0
    assert "stated in the model file" in capsys.readouterr().out
    assert main(["compile", str(tmp_path / "m.onnx"), "--output", str(tmp_path / "out.so")]) == 0
    assert (tmp_path / "out.so").is_file()


def test_float_models_are_untouched() -> None:
    model = onnx.load(str(MODEL))
    rewritten, trained = take_out(model)
    assert rewritten is model and not trained
    assert not Trained.of(Graph.of(load(MODEL).module).attrs)


def rounded_silu(net: Net, x: str) -> str:
    return net.node("Mul", [x, net.pair(net.node("Sigmoid", [x]), 1 / 256, 0)])


def rounded_gelu(net: Net, x: str) -> str:
    inner = net.pair(net.node("Div", [x, net.tensor(np.float32(2**0.5))]), 0.03, 128)
    erf = net.pair(net.node("Erf", [inner]), 1 / 128, 128)
    gate = net.pair(net.node("Add", [erf, net.tensor(np.float32(1))]), 1 / 128, 0)
    return net.node("Mul", [net.pair(net.node("Mul", [x, gate]), 0.06, 20), net.tensor(np.float32(0.5))])


def rounded_hard_swish(net: Net, x: str) -> str:
    shifted = net.pair(net.node("Add", [x, net.tensor(np.float32(3))]), 0.05, 80)
    gate = net.pair(net.node("Clip", [shifted, net.tensor(np.float32(0)), net.tensor(np.float32(6))]), 6 / 255, 0)
    return net.node("Div", [net.pair(net.node("Mul", [x, gate]), 0.16, 30), net.tensor(np.float32(6))])


def rounded_prelu(net: Net, x: str) -> str:
    negative = net.pair(net.node("Relu", [net.pair(net.node("Neg", [x]), 0.05, 128)]), 0.025, 0)
    scaled = net.pair(net.node("Mul", [negative, net.tensor(np.linspace(-0.5, 0.5, 8, dtype=np.float32).reshape(8, 1, 1))]), 0.011, 128)
    return net.node("Add", [net.pair(net.node("Relu", [x]), 0.026, 0), scaled])


@pytest.mark.parametrize("make", [rounded_silu, rounded_gelu, rounded_hard_swish, rounded_prelu])
def test_roundings_inside_of_spelled_out_activations_are_kept(make: Callable[[Net, str], str], tmp_path: Path) -> None:
    net = Net()
    x = net.pair(net.node("Conv", [net.pair("x", *Y), net.weight((8, 4, 1, 1))]), 0.04, 128)
    net.pair(make(net, x), 0.05, 100, output="y")
    check(net, "y", tmp_path, 0.05)


def test_depths_of_a_volume_keep_the_scale_of_the_volume(tmp_path: Path) -> None:
    """A convolution over three axes reads its depths side by side: a concatenation that the file does not have."""
    net = Net()
    volume = net.node("Reshape", [net.pair("x", *Y), net.tensor(np.array([1, 2, 2, 6, 6]))])
    y = net.node("Conv", [volume, net.weight((4, 2, 2, 3, 3))], pads=[1, 1, 1, 0, 1, 1])
    net.node("Reshape", [net.pair(y, 0.05, 120), net.tensor(np.array([1, 8, 6, 6]))], output="y")
    check(net, "y", tmp_path, 0.05)


def test_constants_are_rounded_as_the_file_says(tmp_path: Path) -> None:
    """What follows from shapes is known when the file is read; so is an input that is the same in every call."""
    net = Net()
    x = net.pair("x", *Y)
    size = net.node("Cast", [net.node("Shape", [x])], to=TensorProto.FLOAT)  # 1, 4, 6, 6
    steps = net.pair(net.node("Reshape", [net.node("Mul", [size, net.tensor(np.float32(0.4))]), net.tensor(np.array([4, 1, 1]))]), 0.7, 3)
    net.pair(net.node("Mul", [x, steps]), 0.15, 128, output="y")
    check(net, "y", tmp_path, 0.15)


def test_a_fixed_input_is_rounded_as_the_file_says(tmp_path: Path) -> None:
    net = Net()
    net.pair(net.node("Mul", [net.pair("x", *Y), net.pair("z", 0.7, 130)]), 0.15, 128, output="y")
    model = net.model("y")
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, X))
    x, z = samples(2)
    _, run = compiled(model, tmp_path, input_values={"z": z})
    (want,) = ReferenceEvaluator(model).run(None, {"x": x, "z": z})
    np.testing.assert_allclose(run(x), want, rtol=0, atol=0.151)
    assert (np.abs(run(x) - want) < 1e-4).mean() > 0.95


def test_a_pass_that_folds_a_stated_value_rounds_it() -> None:
    builder = GraphBuilder({ATTRIBUTE: Trained(values={"sum": QParams(0.5, -20)}).attribute()})
    x = builder.input("x", (3,), "float32")
    total = builder.emit("sum", relax.op.add(const(np.array([0.1, 0.6, 90.0], np.float32)), const(np.float32(0.2))))
    module = fold_constants(builder.finish([("y", builder.emit("y", relax.op.multiply(x, total)))]))
    (expr,) = [e for _, e in Graph.of(module).bindings]
    np.testing.assert_array_equal(const_value(expr.args[1]), np.array([0.5, 1.0, 73.5], np.float32))  # 127 is the most, (127 + 20) * 0.5
