"""Quantized files that leave some of the network in float, or state what 8 bits can't say: what the author wrote is what is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from quantized_cases import SHAPE, Graph, Stated
from tvm import relax

import qcompiler
from qcompiler.base.errors import InternalError, ModelError
from qcompiler.cli.main import main
from qcompiler.importers.model import load
from qcompiler.importers.qdq import take_out
from qcompiler.numerics.spec import QParams
from qcompiler.passes import sequence
from qcompiler.passes.graph import Graph as Module
from qcompiler.passes.graph import GraphBuilder
from qcompiler.passes.trained import ATTRIBUTE, Trained
from qcompiler.pipeline.compile import compile_stages

RNG = np.random.default_rng(3)


def model(graph: Graph, *outputs: str, opset: int = 21) -> onnx.ModelProto:
    results = [helper.make_empty_tensor_value_info(o) for o in outputs]
    proto = helper.make_graph(graph.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)], results, graph.tensors)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)], ir_version=10)


def inputs(count: int = 3) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(i).uniform(-3, 3, SHAPE).astype(np.float32)} for i in range(count)]


def reference(proto: onnx.ModelProto, sample: dict[str, np.ndarray]) -> list[np.ndarray]:
    try:
        return list(ReferenceEvaluator(proto).run(None, sample))
    except Exception:  # operators of other domains
        import onnxruntime

        return list(onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, sample))


def loss(proto: onnx.ModelProto, folder: Path, calibration: Any = None, **options: Any) -> tuple[Any, list[float]]:
    """The compilation, and each output's noise over signal (powers), against the file itself."""
    onnx.save(proto, str(folder / "m.onnx"))
    compilation = compile_stages(folder / "m.onnx", calibration=calibration, **options)
    session = qcompiler.load(compilation.artifact.save(folder / "m.so"))
    noise = np.zeros((len(proto.graph.output), 2))
    for sample in inputs():
        got = session.run(sample)
        for row, want, output in zip(noise, reference(proto, sample), proto.graph.output, strict=True):
            assert got[output.name].shape == want.shape
            row += ((got[output.name] - want) ** 2).sum(), (want**2).sum()
    return compilation, list(noise[:, 0] / noise[:, 1])


def residual_stream(g: Graph) -> tuple[str, list[str]]:
    """Blocks of rounded products beside a stream in float whose channels differ by orders of magnitude."""
    stream, sums = g.op("Mul", "x", g.tensor([60.0, 0.02, 0.5, 1.0, 1.0, 40.0])), []
    for _ in range(3):
        normal = g.op("Div", stream, g.tensor([60.0, 0.02, 0.5, 1.0, 1.0, 40.0]))
        product = g.op("MatMul", g.pair(normal, 0.05, 120), g.weights(Stated("int8", ("axis", 1)), (6, 6)))
        stream = g.op("Add", stream, product)
        sums.append(stream)
    return stream, sums


def test_a_residual_stream_stays_float(tmp_path: Path) -> None:
    g = Graph("g")
    y, sums = residual_stream(g)
    compilation, (noise,) = loss(model(g, y), tmp_path)
    plan = compilation.quantized.plan
    assert noise < 1e-4
    assert len(plan.scales) == 3 and not set(plan.scales) & set(plan.reasons)
    assert all(plan.params(v) is None for v in sums)
    assert [plan.reasons[v] for v in sums] == ["the model file leaves it in float"] * 3
    asked, (worse,) = loss(model(g, y), tmp_path, inputs(), requantize=True)
    assert any(asked.quantized.plan.params(v) is not None for v in sums[:2])
    assert worse > 10 * noise


def test_who_reads_the_unrounded_value_gets_it(tmp_path: Path) -> None:
    g = Graph("g")
    coarse = g.pair("x", 0.5, 128)
    products = [g.op("MatMul", q, g.weights(Stated("int8", ("axis", 1)), (6, 5))) for q in (coarse, g.pair("x", 0.01, 128))]
    shared = g.op("Relu", "x")
    rounded = g.op("Add", g.pair(shared, 0.25, 0), coarse)
    _, noise = loss(model(g, *products, shared, rounded, g.op("Add", "x", coarse)), tmp_path)
    assert max(noise) < 1e-3 and noise[2] == 0


