"""What files and users get wrong, and what ONNX means at the edges of its operators: the right values, or one sentence that names the culprit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.base.errors import ModelError
from qcompiler.importers.model import load
from qcompiler.passes.graph import Graph, match_op
from qcompiler.passes.groups import find_groups
from qcompiler.pipeline.float_library import compile_float
from tests.onnx_nets import OnnxNet, agrees, execute, operators, samples

INF = np.float32(np.inf)


def saved(path: Path, nodes: Sequence[onnx.NodeProto], inputs: Sequence[onnx.ValueInfoProto], *tensors: onnx.TensorProto, opset: int = 17) -> Path:
    """A file with these nodes, whose last node's result is the output; nothing is checked."""
    outputs = [helper.make_empty_tensor_value_info(nodes[-1].output[0])]
    graph = helper.make_graph(list(nodes), "net", list(inputs), outputs, list(tensors))
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8).SerializeToString())
    return path


def image(*shape: int, element: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("x", element, shape or (1, 3, 4, 4))


def tensor(array: np.ndarray, name: str = "w") -> onnx.TensorProto:
    return numpy_helper.from_array(array, name)


def test_a_constant_on_the_left_of_a_product_becomes_its_weights(tmp_path: Path) -> None:
    net = OnnxNet(17)
    x, y = net.input("x", 2, 6, 5), net.input("y", 6, 4)
    outputs = [
        net.op("MatMul", net.weight(3, 6), x),
        net.op("MatMul", net.weight(2, 3, 6), x),
        net.op("MatMul", net.weight(6), x),
        net.op("Gemm", net.weight(3, 6), y, net.weight(4), alpha=0.5),
        net.op("Gemm", net.weight(6, 3), y, transA=1),
        net.op("Gemm", net.weight(3, 4), y, transB=1),
    ]
    model = agrees(net.save(tmp_path / "net.onnx", outputs))
    kinds = [g.kind for g in find_groups(model.module)]
    assert kinds.count("dense") == 4, "all but the stack of matrices and the vector"


def test_resizes_that_are_products(tmp_path: Path) -> None:
    net = OnnxNet(18)
    x = net.input("x", 1, 3, 8, 9)
    half, odd = net.const([1, 1, 0.5, 0.6]), net.const([1, 1, 1.3, 0.7])
    outputs = [
        net.op("Resize", x, "", odd, mode="cubic"),
        net.op("Resize", x, "", half, mode="linear", antialias=1),
        net.op("Resize", x, "", odd, mode="linear"),
    ]
    agrees(net.save(tmp_path / "net.onnx", outputs))


def test_clip_with_its_bounds_the_wrong_way_round(tmp_path: Path) -> None:
    net = OnnxNet(17)
    x = net.input("x", 3, 4)
    outputs = [
        net.op("Clip", x, net.const(2.0), net.const(-1.0)),
        net.op("Clip", x, net.const(-INF), net.const(1.0)),
        net.op("Clip", x, net.const(INF), net.const(1.0)),
    ]
    agrees(net.save(tmp_path / "net.onnx", outputs))


def test_masks_of_minus_infinity(tmp_path: Path) -> None:
    net = OnnxNet(17)
    x = net.input("x", 2, 4, 4)
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    outputs = [
        net.op("Softmax", net.op("Add", x, net.const(mask))),
        net.op("Softmax", net.op("Where", net.const(mask == 0, "bool"), x, net.const(-INF))),
        net.op("ReduceMax", net.op("Pad", x, net.ints(0, 0, 1, 0, 0, 1), net.const(-INF)), axes=[2]),
    ]
    path = net.save(tmp_path / "net.onnx", outputs)
    agrees(path)
    x = np.random.default_rng(0).standard_normal((8, 2, 4, 4)).astype(np.float32)
    session = qcompiler.load(qcompiler.compile(path, calibration=[{"x": v} for v in x], preset="fast").save(tmp_path / "net.so"))
    reasons = {e["id"]: e["reason"] for e in session.manifest["float_ops"]}
    assert "its constant operand holds infinities, as a mask does" in reasons.values()
    got, want = session.run({"x": x[0]}), execute(load(path).module, {"x": x[0]})
    assert all(np.abs(got[name] - want[name]).max() < 0.05 for name in want)


@pytest.mark.parametrize(("kind", "start"), [("ReduceMax", -INF), ("ReduceMin", INF), ("ArgMax", -INF), ("ArgMin", INF), ("ReduceLogSumExp", -INF)])
def test_reductions_of_nothing_but_infinities(kind: str, start: np.float32, tmp_path: Path) -> None:
    net = OnnxNet(17)
    axes = {"axis": 1} if kind.startswith("Arg") else {"axes": [1]}
    path = net.save(tmp_path / "net.onnx", [net.op(kind, net.input("x", 2, 3), **axes)])
    x = np.asarray([[start] * 3, [1, start, 2]], np.float32)
    (got,) = execute(load(path).module, {"x": x}).values()
    functions = {"ReduceMax": np.max, "ReduceMin": np.min, "ArgMax": np.argmax, "ArgMin": np.argmin}
    with np.errstate(divide="ignore"):
        want = functions[kind](x, axis=1) if kind in functions else np.log(np.exp(x).sum(1))
    np.testing.assert_allclose(got.reshape(-1), want, rtol=1e-6)


@pytest.mark.parametrize("kind", ["Sum", "Max", "Mean", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare"])
def test_reductions_over_no_axes(kind: str, tmp_path: Path) -> None:
    """Every element stands for itself, under the operator's function."""
    net = OnnxNet(18)
    path = net.save(tmp_path / "net.onnx", [net.op(f"Reduce{kind}", net.input("x", 2, 3), net.ints(), noop_with_empty_axes=1)])
    x = np.asarray([[1, 2, 3], [0.5, 4, 0.25]], np.float32)
    (got,) = execute(load(path).module, {"x": x}).values()
    want = {"LogSum": np.log, "SumSquare": np.square}.get(kind, lambda v: v)(x)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_bool_reductions_and_masks_of_the_pooled_largest(tmp_path: Path) -> None:
    net = OnnxNet(20)
    x = net.input("x", 1, 2, 6, 6)
    window = {"kernel_shape": [2, 2], "strides": [2, 2]}
    pooled, places = net.op("MaxPool", x, kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 0, 1], outputs=2)
    positive = net.op("Cast", net.op("ReduceMax", net.op("Greater", x, net.const(0.0)), net.ints(2)), to=TensorProto.FLOAT)
    unpooled = net.op("MaxUnpool", *net.op("MaxPool", x, **window, outputs=2), **window)
    path = net.save(tmp_path / "net.onnx", [pooled, places, unpooled, positive])
    agrees(path)


@pytest.mark.parametrize("opset", [10, 18])
def test_pools_of_powers_in_ceil_mode(opset: int, tmp_path: Path) -> None:
    net = OnnxNet(opset)
    x = net.input("x", 1, 3, 7, 8)
    ceil = {"ceil_mode": 1} if opset >= 18 else {}
    agrees(net.save(tmp_path / "net.onnx", [net.op("LpPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 0], p=p, **ceil) for p in (1, 2, 3)]))


def test_indices_from_the_end_and_beyond_it(tmp_path: Path) -> None:
    """Negative indices count from the end; what lies beyond the data reads its border instead of foreign memory, or is left out."""
    net = OnnxNet(18)
    x, i = net.input("x", 3, 4), net.input("i", 2, 4, dtype=TensorProto.INT64)
    outputs = [net.op("GatherElements", x, i, axis=0), net.op("ScatterElements", x, i, net.weight(2, 4), axis=0, reduction="add")]
    model = load(net.save(tmp_path / "net.onnx", outputs))
    x_, i_ = samples(model)["x"], np.asarray([[-1, 0, 2, -3], [1, 1, 9, -9]])
    gathered, scattered = execute(model.module, {"x": x_, "i": i_}).values()
    np.testing.assert_array_equal(gathered, np.take_along_axis(x_, np.clip(np.where(i_ < 0, i_ + 3, i_), 0, 2), 0))
    assert np.isfinite(scattered).all() and (scattered[:, 2] != x_[:, 2]).sum() == 1, "the row behind the data is left out"


def test_constant_indices(tmp_path: Path) -> None:
    """One element is a scalar; what is beyond the data in every call is refused."""
    net = OnnxNet(18)
    x = net.input("x", 3, 4)
    model = load(net.save(tmp_path / "net.onnx", [net.op("GatherND", x, net.ints(1, -1))]))
    (found,) = execute(model.module, {"x": (x_ := samples(model)["x"])}).values()
    assert found.shape == () and found == x_[1, 3]
    for op, index, message in (
        ("GatherND", [[0, 4]], "index 4 is out of range for an axis of 4"),
        ("GatherND", [[-4]], "index -4 is out of range for an axis of 3"),
        ("GatherElements", [[3]], "index 3 is out of range for an axis of 3"),
        ("Gather", [3], "an index is out of range for an axis of 3"),
    ):
        net = OnnxNet(18)
        with pytest.raises(ModelError, match=message):
            load(net.save(tmp_path / "net.onnx", [net.op(op, net.input("x", 3, 4), net.const(index, "int64"))]))
    net = OnnxNet(18)
    with pytest.raises(ModelError, match=r"its batch axes are \[3\] in the data and \[2\] in the indices"):
        load(net.save(tmp_path / "net.onnx", [net.op("GatherND", net.input("x", 3, 4), net.const([[1], [2]], "int64"), batch_dims=1)]))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resizes_of_integers(mode: str, tmp_path: Path) -> None:
    net = OnnxNet(18)
    with pytest.raises(ModelError, match="rounds sums of uint8, which ONNX leaves open; supported: float32"):
        load(net.save(tmp_path / "net.onnx", [net.op("Resize", net.input("x", 1, 3, 4, 4, dtype=TensorProto.UINT8), "", net.const([1, 1, 2, 2]), mode=mode)]))


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize(("kind", "fmod"), [("Div", 0), ("Mod", 0), ("Mod", 1)])
def test_integers_divided_by_whatever_comes(kind: str, fmod: int, dtype: str, tmp_path: Path) -> None:
    """By 0, which ONNX Runtime refuses, the result is 0; the least number by -1, where its int64 traps, wraps."""
    element, least = TensorProto.DataType.Value(dtype.upper()), int(np.iinfo(dtype).min)
    attributes = {"fmod": fmod} if kind == "Mod" else {}
    a = np.array([7, 100, 5, least, least, 9, 0, 3], dtype)
    b = np.array([2, 3, 7, -1, 1, -1, -1, -2] if least < 0 else [2, 3, 7, 9, 1, 2, 9, 4]).astype(dtype)
    ports = [helper.make_tensor_value_info(name, element, [8]) for name in "ab"]
    path = saved(tmp_path / "net.onnx", [helper.make_node(kind, ["a", "b"], ["y"], **attributes)], ports)
    runtime, model = pytest.importorskip("onnxruntime"), load(path)
    (want,) = runtime.InferenceSession(str(path)).run(None, {"a": np.where((b == -1) if least < 0 else False, 0, a).astype(dtype), "b": b})
    if kind == "Div" and least < 0:
        want = np.where(b == -1, -a, want)  # in wrapping numbers
    (found,) = execute(model.module, {"a": a, "b": b}).values()
    np.testing.assert_array_equal(found, want)
    zeros = execute(model.module, {"a": a, "b": b * 0})
    assert not next(iter(zeros.values())).any()
    fixed = saved(tmp_path / "fixed.onnx", [helper.make_node(kind, ["a", "b"], ["y"], **attributes)], ports[:1], tensor(b, "b"))
    (found,) = execute(load(fixed).module, {"a": a}).values()
    np.testing.assert_array_equal(found, want)


def test_sparse_tensors(tmp_path: Path) -> None:
    def sparse(indices: object, values: object, dims: Sequence[int]) -> onnx.SparseTensorProto:
        return helper.make_sparse_tensor(tensor(np.asarray(values, np.float32)), tensor(np.asarray(indices, np.int64), "i"), dims)

    def file(what: onnx.SparseTensorProto) -> Path:
        path = saved(tmp_path / "net.onnx", [helper.make_node("Add", ["x", "w"], ["y"])], [image(1, 3, 3, 4)])
        model = onnx.load(path)
        model.graph.sparse_initializer.append(what)
        path.write_bytes(model.SerializeToString())
        return path

    dense = np.zeros((3, 4), np.float32)
    dense[0, 1], dense[2, 3] = 5, 7
    for indices in ([1, 11], [[0, 1], [2, 3]]):
        (got,) = execute(load(file(sparse(indices, [5, 7], (3, 4)))).module, {"x": np.ones((1, 3, 3, 4), np.float32)}).values()
        np.testing.assert_array_equal(got[0, 0], 1 + dense)
    for indices, values, dims in (([1, 50], [5, 7], (3, 4)), ([-1, 2], [5, 7], (3, 4)), ([1, 2, 3], [5, 7], (3, 4)), ([1, 2], [5, 7], (1 << 20, 1 << 20))):
        with pytest.raises(ModelError, match="the data of tensor 'w' is damaged"):
            load(file(sparse(indices, values, dims)))


BIG, BAD = tensor(np.ones((3, 1, 1), np.float32)), tensor(np.ones((3, 1, 1), np.float32))
BIG.dims[0], BAD.data_type = 1 << 62, 99
CONV, ADD, RESIZE = (helper.make_node(op, names, ["y"]) for op, names in (("Conv", ["x", "w"]), ("Add", ["x", "w"]), ("Resize", ["x", "", "w"])))


@pytest.mark.parametrize(
    ("node", "constant", "message"),
    [
        (ADD, BIG, "the data of tensor 'w' is damaged"),
        (ADD, BAD, "the data of tensor 'w' is damaged"),
        (
            CONV,
            tensor(np.asarray([[np.nan, 1, np.inf], [np.nan, 2, 3]], np.float32).reshape(2, 3, 1, 1)),
            "tensor 'w' holds 2 NaN and 1 Inf among its 6 elements",
        ),
        (ADD, tensor(np.asarray([np.nan, 1, np.inf, 1], np.float32)), "tensor 'w' holds 1 NaN among its 4 elements"),
        (RESIZE, tensor(np.asarray([1, 1, np.inf, 2], np.float32)), r"scales \[1.0, 1.0, inf, 2.0\] are not positive finite numbers"),
        (RESIZE, tensor(np.asarray([1, 1, -1, 2], np.float32)), "are not positive finite numbers"),
    ],
)
def test_constants_that_can_not_be(node: onnx.NodeProto, constant: onnx.TensorProto, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load(saved(tmp_path / "net.onnx", [node], [image()], constant))


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (image(1, 0, 3), r"input 'x' has shape \[1, 0, 3\]: it is empty along dimension 1"),
        (image(1, 3, element=TensorProto.INT4), "input 'x' has element type int4; supported: float16, .*integers of 8 to 64 bits"),
        (image(1, 3, element=TensorProto.FLOAT8E4M3FN), "input 'x' has element type float8e4m3fn"),
        (image(1, 3, element=TensorProto.STRING), "input 'x' has element type string"),
    ],
)
def test_inputs_that_can_not_be(declared: onnx.ValueInfoProto, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load(saved(tmp_path / "net.onnx", [helper.make_node("Identity", ["x"], ["y"])], [declared], opset=21))


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_unsigned_inputs_and_outputs(dtype: str, tmp_path: Path) -> None:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    path = saved(tmp_path / "net.onnx", [helper.make_node("Add", ["x", "x"], ["y"])], [image(3, element=element)])
    session = qcompiler.load(compile_float(path).save(tmp_path / "net.so"))
    x = np.asarray([0, 1, np.iinfo(dtype).max // 2], dtype)
    assert session.inputs[0].dtype == session.outputs[0].dtype == dtype
    np.testing.assert_array_equal(session.run({"x": x})["y"], x + x)


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    nodes = [helper.make_node("Neg", ["b"], ["y"]), helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Exp", ["x"], ["a"])]
    assert operators(load(saved(tmp_path / "net.onnx", nodes[:0:-1] + nodes[:1], [image()]))) == operators(
        load(saved(tmp_path / "other.onnx", [nodes[1], nodes[2], nodes[0]], [image()]))
    )
    with pytest.raises(ModelError, match="its operand 'y' is computed by no node before it"):
        load(saved(tmp_path / "net.onnx", [helper.make_node("Neg", ["y"], ["a"]), helper.make_node("Relu", ["a"], ["y"])], [image()]))


def test_a_foreign_operator_is_refused_whatever_its_name(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"], domain="com.acme")
    with pytest.raises(ModelError, match="operator 'com.acme::Relu' is not one of the ONNX standard"):
        load(saved(tmp_path / "net.onnx", [node], [image()]))


def rate(path: Path) -> Path:
    """Doubles x where the sampling rate `sr` is 16000, negates it otherwise."""

    def only(op: str, *names: str) -> onnx.GraphProto:
        return helper.make_graph([helper.make_node(op, list(names), ["z"])], op, [], [helper.make_empty_tensor_value_info("z")])

    nodes = [
        helper.make_node("Constant", [], ["wanted"], value=tensor(np.asarray(16000, np.int64), "c")),
        helper.make_node("Equal", ["sr", "wanted"], ["same"]),
        helper.make_node("If", ["same"], ["y"], then_branch=only("Add", "x", "x"), else_branch=only("Neg", "x")),
    ]
    return saved(path, nodes, [image(1, 4), helper.make_tensor_value_info("sr", TensorProto.INT64, [])])


def test_an_input_that_is_the_same_in_every_call(tmp_path: Path) -> None:
    path, x = rate(tmp_path / "net.onnx"), np.ones((1, 4), np.float32)
    both = load(path)
    for rate_, want in ((16000, 2), (8000, -1)):
        (got,) = execute(both.module, {"x": x, "sr": np.asarray(rate_, np.int64)}).values()
        np.testing.assert_array_equal(got, want * x)
    for value, want in (("16000", 2), (8000, -1), (np.int64(16000), 2)):
        model = load(path, input_values={"sr": value})
        assert [i.name for i in model.inputs] == ["x"] and model.fixed == {"sr": int(value)}
        (got,) = execute(model.module, {"x": x}).values()
        np.testing.assert_array_equal(got, want * x)
    artifact = qcompiler.compile(path, calibration=[{"x": x}], input_values={"sr": 16000})
    report = qcompiler.verify(artifact.save(tmp_path / "net.so"), path, [{"x": x}])
    assert report.samples == 1 and artifact.manifest["fixed_inputs"] == {"sr": 16000}
    for name, value, message in (
        ("rate", 1, "there is no input 'rate'"),
        ("sr", "fast", "its value can't be fast"),
        ("sr", 1.5, "its value can't be 1.5"),
        ("sr", [1, 2], "sr"),
    ):
        with pytest.raises(ModelError, match=message):
            load(path, input_values={name: value})


def test_loops_of_known_length_are_unrolled_and_no_others(tmp_path: Path) -> None:
    def body(condition: str) -> onnx.GraphProto:
        nodes = [helper.make_node("Add", ["v", "v"], ["w"]), helper.make_node(condition, ["go"] if condition == "Identity" else ["w"], ["on"])]
        if condition == "ReduceSum":
            nodes[1] = helper.make_node("ReduceSum", ["w"], ["s"], keepdims=0)
            nodes.append(helper.make_node("Greater", ["s", "limit"], ["on"]))
        infos = [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", TensorProto.BOOL, []), image(1, 4)]
        infos[2].name = "v"
        return helper.make_graph(nodes, "body", infos, [helper.make_empty_tensor_value_info(n) for n in ("on", "w")])

    constants = [tensor(np.asarray(3, np.int64), "n"), tensor(np.asarray(True), "yes"), tensor(np.asarray(0, np.float32), "limit")]
    node = helper.make_node("Loop", ["n", "yes", "x"], ["y"], body=body("Identity"))
    x = np.ones((1, 4), np.float32)
    (got,) = execute(load(saved(tmp_path / "net.onnx", [node], [image(1, 4)], *constants)).module, {"x": x}).values()
    np.testing.assert_array_equal(got, 8 * x)
    node = helper.make_node("Loop", ["n", "yes", "x"], ["y"], body=body("ReduceSum"))
    with pytest.raises(ModelError, match=r"how often it runs depends on data.*call that once a round.*--state"):
        load(saved(tmp_path / "net.onnx", [node], [image(1, 4)], *constants))


Build = Callable[[OnnxNet, str], list[str]]
ORDERED: list[Build] = [
    lambda n, x: n.op("TopK", x, n.ints(3), axis=1, outputs=2),
    lambda n, x: n.op("TopK", x, n.ints(2), axis=-1, largest=0, outputs=2),
    lambda n, x: [n.op("CumSum", x, n.const(1, "int64")), n.op("CumSum", x, n.const(-1, "int64"), exclusive=1, reverse=1)],
    lambda n, x: [n.op("ScatterND", x, n.const([[1, 0], [2, -1]], "int64"), n.weight(2, 5, 6)), n.op("Tile", x, n.ints(6, 4, 2, 1))],
    lambda n, x: [n.op("DFT", n.op("Unsqueeze", x, n.ints(-1)), axis=2), n.op("DFT", n.op("Unsqueeze", x, n.ints(-1)), axis=3, onesided=1)],
]


@pytest.mark.parametrize("build", ORDERED)
def test_ordered_operators_agree_with_onnx_runtime(build: Build, tmp_path: Path) -> None:
    net = OnnxNet(17)
    model = agrees(net.save(tmp_path / "net.onnx", build(net, net.input("x", 3, 4, 5, 6))), tolerance=1e-5)
    ours = {op[0] for _, e in Graph.of(model.module).bindings if (op := match_op(e))}
    assert ours <= {"qc.top_k", "qc.cumulative", "qc.scatter"}


def test_a_float16_network_takes_float16_data(tmp_path: Path) -> None:
    net = OnnxNet(17)
    x = net.input("x", 1, 3, 4, 4, dtype=TensorProto.FLOAT16)
    path = net.save(tmp_path / "net.onnx", [net.op("Relu", net.op("Conv", x, net.const(np.ones((2, 3, 1, 1)), "float16")))])
    data = np.random.default_rng(0).standard_normal((8, 3, 4, 4)).astype(np.float16)
    np.savez(tmp_path / "data.npz", x=data)
    wide = data.astype(np.float32)
    halves, wholes = (qcompiler.compile(path, calibration=c) for c in (tmp_path / "data.npz", [{"x": v[None]} for v in wide]))
    assert halves.manifest["values"] == wholes.manifest["values"]
    session = qcompiler.load(halves.save(tmp_path / "net.so"))
    for name, got in session.run({"x": data[:1]}).items():
        np.testing.assert_array_equal(got, session.run({"x": wide[:1]})[name])
