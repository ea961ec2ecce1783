"""qcompiler.importers.model.load: every operator family against ONNX Runtime, shapes, names, and bad files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.base.errors import ModelError
from qcompiler.importers.model import load
from qcompiler.passes.graph import Graph, relax_op
from tests.onnx_nets import OnnxNet, agrees, execute, operators, samples

Build = Callable[[OnnxNet, str], list[str]]


def conv(n: OnnxNet, x: str) -> list[str]:
    return [
        n.op("Conv", x, n.weight(6, 4, 3, 3), n.weight(6)),
        n.op("Conv", x, n.weight(8, 2, 3, 5), n.weight(8), group=2, strides=[2, 1], pads=[1, 2, 0, 3]),
        n.op("Conv", x, n.weight(4, 1, 3, 3), group=4, dilations=[2, 1], pads=[2, 1, 2, 1]),
        n.op("Conv", x, n.weight(5, 4, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
        n.op("Conv", x, n.weight(5, 4, 2, 4), auto_pad="SAME_LOWER"),
        n.op("Conv", x, n.weight(5, 4, 3, 3), n.weight(5), auto_pad="VALID", kernel_shape=[3, 3]),
    ]


def conv_transpose(n: OnnxNet, x: str) -> list[str]:
    return [
        n.op("ConvTranspose", x, n.weight(4, 6, 3, 3), n.weight(6), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
        n.op("ConvTranspose", x, n.weight(4, 3, 2, 4), n.weight(6), group=2, strides=[2, 3], pads=[0, 1, 0, 2]),
        n.op("ConvTranspose", x, n.weight(4, 5, 3, 3), dilations=[2, 1], pads=[1, 0, 2, 1]),
        n.op("ConvTranspose", x, n.weight(4, 5, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
        n.op("ConvTranspose", x, n.weight(4, 5, 3, 3), strides=[2, 2], output_shape=[15, 17]),
    ]


def pools(n: OnnxNet, x: str) -> list[str]:
    window = {"kernel_shape": [3, 2], "strides": [2, 2]}
    return [
        n.op("MaxPool", x, **window),
        n.op("MaxPool", x, **window, pads=[1, 0, 1, 1]),
        n.op("MaxPool", x, **window, ceil_mode=1),
        n.op("MaxPool", x, kernel_shape=[2, 2], dilations=[2, 3]),
        n.op("MaxPool", x, **window, auto_pad="SAME_LOWER"),
        n.op("AveragePool", x, **window),
        n.op("AveragePool", x, **window, pads=[1, 0, 2, 1]),
        n.op("AveragePool", x, **window, pads=[1, 0, 2, 1], count_include_pad=1),
        n.op("AveragePool", x, **window, ceil_mode=1),
        n.op("AveragePool", x, kernel_shape=[3, 3], auto_pad="SAME_UPPER"),
        n.op("GlobalAveragePool", x),
        n.op("GlobalMaxPool", x),
    ]


def signals(n: OnnxNet, x: str) -> list[str]:
    x = n.op("Reshape", x, n.ints(1, 4, 72))
    y = n.op("Relu", n.op("Conv", x, n.weight(6, 2, 5), n.weight(6), group=2, strides=[2], pads=[3, 1]))
    pools = [n.op("MaxPool", y, kernel_shape=[3], pads=[1, 0]), n.op("AveragePool", y, kernel_shape=[2])]
    return [y, *pools, n.op("ConvTranspose", y, n.weight(6, 3, 4), strides=[2])]


def products(n: OnnxNet, x: str) -> list[str]:
    flat = n.op("Flatten", x)
    a, b = n.op("Reshape", x, n.ints(4, 8, 9)), n.op("Reshape", x, n.ints(4, 9, 8))
    left = n.op("Reshape", x, n.ints(16, 18))
    return [
        n.op("Gemm", flat, n.weight(5, 288), n.weight(5), transB=1, alpha=0.5, beta=2.0),
        n.op("Gemm", flat, n.weight(288, 5)),
        n.op("Gemm", left, n.op("Reshape", x, n.ints(16, 18)), n.weight(18, 1), transA=1),
        n.op("MatMul", x, n.weight(9, 3)),
        n.op("MatMul", a, b),
    ]


def arithmetic(n: OnnxNet, x: str) -> list[str]:
    gate = n.op("GlobalAveragePool", x)
    row, channel, divisors = n.weight(9), n.weight(4, 1, 1), n.const([[[[2.0]], [[4.0]], [[3.0]], [[-5.0]]]])
    return [
        n.op("Add", x, gate), n.op("Mul", gate, x), n.op("Sub", x, row), n.op("Sub", channel, x), n.op("Div", x, divisors),
        n.op("Add", x, x), n.op("Sum", x, gate, channel), n.op("Max", x, gate), n.op("Min", x, n.const(0.5), channel), n.op("Mean", x, gate),
        n.op("Pow", x, n.const(2.0)), n.op("Sqrt", n.op("Abs", x)), n.op("Neg", x), n.op("Add", gate, n.weight(1, 1, 8, 9)),
    ]  # fmt: skip


def activations(n: OnnxNet, x: str) -> list[str]:
    return [
        n.op("Relu", x), n.op("Clip", x, n.const(0.0), n.const(6.0)), n.op("Clip", x, "", n.const(1.5)), n.op("Clip", x, n.const(-0.5)),
        n.op("LeakyRelu", x, alpha=0.1), n.op("PRelu", x, n.weight(4, 1, 1)), n.op("PRelu", x, n.const([[[0.25]]])), n.op("HardSwish", x),
        n.op("HardSigmoid", x), n.op("HardSigmoid", x, alpha=0.3, beta=0.4), n.op("Sigmoid", x), n.op("Tanh", x), n.op("Elu", x, alpha=0.7),
        n.op("Selu", x), n.op("Softplus", x), n.op("Softsign", x), n.op("Erf", x), n.op("Exp", x), n.op("Celu", x, alpha=0.5),
        n.op("Softmax", x, axis=1), n.op("Softmax", x), n.op("LogSoftmax", x, axis=1), n.op("ThresholdedRelu", x, alpha=0.5),
    ]  # fmt: skip


def movement(n: OnnxNet, x: str) -> list[str]:
    y = n.op("Conv", x, n.weight(6, 4, 1, 1))
    parts = n.op("Split", y, n.ints(1, 2, 3), outputs=3, axis=1)
    halves = n.op("Split", y, outputs=2, axis=2)
    return [
        n.op("Concat", y, x, parts[1], axis=1), n.op("Concat", y, n.weight(1, 6, 8, 2), axis=-1), *parts, *halves,
        n.op("Slice", y, n.ints(1, 2), n.ints(-1, 100), n.ints(2, -1), n.ints(2, 3)), n.op("Slice", y, n.ints(-1), n.ints(-100), n.ints(3), n.ints(-2)),
        n.op("Transpose", y, perm=[0, 2, 3, 1]), n.op("Transpose", y, perm=[3, 1, 0, 2]), n.op("Flatten", y), n.op("Flatten", y, axis=-1),
        n.op("Reshape", y, n.ints(0, 3, -1, 4)), n.op("Squeeze", n.op("GlobalAveragePool", y), n.ints(2, 3)), n.op("Unsqueeze", y, n.ints(0, -1)),
        n.op("Gather", y, n.ints(3, -1, 0), axis=1), n.op("Gather", y, n.const(-2, "int64"), axis=2),
        n.op("Expand", n.op("GlobalMaxPool", y), n.ints(2, 1, 3, 1)),
        n.op("Tile", y, n.ints(1, 2, 1, 3)), n.op("DepthToSpace", x, blocksize=2), n.op("DepthToSpace", x, blocksize=2, mode="CRD"),
        n.op("SpaceToDepth", n.op("Slice", y, n.ints(0), n.ints(8), n.ints(3)), blocksize=2), n.op("CumSum", y, n.const(1, "int64"), reverse=1),
    ]  # fmt: skip


def paddings(n: OnnxNet, x: str) -> list[str]:
    y = n.op("Conv", x, n.weight(3, 4, 1, 1))
    spatial = n.ints(0, 0, 1, 2, 0, 0, 3, 0)
    return [
        n.op("Pad", y, spatial), n.op("Pad", y, spatial, n.const(1.5)), n.op("Pad", y, spatial, mode="reflect"), n.op("Pad", y, spatial, mode="edge"),
        n.op("Pad", y, n.ints(1, 2, 0, 0, 0, 1, 0, 0)), n.op("Pad", y, n.ints(0, 0, -1, 2, 0, 0, 0, -3)),
    ]  # fmt: skip


def resizes(n: OnnxNet, x: str) -> list[str]:
    y = n.op("Conv", x, n.weight(3, 4, 1, 1))
    region = n.const([0, 0, 0.2, 0.1, 1, 1, 0.8, 0.9])
    double, odd, half = n.const([1, 1, 2, 2]), n.const([1, 1, 1.3, 2.7]), n.const([1, 1, 0.5, 0.6])
    return [
        n.op("Resize", y, "", double), n.op("Resize", y, "", double, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
        n.op("Resize", y, "", double, mode="linear"), n.op("Resize", y, "", double, mode="linear", coordinate_transformation_mode="align_corners"),
        n.op("Resize", y, "", "", n.ints(1, 3, 11, 20), mode="linear", coordinate_transformation_mode="pytorch_half_pixel"),
        n.op("Resize", y, "", "", n.ints(1, 3, 5, 20), nearest_mode="ceil"), n.op("Resize", y, "", odd, mode="linear"), n.op("Resize", y, "", half),
        n.op("Resize", y, "", odd, mode="cubic"), n.op("Resize", y, "", half, mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5),
        n.op("Resize", y, region, "", n.ints(1, 3, 4, 5), mode="linear", coordinate_transformation_mode="tf_crop_and_resize"),
        n.op("Resize", y, "", "", n.ints(1, 3, 1, 5), mode="linear", coordinate_transformation_mode="align_corners"),
        n.op("Resize", y, "", "", n.ints(1, 3, 9, 1), mode="linear", coordinate_transformation_mode="align_corners"),
        n.op("Resize", y, "", "", n.ints(1, 3, 1, 1), mode="nearest", coordinate_transformation_mode="align_corners"),
    ]  # fmt: skip


def reductions(n: OnnxNet, x: str) -> list[str]:
    y = n.op("Conv", x, n.weight(6, 4, 1, 1))
    return [
        n.op("ReduceMean", y, axes=[2, 3]), n.op("ReduceMean", y, axes=[-1, 1], keepdims=0), n.op("ReduceMean", y), n.op("ReduceSum", y, n.ints(1)),
        n.op("ReduceSum", y, n.ints(2), keepdims=0), n.op("ReduceMax", y, axes=[3]), n.op("ReduceMin", y, axes=[0, 1], keepdims=0),
        n.op("ReduceL2", y, axes=[1]), n.op("ReduceSumSquare", y, axes=[2]), n.op("ReduceLogSumExp", y, axes=[1]), n.op("ArgMax", y, axis=1),
    ]  # fmt: skip


def normalizations(n: OnnxNet, x: str) -> list[str]:
    four = [n.const(np.abs(n.rng.standard_normal(4)) + 0.5) for _ in range(4)]
    tokens = n.op("Transpose", x, perm=[0, 2, 3, 1])
    return [
        n.op("BatchNormalization", n.op("Conv", x, n.weight(4, 4, 3, 3), n.weight(4)), *four, epsilon=1e-3), n.op("BatchNormalization", x, *four),
        n.op("InstanceNormalization", n.op("Conv", x, n.weight(4, 4, 1, 1)), *four[:2]), n.op("LayerNormalization", tokens, *four[:2]),
        n.op("LRN", x, size=3, alpha=0.01, beta=0.75, bias=1.5),
    ]  # fmt: skip


FAMILIES: list[Build] = [
    conv, conv_transpose, pools, signals, products, arithmetic, activations, movement, paddings, resizes, reductions, normalizations,
]  # fmt: skip


@pytest.mark.parametrize("build", FAMILIES, ids=lambda f: f.__name__)
def test_operators_agree_with_onnx_runtime(build: Build, tmp_path: Path) -> None:
    net = OnnxNet(17)
    outputs = build(net, net.input("x", 1, 4, 8, 9))
    agrees(net.save(tmp_path / "net.onnx", outputs))


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 18, 21])
def test_operator_sets(opset: int, tmp_path: Path) -> None:
    """Parameters that moved from attributes to inputs over the years."""
    net = OnnxNet(opset)
    x = net.input("x", 2, 4, 8, 8)
    y = net.op("Conv", x, net.weight(4, 4, 3, 3), pads=[1, 1, 1, 1])
    clip = net.op("Clip", y, min=0.0, max=6.0) if opset < 11 else net.op("Clip", y, net.const(0.0), net.const(6.0))
    pad = net.op("Pad", clip, pads=[0, 0, 1, 1, 0, 0, 1, 1]) if opset < 11 else net.op("Pad", clip, net.ints(0, 0, 1, 1, 0, 0, 1, 1))
    part = net.op("Slice", pad, axes=[2], starts=[1], ends=[9]) if opset < 10 else net.op("Slice", pad, net.ints(1), net.ints(9), net.ints(2))
    if opset < 9:
        up = net.op("Upsample", part, mode="nearest", scales=[1.0, 1.0, 2.0, 2.0])
    elif opset < 10:
        up = net.op("Upsample", part, net.const([1, 1, 2, 2]), mode="linear")
    else:
        up = net.op("Resize", part, *([] if opset < 11 else [net.const([])]), net.const([1, 1, 2, 2]), mode="nearest")
    halves = net.op("Split", up, outputs=2, axis=1, **({"num_outputs": 2} if opset >= 18 else {}))
    mean = net.op("ReduceMean", halves[0], net.ints(2, 3)) if opset >= 18 else net.op("ReduceMean", halves[0], axes=[2, 3])
    squeezed = net.op("Squeeze", mean, axes=[2, 3]) if opset < 13 else net.op("Squeeze", mean, net.ints(2, 3))
    dropped = net.op("Dropout", squeezed)
    product = net.op("Gemm", dropped, net.weight(2, 5), net.weight(5))
    agrees(net.save(tmp_path / "net.onnx", [net.op("Softmax", product, axis=1), halves[1]]))


def test_newer_activations(tmp_path: Path) -> None:
    net = OnnxNet(20)
    x = net.input("x", 1, 4, 5, 5)
    agrees(net.save(tmp_path / "net.onnx", [net.op("Gelu", x), net.op("Gelu", x, approximate="tanh"), net.op("Mish", x)]), tolerance=1e-4)  # erf's polynomial


def test_shape_computations_vanish(tmp_path: Path) -> None:
    """What exporters write for x.view(x.shape[0], -1) and for SAME padding."""
    net = OnnxNet(17)
    x = net.input("x", "batch", 4, 7, 7)
    size = net.op("Gather", net.op("Shape", x), net.const(3, "int64"))
    total = net.op("Sub", net.op("Add", size, net.const(2, "int64")), size)
    pads = net.op("Concat", net.ints(0, 0, 1, 1, 0, 0), net.op("Unsqueeze", total, net.ints(0)), net.ints(2), axis=0)
    y = net.op("Conv", net.op("Pad", x, pads), net.weight(4, 4, 3, 3), strides=[2, 2])
    first = net.op("Unsqueeze", net.op("Gather", net.op("Shape", y), net.const(0, "int64")), net.ints(0))
    z = net.op("Reshape", y, net.op("Concat", first, net.ints(-1), axis=0))
    model = agrees(net.save(tmp_path / "net.onnx", [z]))
    assert model.inputs[0].shape == (1, 4, 7, 7)
    assert operators(model) == ["permute_dims", "conv2d", "permute_dims", "reshape"]


def test_value_ids_are_tensor_names(tmp_path: Path) -> None:
    net = OnnxNet(17)
    x = net.input("image.in", 1, 3, 8, 8)
    y = net.op("Conv", x, net.weight(4, 3, 3, 3), net.weight(4), name="layer/1.conv:")
    z = net.op("HardSwish", y, name="act")
    model = load(net.save(tmp_path / "net.onnx", [z]))
    graph = Graph.of(model.module)
    values = graph.values()
    assert relax_op(values[y]) == "relax.add"
    assert relax_op(values[f"{y}~conv"]) == "relax.nn.conv2d"
    assert relax_op(values[z]) == "relax.multiply"
    assert [n for n, _ in graph.outputs] == [z]
    assert model.sources[y] == (f"node_{y}", "Conv")
    assert model.source(f"{y}~conv") == (f"node_{y}", "Conv")
    assert model.source("image.in~nhwc") == ("image.in", "Input")


def test_file_with_constants_among_inputs_and_outputs(tmp_path: Path) -> None:
    """Initializers listed as inputs too; an output that is an input; one that is a constant; one value under two names; no node names."""
    net = OnnxNet(13)
    x = net.input("x", 1, 3)
    weight = net.weight(3, 2)
    net.input(weight, 3, 2)
    y = net.op("MatMul", x, weight)
    copy = net.op("Identity", y)
    fixed = net.op("Constant", value=numpy_helper.from_array(np.arange(4, dtype=np.float32)))
    for node in net.nodes:
        node.name = ""
    model = load(net.save(tmp_path / "net.onnx", [copy, y, fixed, x]))
    assert [i.name for i in model.inputs] == ["x"]
    assert [o.shape for o in model.outputs] == [(1, 2), (1, 2), (4,), (1, 3)]
    feeds = samples(model)
    found = execute(model.module, feeds)
    wanted = feeds["x"] @ numpy_helper.to_array(net.initializers[0])
    np.testing.assert_allclose(found[copy], wanted, rtol=1e-6)
    np.testing.assert_allclose(found[y], wanted, rtol=1e-6)
    np.testing.assert_array_equal(found[fixed], np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(found["x"], feeds["x"])


def test_names_that_look_like_ours(tmp_path: Path) -> None:
    net = OnnxNet(17)
    x, kernel, bias = net.input("x", 1, 3, 4, 4), net.weight(2, 3, 1, 1), net.weight(2)
    net.nodes.append(helper.make_node("Conv", [x, kernel, bias], ["y"]))
    net.nodes.append(helper.make_node("Relu", ["y"], ["y~conv"]))
    net.nodes.append(helper.make_node("Tanh", ["y~conv"], ["x~nhwc"]))
    agrees(net.save(tmp_path / "net.onnx", ["y~conv", "x~nhwc"]))


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    net = OnnxNet(17)
    x = net.input("x", 1, 3, 4, 4, dtype=TensorProto.FLOAT16)
    y = net.op("Relu", net.op("Conv", x, net.const(np.ones((2, 3, 1, 1)), "float16")))
    model = load(net.save(tmp_path / "net.onnx", [net.op("Cast", y, to=TensorProto.DOUBLE)]))
    assert (model.inputs[0].dtype, model.outputs[0].dtype) == ("float32", "float32")
    feeds = samples(model)
    found = next(iter(execute(model.module, feeds).values()))
    np.testing.assert_allclose(found, np.maximum(np.repeat(feeds["x"].sum(1, keepdims=True), 2, 1), 0), rtol=1e-5, atol=1e-6)


def test_known_condition_takes_its_branch(tmp_path: Path) -> None:
    net = OnnxNet(17)
    x = net.input("x", 1, 4)  # both branches read it
    scalar = numpy_helper.from_array(np.float32(3), "k")
    result = helper.make_empty_tensor_value_info("r")
    branches = [helper.make_graph([helper.make_node(op, ["x", "k"], ["r"])], op, [], [result], [scalar]) for op in ("Add", "Mul")]
    taken: list[str] = []
    for size in (4, 5):
        condition = net.op("Equal", net.op("Gather", net.op("Shape", x), net.const(1, "int64")), net.const(size, "int64"))
        y = net.op("If", condition, then_branch=branches[0], else_branch=branches[1])
        taken.append(net.op("Relu", y))
    model = load(net.save(tmp_path / "net.onnx", taken))
    feeds = samples(model)
    found = execute(model.module, feeds)
    np.testing.assert_allclose(found[taken[0]], np.maximum(feeds["x"] + 3, 0), rtol=1e-6)
    np.testing.assert_allclose(found[taken[1]], np.maximum(feeds["x"] * 3, 0), rtol=1e-6)


def test_model_functions_are_inlined(tmp_path: Path) -> None:
    body = [helper.make_node("Mul", ["a", "a"], ["t"]), helper.make_node("Relu", ["t"], ["b"])]
    function = helper.make_function("mine", "SquareRelu", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    graph = helper.make_graph(
        [helper.make_node("SquareRelu", ["x"], ["y"], domain="mine")], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    onnx.save(helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8), tmp_path / "net.onnx")
    model = load(tmp_path / "net.onnx")
    feeds = samples(model)
    np.testing.assert_allclose(execute(model.module, feeds)["y"], feeds["x"] ** 2, rtol=1e-6)


# -- shapes -----------------------------------------------------------------------------------------------------------------------------


def symbolic(path: Path) -> Path:
    net = OnnxNet(17)
    x = net.input("x", "N", 3, "side", "side")
    return net.save(path, [net.op("Conv", x, net.weight(2, 3, 3, 3)), net.op("Add", net.input("other", "N", 3), net.const(1.0))])


def test_symbolic_dimensions(tmp_path: Path) -> None:
    path = symbolic(tmp_path / "net.onnx")
    model = load(path, {"x": (4, 3, 9, 9)})
    assert [i.shape for i in model.inputs] == [(4, 3, 9, 9), (4, 3)]
    assert model.outputs[0].shape == (4, 2, 7, 7)
    assert model.digest != load(path, {"x": (4, 3, 8, 8)}).digest
    assert model.digest == load(path, {"x": (4, 3, 9, 9)}).digest


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, r"dimension 2 \(side\) of input 'x' \[N, 3, side, side\] is symbolic. Give it with --input-shape x="),
        ({"x": (1, 3, 8)}, r"'x' has shape \[N, 3, side, side\]; \[1, 3, 8\] given. Supported: 4 positive"),
        ({"x": (1, 4, 8, 8)}, "dimension 1 must be 3"),
        ({"x": (1, 3, 8, 9)}, "dimension 3 must be 8"),
        ({"x": (1, 3, 0, 0)}, "Supported: 4 positive numbers"),
        ({"xx": (1, 3, 8, 8)}, "no input 'xx'. Did you mean 'x'"),
        ({"x": (1, 3, 2, 2)}, r"node 'node_conv0' \(Conv\): its result is empty"),
    ],
)
def test_wrong_shapes(shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load(symbolic(tmp_path / "net.onnx"), shapes)


# -- bad files --------------------------------------------------------------------------------------------------------------------------


def simple(opset: int = 17) -> tuple[OnnxNet, str]:
    net = OnnxNet(opset)
    return net, net.op("Conv", net.input("x", 1, 3, 8, 8), net.const(np.ones((4, 3, 3, 3)), name="kernel"))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing.onnx: can't read the model: No such file"):
        load(tmp_path / "nothing.onnx")
    with pytest.raises(ModelError, match=r"this is a folder\. Supported: .*give one file"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello world, this is no model\n" * 9, b"\x00" * 64])
def test_not_onnx(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="not an ONNX model"):
        load(tmp_path / "net.onnx")


def test_truncated(tmp_path: Path) -> None:
    net, y = simple()
    data = net.save(tmp_path / "net.onnx", [y]).read_bytes()
    for cut in (5, len(data) // 3, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.onnx").write_bytes(data[:cut])
        with pytest.raises(ModelError, match=r"not an ONNX model"):
            load(tmp_path / "cut.onnx")


def test_external_data(tmp_path: Path) -> None:
    net, y = simple()
    path = tmp_path / "net.onnx"
    onnx.save_model(net.proto([y]), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = load(path)
    feeds = samples(model)
    net.save(tmp_path / "inside.onnx", [y])
    np.testing.assert_array_equal(execute(model.module, feeds)[y], execute(load(tmp_path / "inside.onnx").module, feeds)[y])
    data = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(b"\x01" + data[1:])
    assert load(path).digest != model.digest
    (tmp_path / "weights.bin").write_bytes(data[:-4])
    with pytest.raises(ModelError, match=r"'kernel' is stored in 'weights.bin', which can't be read"):
        load(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"'kernel' is stored in 'weights.bin', which can't be read: No such file or directory. Put that file beside"):
        load(path)


def test_external_data_outside_the_folder(tmp_path: Path) -> None:
    net, y = simple()
    proto = net.proto([y])
    (tmp_path / "secret.bin").write_bytes(b"\0" * 432)
    (tmp_path / "inner").mkdir()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    (tmp_path / "inner" / "net.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside of the model's folder"):
        load(tmp_path / "inner" / "net.onnx")


def test_damaged_tensor(tmp_path: Path) -> None:
    net, y = simple()
    proto = net.proto([y])
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-8]
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="the data of tensor 'kernel' is damaged"):
        load(tmp_path / "net.onnx")


def test_unsupported_operators_are_named_at_once(tmp_path: Path) -> None:
    net = OnnxNet(17)
    x = net.input("x", 1, 4)
    y = net.op("Magic", net.op("Relu", x), domain="acme")
    z = net.op("Det", net.op("Relu", y))
    with pytest.raises(ModelError, match=rf"node 'node_{y}' \(Magic\): operator 'acme::Magic' is not .*; node 'node_{z}' \(Det\): no conversion exists"):
        load(net.save(tmp_path / "net.onnx", [z]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda n, x: n.op("NonZero", x), r"node 'node_nonzero0' \(NonZero\): the shape of its result depends on data"),
        (lambda n, x: n.op("Reshape", x, n.ints(7, -1)), r"\(Reshape\): a tensor of shape \[1, 4, 6, 6\] can't be reshaped to \[7, -1\]"),
        (lambda n, x: n.op("RoiAlign", x, n.const([[0.0, 0.0, 1.0, 1.0]]), n.ints(0), mode="max"), "mode 'max' is not supported; supported: avg"),
        (lambda n, x: n.op("Conv", x, n.weight(4, 3, 3, 3)), r"weights of shape \[4, 3, 3, 3\] don't fit"),
        (lambda n, x: n.op("Add", x, "ghost"), "its operand 'ghost' is computed by no node before it"),
        (lambda n, x: n.op("Slice", x, n.ints(3), n.ints(3), n.ints(2)), r"output 'slice0' is empty \(shape \[1, 4, 0, 6\]\)"),
        (lambda n, x: n.op("Transpose", x, perm=[0, 1]), r"\(Transpose\)"),
    ],
)
def test_refused_nodes(build: Callable[[OnnxNet, str], str], message: str, tmp_path: Path) -> None:
    net = OnnxNet(17)
    y = build(net, net.input("x", 1, 4, 6, 6))
    graph = helper.make_graph(net.nodes, "g", net.inputs, [helper.make_empty_tensor_value_info(y)], net.initializers)
    (tmp_path / "net.onnx").write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "net.onnx")


def test_output_nobody_computes(tmp_path: Path) -> None:
    net, _ = simple()
    (tmp_path / "net.onnx").write_bytes(net.proto(["missing"]).SerializeToString())
    with pytest.raises(ModelError, match="output 'missing' is computed by no node"):
        load(tmp_path / "net.onnx")


# -- networks ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "convolutions"), [("squeezenet", 26), ("shufflenet", 49), ("densenet121", 183)])
def test_model_zoo_structures(name: str, convolutions: int) -> None:
    """Graphs the onnx package ships: layout conversions only at the edges, and inside ShuffleNet's channel shuffles."""
    model = load(Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx")
    found = operators(model)
    assert found.count("conv2d") == convolutions
    assert found.count("permute_dims") == (1 if name != "shufflenet" else 17)  # 16 shuffles
    assert "multiply" not in found


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_lite0"])
def test_real_network(name: str, real_data: Path) -> None:
    model = agrees(real_data / "models" / f"{name}.onnx", tolerance=1e-5)
    assert operators(model).count("permute_dims") == 1
    assert not {"pad", "reshape"} & set(operators(model))