def test_parameters_survive_another_layout(tmp_path: Path) -> None:
    """Quantized behind permutations and reshapes of the input, and in front of convolutions in another order of axes."""
    g = Graph("g")
    moved = g.op("Transpose", g.op("Reshape", "x", g.tensor([3, 4, 8, 6], "int64")), perm=[0, 2, 1, 3])
    narrow = g.pair(moved, 0.01, 30)  # saturates
    y = g.pair(g.op("Conv", narrow, g.weights(Stated("int8", ("axis", 0)), (4, 8, 3, 3))), 0.02, 100)
    back = g.op("Transpose", g.pair(g.op("Transpose", y, perm=[0, 2, 3, 1]), 0.02, 100), perm=[0, 3, 1, 2])
    flat = g.pair(g.op("Flatten", back), 0.02, 100)
    z = g.pair(g.op("MatMul", flat, g.weights(Stated("int8", "tensor"), (32, 6))), 0.1, 120)
    compilation, noise = loss(model(g, y, z), tmp_path)
    assert max(noise) < 1e-3
    stated = {(p.scale, p.zero_point) for p in Trained.of(Module.of(compilation.quantized.model.module).attrs).values.values()}
    assert stated == {(float(np.float32(s)), zero - 128) for s, zero in ((0.01, 30), (0.02, 100), (0.1, 120))}
    assert len(compilation.quantized.plan.scales) == 2


def test_a_pass_that_loses_parameters_fails() -> None:
    builder = GraphBuilder({ATTRIBUTE: Trained({"y": QParams(0.1, 0)}).attribute()})
    x = builder.input("x", (2, 3), "float32")
    module = builder.finish([("y", builder.emit("y", relax.op.nn.relu(x)))])

    def renames(module: tvm.IRModule) -> tvm.IRModule:
        made = GraphBuilder(Module.of(module).attrs)
        x = made.input("x", (2, 3), "float32")
        return made.finish([("y", made.emit("other", relax.op.nn.relu(x)))])

    assert sequence.run((lambda m: m,), module) is module
    with pytest.raises(InternalError, match="pass 'renames', whose result is not well-formed: IllFormed: what the model file states of y is lost"):
        sequence.run((renames,), module)


def test_operators_without_an_8_bit_form_ask_for_no_data(tmp_path: Path) -> None:
    """Sum of three, ThresholdedRelu, slices backwards, a matrix as bias, between rounded values."""
    g = Graph("g")
    x = g.pair("x", 0.025, 120)
    total = g.pair(g.op("Sum", x, g.pair(g.op("Relu", x), 0.012, 0), g.pair(g.op("Neg", x), 0.025, 130)), 0.02, 40)
    thresholded = g.pair(g.op("ThresholdedRelu", total, alpha=0.4), 0.02, 10)
    ends = [g.tensor(v, "int64") for v in ([-1], [-100], [3], [-2])]
    backwards = g.pair(g.op("Slice", thresholded, *ends), 0.02, 10)
    bias = g.op("DequantizeLinear", g.tensor(RNG.integers(-100, 101, (4, 5)), "int8"), g.tensor(0.03), g.tensor(0, "int8"))
    biased = g.pair(g.op("Add", g.op("MatMul", x, g.weights(Stated("int8", ("axis", 1)), (6, 5))), bias), 0.05, 128)
    g.nodes.reverse()  # files have been seen whose nodes are in no order
    _, noise = loss(model(g, total, thresholded, backwards, biased), tmp_path)
    assert max(noise) < 1e-3


def test_batch_normalization_keeps_integer_weights(tmp_path: Path) -> None:
    """Folded into a convolution, its factors join the scales: the integers are the file's."""
    g = Graph("g")
    vectors = [g.tensor(v) for v in (RNG.uniform(-2, 2, 4), RNG.normal(size=4), RNG.normal(size=4), RNG.uniform(0.5, 2, 4))]
    conv = g.op("Conv", g.pair("x", 0.025, 120), g.weights(Stated("int8", ("axis", 0)), (4, 8, 3, 3)))
    y = g.pair(g.op("BatchNormalization", conv, *vectors), 0.2, 128)
    compilation, (noise,) = loss(model(g, y), tmp_path)
    plan = compilation.quantized.plan
    (group,) = plan.scales
    stated = np.array(next(t for t in g.tensors if list(t.dims) == [4, 8, 3, 3]).int32_data).reshape(4, 8, 3, 3)
    zero = np.array(next(t for t in g.tensors if t.data_type == TensorProto.INT8 and list(t.dims) == [4]).int32_data).reshape(4, 1, 1, 1)
    value, _ = plan.weight(group)
    if np.abs(stated - zero).max() <= 127:
        np.testing.assert_array_equal(np.abs(value.transpose(0, 3, 1, 2)), np.abs(stated - zero))
    assert noise < 1e-3


def test_a_bias_of_zeros_costs_nothing(tmp_path: Path) -> None:
    """What is said of a product moves to what is left of it."""
    g = Graph("g")
    flat = g.op("Reshape", g.pair("x", 0.025, 120), g.tensor([12, 48], "int64"))
    bias = g.op("DequantizeLinear", g.tensor(np.zeros(5, int), "int32"), g.tensor(0.001))
    scales, zeros = g.tensor(RNG.uniform(0.002, 0.01, 5)), g.tensor(np.zeros(5, int), "int8")
    weights = g.op("DequantizeLinear", g.tensor(RNG.integers(-127, 128, (5, 48)), "int8"), scales, zeros, axis=0)
    y = g.op("Gemm", flat, weights, bias, transB=1)
    compilation, (noise,) = loss(model(g, g.pair(y, 0.1, 130)), tmp_path)
    assert noise < 1e-3 and len(compilation.quantized.plan.scales) == 1
    assert not compilation.quantized.plan.notes


@pytest.mark.parametrize("layer", range(3))
def test_layers_of_quantized_files_kept_in_float(layer: int, tmp_path: Path) -> None:
    """A reshape, a transposition and a product, each between rounded values."""
    g = Graph("g")
    flat = g.op("Reshape", g.pair("x", 0.025, 120), g.tensor([12, 48], "int64"))
    turned = g.op("Transpose", g.pair(flat, 0.025, 120), perm=[1, 0])
    product = g.op("MatMul", g.pair(turned, 0.025, 120), g.weights(Stated("int8", ("axis", 1)), (12, 5)))
    y = g.pair(product, 0.05, 120)
    name = (flat, turned, product)[layer]
    compilation, (noise,) = loss(model(g, y), tmp_path, keep_float=[name])
    assert noise < 1e-3
    assert len(compilation.quantized.plan.scales) == (0 if layer == 2 else 1)


@pytest.mark.parametrize("value", [0.0, -0.1, np.nan, 1e-45, np.inf])
def test_scales_that_cannot_be_are_refused(value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for of in ("x", ""):  # an activation, constant or not; paired or read as integers
        g = Graph("g")
        scale, zero = g.tensor(np.float32(value)), g.tensor(3, "uint8")
        q = g.op("QuantizeLinear", of or g.tensor(np.ones((2, 3))), scale, zero)
        y = g.op("Relu", g.op("DequantizeLinear", q, scale, zero)) if of else g.op("Cast", q, to=TensorProto.FLOAT)
        onnx.save(model(g, *([y] if of else [y, g.op("Relu", "x")])), str(tmp_path / "m.onnx"))
        assert main(["compile", str(tmp_path / "m.onnx"), "--output", str(tmp_path / "m.so")]) == 2
        message = capsys.readouterr().err
        assert "(QuantizeLinear): the scale 'g.0' is" in message and not (tmp_path / "m.so").exists()


def test_weight_scales_that_divide_nothing_are_computed(tmp_path: Path) -> None:
    """Zero, negative and subnormal scales of channels: what they are multiplied by is defined. NaN is refused."""
    g = Graph("g")
    weights = RNG.integers(-120, 121, (4, 8, 3, 3))
    scale, zero = g.tensor(np.float32([0.01, 0.0, -0.02, 1e-45])), g.tensor(np.zeros(4, int), "int8")
    x = g.pair("x", 0.025, 120)
    y = g.op("Conv", x, g.op("DequantizeLinear", g.tensor(weights, "int8"), scale, zero, axis=0))
    compilation, (noise,) = loss(model(g, y), tmp_path)
    assert noise < 1e-6 and not compilation.quantized.plan.notes and list(compilation.quantized.plan.scales) == [y]
    g.tensors = [helper.make_tensor(t.name, t.data_type, t.dims, [0.01, np.nan, 1, 1]) if t.name == scale else t for t in g.tensors]
    onnx.save(model(g, y), str(tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match=rf"DequantizeLinear\): the scale '{scale}' is nan \(1 of 4 are so\)"):
        load(tmp_path / "m.onnx")


def test_sixteen_bits_as_asked(tmp_path: Path) -> None:
    """Rounded to 16 bits in float, or quantized to 8 where that is asked."""
    g = Graph("g")
    y = g.op("MatMul", g.pair("x", 0.0001, 500, "int16"), g.weights(Stated("int8", ("axis", 1)), (6, 5)))
    compilation, (noise,) = loss(model(g, y), tmp_path)
    assert noise < 1e-9 and "int16 activations have no int8 kernel; rounded in float32" in compilation.quantized.plan.notes[0]
    assert not compilation.quantized.plan.scales
    compilation, (noise,) = loss(model(g, y), tmp_path, inputs(), requantize=True)
    assert 1e-9 < noise < 1e-3 and "chosen anew" in compilation.quantized.plan.notes[0]
    assert compilation.quantized.plan.scales


def test_operators_on_integers_with_any_scales(tmp_path: Path) -> None:
    """Per row and column, and computed when the network runs; a convolution whose scales are, too."""
    g = Graph("g")
    one = g.op("Exp", g.op("Mul", g.op("ReduceMax", "x", keepdims=0), g.tensor(0.0)))
    xs, xz = g.tensor(np.float32(0.025)), g.tensor(120, "uint8")
    q = g.op("QuantizeLinear", "x", xs, xz)
    ws, wz, ys, yz = g.tensor(RNG.uniform(0.005, 0.01, 4)), g.tensor(np.zeros(4, int), "int8"), g.tensor(np.float32(0.1)), g.tensor(128, "uint8")
    w, bias = g.tensor(RNG.integers(-100, 101, (4, 8, 3, 3)), "int8"), g.tensor(RNG.integers(-3000, 3000, 4), "int32")
    convolved = [g.op("QLinearConv", q, s, xz, w, ws, wz, ys, yz, bias) for s in (xs, g.op("Mul", xs, one))]
    matrix, bs, bz = g.tensor(RNG.integers(-100, 101, (6, 5)), "int8"), g.tensor(RNG.uniform(0.005, 0.01, 5)), g.tensor(RNG.integers(-9, 9, 5), "int8")
    moved = g.op("MaxPool", g.op("Gather", q, g.tensor([2, 0], "int64"), axis=1), kernel_shape=[2, 2], strides=[2, 2])
    products = [g.op("QLinearMatMul", q, s, xz, matrix, bs, bz, ys, yz) for s in (xs, g.op("Mul", xs, one))]
    results = [*convolved, *products, moved]
    proto = model(g, *results)
    onnx.save(proto, str(tmp_path / "m.onnx"))
    session = qcompiler.load(compile_stages(tmp_path / "m.onnx").artifact.save(tmp_path / "m.so"))
    for sample in inputs():
        for name, want in zip(results, reference(proto, sample), strict=True):
            off = np.abs(session.run(sample)[name].astype(int) - want.astype(int))
            assert session.run(sample)[name].dtype == np.uint8 and off.max() <= (name != moved) and (off == 0).mean() > 0.97, name


def test_pairs_of_other_domains(tmp_path: Path) -> None:
    """ONNX Runtime's QuantizeLinear (16 bits before operator set 21) is ONNX's; anybody else's means what they say."""
    g = Graph("g")
    names = [g.tensor(np.float32(0.0002)), g.tensor(500, "int16")]
    q = g.op("QuantizeLinear", "x", *names, domain="com.microsoft")
    wide = g.op("DequantizeLinear", q, *names, domain="com.microsoft")
    names = [g.tensor(np.float32(0.025)), g.tensor(120, "uint8")]
    x = g.op("DequantizeLinear", g.op("QuantizeLinear", "x", *names, domain="com.microsoft"), *names, domain="com.microsoft")
    y = g.op("MatMul", x, g.weights(Stated("int8", ("axis", 1)), (6, 5)))
    compilation, noise = loss(model(g, wide, y, opset=17), tmp_path)
    assert max(noise) < 1e-3 and list(compilation.quantized.plan.scales) == [y]
    for node in g.nodes:
        node.domain = node.domain and "com.acme"
    kept, trained = take_out(model(g, wide, y))
    assert [n.domain for n in kept.graph.node].count("com.acme") == 4 and not trained.values


def test_integers_that_a_branch_reads(tmp_path: Path) -> None:
    """A value that only the branch of an If reads is there for it."""
    g = Graph("g")
    names = [g.tensor(np.float32(0.025)), g.tensor(120, "uint8")]
    q = g.op("QuantizeLinear", "x", *names)
    d = g.op("DequantizeLinear", q, *names)
    branches = []
    for name in ("then", "else"):
        nodes = [helper.make_node("Cast", [q], [f"{name}.f"], to=TensorProto.FLOAT), helper.make_node("Add", [f"{name}.f", d], [f"{name}.y"])]
        branches.append(helper.make_graph(nodes, name, [], [helper.make_empty_tensor_value_info(f"{name}.y")]))
    y = g.op("If", g.tensor(True, "bool"), then_branch=branches[0], else_branch=branches[1])
    _, (noise,) = loss(model(g, y), tmp_path)
    assert noise < 1e-5
