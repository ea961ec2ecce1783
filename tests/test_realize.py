"""The integer module against the QDQ module: within a quantum for every operator, and structure where it matters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from small_nets import NHWC, NHWC_T, Net, TinyPlan, evaluate, in_float, one_op, op, random_inputs, residual_net, scalar
from tvm import relax

from qcompiler.base.errors import ModelError
from qcompiler.numerics.spec import QParams
from qcompiler.passes import sequence
from qcompiler.passes.graph import Graph, GraphBuilder, const, const_value, match_op, relax_op
from qcompiler.passes.groups import find_groups
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.select_float import NO_LIMIT
from qcompiler.verification.interpreter import run


def names(module: tvm.IRModule) -> dict[str, str]:
    """value id -> operator of every binding."""
    return {n: (match_op(e) or (relax_op(e),))[0] or type(e).__name__ for n, e in Graph.of(module).bindings}


def compiled(module: tvm.IRModule, **options: Any) -> tuple[tvm.IRModule, tvm.IRModule, TinyPlan]:
    plan = TinyPlan(module, random_inputs(module), **options)
    qdq = insert_qdq(module, plan)
    return qdq, sequence.run(sequence.INTEGER, qdq), plan


def agrees(module: tvm.IRModule, mostly: float = 0.97, **options: Any) -> tuple[dict[str, np.ndarray], tvm.IRModule]:
    """Every int8 value of the integer module equals what the QDQ module computes from the same int8 operands, to a quantum, and mostly
    exactly.

    Each group is compared by itself: the QDQ module reads the integer module's values. Returns those values and the integer module.
    """
    qdq, integer, plan = compiled(module, **options)
    got = run(integer, plan.inputs, keep="all")
    quantized = [n for n, e in Graph.of(qdq).bindings if relax_op(e) == "relax.quantize"]
    twins = {n: next((v for k in (n, n.removesuffix("~q")) if (v := got.get(k)) is not None and v.dtype == np.int8), None) for n in quantized}
    given = {n: v for n, v in twins.items() if v is not None}
    assert len(given) >= 2, "nothing to compare"
    wanted = evaluate(qdq, plan.inputs, list(given), given)
    for name, twin in given.items():
        difference = np.abs(twin.astype(int) - wanted[name].astype(int))
        assert difference.max() <= 1, (name, difference.max())
        assert (difference == 0).mean() >= mostly, (name, (difference == 0).mean())
        assert len(np.unique(twin)) > 2, f"{name} hardly varies: the test compares nothing"
    return got, integer


def conv(n: Net, x: Any, **options: Any) -> Any:
    return n.add("y", op.nn.relu(n.conv("c", x, options.pop("out", 5), options.pop("kernel", 3), **options)))


def hard_swish(n: Net, x: Any) -> Any:
    shifted = n.add("g", op.add(n.add("f", op.multiply(x, scalar(1 / 6))), scalar(0.5)))
    return n.add("y", op.multiply(x, n.add("h", op.clip(shifted, 0.0, 1.0))))


def transposed(n: Net, x: Any, weight: Any, **attrs: Any) -> Any:
    return n.add("y", op.nn.conv2d_transpose(x, weight, strides=2, **attrs, **NHWC_T))


def resized(n: Net, x: Any, size: tuple[int, int], method: str, coordinates: str, **attrs: Any) -> Any:
    return n.add("y", op.image.resize2d(x, size, layout="NHWC", method=method, coordinate_transformation_mode=coordinates, **attrs))


def averaged(n: Net, x: Any, *geometry: tuple[int, ...], **attrs: Any) -> Any:
    return n.add("y", op.nn.avg_pool2d(x, *geometry, layout="NHWC", **attrs))


OPERATORS = {
    "conv": lambda n, x: conv(n, x),
    "conv 1x1 plain": lambda n, x: n.conv("y", x, 4, 1, bias=False),
    "conv strided, asymmetric padding": lambda n, x: conv(n, x, strides=2, padding=(0, 1, 2, 1)),
    "conv dilated": lambda n, x: conv(n, x, dilation=2, padding=(2, 2, 2, 2)),
    "conv grouped": lambda n, x: conv(n, x, out=6, groups=2),
    "conv depthwise": lambda n, x: conv(n, x, out=8, groups=8),
    "conv residual": lambda n, x: n.add("y", op.clip(n.add("s", op.add(n.conv("c", x, 8), n.add("r", op.tanh(x)))), -1.0, 2.0)),
    "conv leaky": lambda n, x: n.add("y", op.nn.leakyrelu(n.conv("c", x, 5), 0.2)),
    "conv prelu": lambda n, x: n.add("y", op.clip(n.add("p", op.nn.prelu(n.conv("c", x, 8), n.slopes(8), 3)), -0.4, 1.5)),
    "conv prelu residual": lambda n, x: n.add("y", op.add(n.add("p", op.nn.prelu(n.conv("c", x, 8), n.slopes(8), 3)), n.add("r", op.tanh(x)))),
    "conv residual prelu": lambda n, x: n.add("y", op.nn.prelu(n.add("s", op.add(n.conv("c", x, 8), n.add("r", op.tanh(x)))), n.slopes(8), 3)),
    "depthwise leaky": lambda n, x: n.add("y", op.nn.leakyrelu(n.conv("c", x, 8, groups=8), -0.3)),
    "transposed leaky": lambda n, x: n.add("y", op.nn.leakyrelu(n.add("c", op.nn.conv2d_transpose(x, n.random(8, 3, 2, 4, spread=0.2), **NHWC_T)), 1.5)),
    "dense prelu": lambda n, x: n.add("y", op.nn.prelu(n.add("m", op.matmul(x, n.random(8, 5))), n.slopes(5), 3)),
    "transposed": lambda n, x: transposed(n, x, n.random(8, 3, 2, 4, spread=0.2), padding=(1, 0, 1, 0), output_padding=(1, 0)),
    "transposed grouped": lambda n, x: transposed(n, x, n.random(8, 3, 3, 2, spread=0.2), groups=4),
    "transposed dilated": lambda n, x: transposed(n, x, n.random(8, 2, 3, 3, spread=0.2), dilation=(2, 1)),
    "dense": lambda n, x: n.add("y", op.nn.relu(n.add("b", op.add(n.add("m", op.matmul(x, n.random(8, 5))), n.random(5))))),
    "dense residual": lambda n, x: n.add("y", op.add(n.add("t", op.tanh(x)), n.add("m", op.matmul(x, n.random(8, 8, spread=0.3))))),
    "matmul": lambda n, x: n.add("y", op.clip(n.add("m", op.matmul(x, n.add("t", op.permute_dims(x, [0, 1, 3, 2])))), -4.0, 9.0)),
    "add": lambda n, x: n.add("y", op.nn.relu(n.add("s", op.add(x, n.add("t", op.mean(x, [1, 2], True)))))),
    "sub": lambda n, x: n.add("y", op.subtract(n.add("t", op.mean(x, [1], True)), x)),
    "sub from a constant": lambda n, x: n.add("y", op.subtract(n.random(8), x)),
    "mul": lambda n, x: n.add("y", op.nn.relu(n.add("s", op.multiply(x, n.add("t", op.mean(x, [3], True)))))),
    "mul by a constant": lambda n, x: n.add("y", op.multiply(x, n.random(1, 1, 7, 8))),
    "sigmoid": lambda n, x: n.add("y", op.sigmoid(x)),
    "gelu": lambda n, x: n.add("y", op.nn.gelu(x)),
    "silu": lambda n, x: n.add("y", op.nn.silu(x)),
    "leaky relu": lambda n, x: n.add("y", op.nn.leakyrelu(x, 0.2)),
    "hard-swish": hard_swish,
    "max pool": lambda n, x: n.add("y", op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1), ceil_mode=True, layout="NHWC")),
    "average pool": lambda n, x: averaged(n, x, (3, 2), (2, 1), (1, 1, 1, 0)),
    "average pool, padding counted": lambda n, x: averaged(n, x, (3, 3), (2, 2), (1, 1, 1, 1), count_include_pad=True),
    "mean": lambda n, x: n.add("y", op.clip(n.add("m", op.mean(x, [1, 2])), -0.1, 1.0)),
    "adaptive pool": lambda n, x: n.add("y", op.nn.adaptive_avg_pool2d(x, (1, 1), layout="NHWC")),
    "concat": lambda n, x: n.add("y", op.concat([x, n.add("t", op.tanh(x)), x], axis=2)),
    "split": lambda n, x: n.add("y", relax.TupleGetItem(n.add("parts", op.split(x, [3, 5], axis=3)), 1)),
    "slice": lambda n, x: n.add("y", op.strided_slice(x, [1, 2], [1, -4], [6, 7], [2, 1])),
    "pad": lambda n, x: n.add("y", op.nn.pad(x, [0, 0, 1, 2, 0, 3, 1, 0], "constant", -0.5)),
    "reflected": lambda n, x: n.add("y", op.nn.pad(x, [0, 0, 1, 2, 0, 3, 1, 0], "reflect")),
    "replicated": lambda n, x: n.add("y", op.nn.pad(x, [0, 0, 1, 2, 0, 3, 1, 0], "replicate")),
    "circular": lambda n, x: n.add("y", op.nn.pad(x, [0, 0, 1, 2, 0, 3, 1, 0], "circular")),
    "slice backwards": lambda n, x: n.add("y", op.strided_slice(x, [1, 3], [6, 7], [1, -9], [-2, -1])),
    "flip": lambda n, x: n.add("y", op.flip(x, 1)),
    "take": lambda n, x: n.add("y", op.take(x, relax.const(np.array([3, 1, 7, 0, 0], np.int64)), 3)),
    "repeated": lambda n, x: n.add("y", op.broadcast_to(n.add("m", op.mean(x, [1], True)), (1, 4, 7, 8))),
    "reshape": lambda n, x: n.add("y", op.reshape(x, (1, 42, 8))),
    "transpose": lambda n, x: n.add("y", op.tanh(n.add("u", op.permute_dims(n.add("t", op.tanh(x)), [0, 2, 1, 3])))),
    "nearest": lambda n, x: resized(n, x, (12, 14), "nearest_neighbor", "asymmetric", rounding_method="floor"),
    "linear half pixel": lambda n, x: resized(n, x, (11, 14), "linear", "half_pixel"),
    "linear aligned": lambda n, x: resized(n, x, (4, 13), "linear", "align_corners"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str) -> None:
    module = one_op(OPERATORS[name])
    last = next(g for g in find_groups(module) if g.id == "soft").inputs[0]  # "y", or its bias add
    got, integer = agrees(module, 0.85 if "linear" in name else 0.97)  # interpolated integers are often exact ties, which float noise breaks either way
    assert names(integer)[last].startswith("qc.") and got[last].dtype == np.int8
    assert set(Graph.of(integer).attrs["qc.float_ops"]) == {"soft"}, "only the softmax is float"


def test_residual_network_step_by_step() -> None:
    got, integer = agrees(residual_net())
    assert names(integer) == {
        "nhwc": "qc.quantize", "stem_r": "qc.conv2d", "a1_r": "qc.conv2d", "a2_b": "qc.conv2d",
        "block_a": "qc.conv2d", "b1_r": "qc.conv2d", "block_b": "qc.conv2d",
        "swish": "qc.lut", "mean": "qc.mean", "squeeze_b": "qc.conv2d", "gate": "qc.lut", "excited": "qc.mul",
        "max": "qc.max_pool2d", "avg": "qc.avg_pool2d",
        "cat~requantized": "qc.lut", "cat~requantized~1": "qc.lut", "cat": "qc.concat", "flat": "qc.reshape", "logits": "qc.dense",
    }  # fmt: skip
    attrs = Graph.of(integer).attrs
    assert attrs["qc.float_ops"] == {} and got["logits"].dtype == np.float32
    assert set(attrs["qc.params"]) == set(names(integer)) - {"logits"}


def random_net(seed: int) -> tvm.IRModule:
    """A random DAG of quantizable operators on images of one size; values are read any number of times."""
    net = Net(seed)
    rng, values = net.rng, [net.input("x", 1, 6, 6, 4)]
    one: list[Any] = [op.nn.relu, op.sigmoid, op.nn.silu, op.tanh, lambda v: op.clip(v, -0.5, 2.0), lambda v: op.multiply(v, scalar(-1.5))]
    one += [lambda v: op.nn.leakyrelu(v, 0.1), lambda v: op.nn.prelu(v, net.slopes(4), 3)]
    one += [lambda v: op.nn.max_pool2d(v, (3, 3), padding=(1, 1, 1, 1), layout="NHWC"), lambda v: op.permute_dims(v, [0, 2, 1, 3])]
    one += [lambda v: op.nn.avg_pool2d(v, (3, 3), padding=(1, 1, 1, 1), layout="NHWC"), lambda v: op.add(v, net.random(1, 1, 1, 4))]
    two: list[Any] = [op.add, op.add, op.multiply, op.subtract]
    for i in range(14):
        a, b = (values[max(0, len(values) - 1 - int(rng.integers(3)))] for _ in range(2))
        kind = rng.integers(4)
        if kind == 0:
            values.append(net.conv(f"v{i}", a, 4, int(rng.choice([1, 3])), groups=int(rng.choice([1, 4])), bias=bool(rng.integers(2))))
        elif kind == 1 and a is not b:
            values.append(net.add(f"v{i}", two[rng.integers(len(two))](a, b)))
        elif kind == 2 and a is not b:
            values.append(net.conv(f"v{i}", net.add(f"v{i}_cat", op.concat([a, b], axis=3)), 4, 1))
        else:
            values.append(net.add(f"v{i}", one[rng.integers(len(one))](a)))
    return net.done(net.conv("last", values[-1], 3, 1), values[-3])


@pytest.mark.parametrize("seed", range(4))
def test_random_networks(seed: int) -> None:
    module = random_net(seed)
    qdq, integer, _ = compiled(module)
    both = [[(g.id, g.kind) for g in find_groups(m) if g.kind not in ("quantize", "dequantize")] for m in (module, qdq)]
    assert both[0] == both[1]
    assert Graph.of(integer).attrs["qc.float_ops"] == {}
    agrees(module, 0.95)


def test_residual_network_output() -> None:
    module = residual_net(4)
    _, integer, plan = compiled(module)
    exact = evaluate(module, plan.inputs, ["logits"])["logits"]
    got = run(integer, plan.inputs, keep="outputs")["out0"]
    assert np.square(exact - got).sum() / np.square(exact).sum() < 1e-2


def test_convolution_attributes() -> None:
    net = Net()
    x = net.input("x", 1, 4, 4, 2)
    y = net.add("y", op.clip(net.conv("c", x, 3), 0.0, 6.0))
    params = {"x": QParams(0.5, 10), "y": QParams(0.25, -100)}
    _, integer, plan = compiled(net.done(net.add("soft", op.nn.softmax(y))), parameters=params)
    found = match_op(Graph.of(integer).values()["y"])
    assert found is not None
    attrs = found[2]
    assert attrs == {
        "strides": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1, "x_zero_point": 10, "zero_point": -100,
        "low": -100, "high": -76, "out_dtype": "int8",
    }  # fmt: skip
    weight, scale = plan.weight("y")
    _, w, bias, multiplier = (a if i == 0 else const_value(a) for i, a in enumerate(found[1]))
    np.testing.assert_array_equal(w, weight)
    single = scale.astype(np.float32).astype(np.float64)
    real = next(g for g in find_groups(plan.module) if g.id == "y").bias
    assert real is not None
    np.testing.assert_array_equal(bias, np.rint(real / (0.5 * single)).astype(np.int32))
    np.testing.assert_array_equal(multiplier, (0.5 * single / 0.25).astype(np.float32))


def test_edges_fuse_layout_changes() -> None:
    net = Net()
    x = net.add("nhwc", op.permute_dims(net.input("x", 1, 3, 4, 4), [0, 2, 3, 1]))
    y = net.add("y", op.sigmoid(net.conv("c", x, 3)))
    module = net.done(net.add("nchw", op.permute_dims(y, [0, 3, 1, 2])))
    _, integer, plan = compiled(module)
    assert names(integer) == {"nhwc": "qc.quantize", "c_b": "qc.conv2d", "y": "qc.lut", "nchw": "qc.dequantize"} or names(integer) == {
        "nhwc": "qc.quantize", "c_b": "qc.conv2d", "y": "qc.lut", "nchw~dq": "qc.dequantize"}  # fmt: skip
    got = run(integer, plan.inputs, keep="all")
    assert got["nhwc"].shape == (1, 4, 4, 3)
    exact = evaluate(module, plan.inputs, ["nchw"])["nchw"]
    assert np.abs(next(v for k, v in got.items() if k.startswith("nchw")) - exact).max() < 0.05


def test_layout_changes_around_float_fuse_too() -> None:
    builder = GraphBuilder()
    x = builder.input("x", (1, 3, 4, 4), "float32")
    scale, zero = const(np.float32(0.1)), const(np.int8(3))
    image = builder.emit("image", op.permute_dims(x, [0, 2, 3, 1]))
    back = builder.emit("dq", op.dequantize(builder.emit("q", op.quantize(image, scale, zero, out_dtype="int8")), scale, zero))
    module = builder.finish([("y", builder.emit("y", op.permute_dims(back, [0, 3, 1, 2])))])
    integer = sequence.run(sequence.INTEGER, module)
    assert names(integer) == {"q": "qc.quantize", "y": "qc.dequantize"} and Graph.of(integer).attrs["qc.float_ops"] == {}
    value = np.linspace(-9, 9, 48, dtype=np.float32).reshape(1, 3, 4, 4)
    assert np.abs(run(integer, {"x": value}, keep="outputs")["y"] - value).max() <= 0.0501


def test_quantization_chains() -> None:
    builder = GraphBuilder()
    q = builder.emit("q", op.quantize(builder.input("x", (1, 64), "float32"), const(np.float32(0.1)), const(np.int8(3)), out_dtype="int8"))
    dq = builder.emit("dq", op.dequantize(q, const(np.float32(0.1)), const(np.int8(3))))
    same = builder.emit("same", op.quantize(dq, const(np.float32(0.1)), const(np.int8(3)), out_dtype="int8"))
    dq = builder.emit("dq2", op.dequantize(same, const(np.float32(0.1)), const(np.int8(3))))
    other = builder.emit("other", op.quantize(dq, const(np.float32(0.3)), const(np.int8(-9)), out_dtype="int8"))
    integer = sequence.run(sequence.INTEGER, builder.finish([("y", builder.emit("dq3", op.dequantize(other, const(np.float32(0.3)), const(np.int8(-9)))))]))
    assert names(integer) == {"q": "qc.quantize", "other": "qc.lut", "dq3": "qc.dequantize"}
    x = np.linspace(-12, 12, 64, dtype=np.float32)[None]
    assert np.abs(run(integer, {"x": x}, keep="outputs")["y"] - x).max() <= 0.05 + 0.15 + 1e-5


def test_float_between_int8_edges() -> None:
    net = Net()
    a = net.conv("a", net.input("x", 1, 4, 4, 2), 4)
    module = net.done(net.conv("c", net.add("soft", in_float(a)), 3))
    _, integer, _ = compiled(module)
    assert names(integer) == {
        "x~q": "qc.quantize",
        "a_b": "qc.conv2d",
        "a_b~dq": "qc.dequantize",
        "soft": "relax.nn.softmax",
        "soft~q": "qc.quantize",
        "c_b": "qc.conv2d",
    }
    assert Graph.of(integer).attrs["qc.float_ops"] == {"soft": "softmax has an integer form over the last axis only"}


def test_float_outputs_come_from_the_accumulator() -> None:
    net = Net()
    x = net.input("x", 1, 4, 4, 2)
    clipped = net.add("clipped", op.clip(net.conv("a", x, 2), -0.25, 0.5))
    added = net.add("added", op.nn.relu(net.add("sum", op.add(net.conv("b", x, 2), x))))
    product = net.add("product", op.nn.relu(net.add("m", op.matmul(x, net.add("t", op.permute_dims(x, [0, 1, 3, 2]))))))
    module = net.done(clipped, added, product)
    qdq, integer, plan = compiled(module)
    kinds = names(integer)
    assert (kinds["clipped"], kinds["added~accumulated"], kinds["product~accumulated"]) == ("qc.conv2d", "qc.conv2d", "qc.matmul")
    got = run(integer, plan.inputs, keep="outputs")
    wanted = evaluate(qdq, plan.inputs, ["clipped", "added", "product"])
    for output, name in [("out0", "clipped"), ("out1", "added"), ("out2", "product")]:
        assert got[output].dtype == np.float32 and np.abs(got[output] - wanted[name]).max() < 2e-2


def test_skipped_group_stays_float_with_its_reason() -> None:
    net = Net()
    x = net.input("x", 1, 4, 4, 2)
    y = net.add("y", op.add(net.add("a", op.tanh(x)), net.add("b", op.sigmoid(x))))
    module = net.done(net.conv("c", y, 3))
    _, integer, _ = compiled(module, skip={"y": "its error is too large"})
    assert names(integer)["y"] == "relax.add" and names(integer)["y~q"] == "qc.quantize"
    assert Graph.of(integer).attrs["qc.float_ops"] == {"y": "its error is too large"}


def test_skipped_convolutions_keep_float_weights() -> None:
    net = Net()
    x = net.input("x", 1, 4, 4, 2)
    y = net.conv("y", x, 3)
    t = net.add("t", op.nn.conv2d_transpose(y, net.random(3, 2, 2, 2), strides=2, dilation=2, **NHWC_T))
    module = net.done(net.conv("z", t, 2))
    _, integer, plan = compiled(module, skip={"y_b": "asked for", "t": "asked for"})
    kinds = names(integer)
    assert (kinds["y_b"], kinds["t"], kinds["z_b"]) == ("qc.f32.conv2d", "qc.f32.conv2d_transpose", "qc.conv2d")
    exact = evaluate(module, plan.inputs, ["z_b"])["z_b"]
    assert np.abs(run(integer, plan.inputs, keep="outputs")["out0"] - exact).max() < 0.1 * np.abs(exact).max()


def test_accumulator_beyond_int32_names_the_operator() -> None:
    with pytest.raises(ModelError, match=r"^dense 'b': its accumulator can reach \d+, beyond int32; keep this operator in float$"):
        sequence.run(sequence.INTEGER, dense_of_constants(140000, 1.0))
    with pytest.raises(ModelError, match=r"^dense 'b': a bias is 5e\+09 units of x_scale \* weight_scale, beyond int32; keep this operator"):
        sequence.run(sequence.INTEGER, dense_of_constants(8, 1e-9))


def dense_of_constants(width: int, weight_scale: float) -> tvm.IRModule:
    builder = GraphBuilder()
    scale, zero = const(np.float32(0.1)), const(np.int8(0))
    q = builder.emit("q", op.quantize(builder.input("x", (1, width), "float32"), scale, zero, out_dtype="int8"))
    x = builder.emit("dq", op.dequantize(q, scale, zero))
    w = builder.emit(
        "w",
        op.dequantize(const(np.full((1, width), 127, np.int8)), const(np.full(1, weight_scale, np.float32)), const(np.zeros(1, np.int8)), axis=0),
    )
    y = builder.emit("y", op.matmul(x, builder.emit("wt", op.permute_dims(w, [1, 0]))))
    y = builder.emit("b", op.add(y, const(np.full((1, 1), 0.5, np.float32))))
    return builder.finish([("y", y)])


def test_pool_with_other_parameters_requantizes_first() -> None:
    module = one_op(OPERATORS["max pool"])
    _, integer, _ = compiled(module, parameters={"y": QParams(0.1, 5)})
    assert names(integer)["y~requantized"] == "qc.lut" and names(integer)["y"] == "qc.max_pool2d"
    assert Graph.of(integer).attrs["qc.params"]["y"] == [float(np.float32(0.1)), 5]
    agrees(module, parameters={"y": QParams(0.1, 5)}, mostly=0.9)


# -- select_float ----------------------------------------------------------------------------------------------------------------------


def test_select_float_names_the_same_values() -> None:
    module = residual_net()
    chosen = names(sequence.run(sequence.FLOAT, module))
    assert {g.id for g in find_groups(module)} <= set(chosen)
    assert {k for k, v in chosen.items() if v == "qc.f32.conv2d"} == {"stem_r", "a1_r", "a2_b", "block_a", "b1_r", "block_b", "squeeze_b"}
    assert chosen["logits"] == "qc.f32.dense" and "stem" not in chosen and chosen["h2"] == "relax.multiply"


def test_select_float_attributes() -> None:
    net = Net()
    x = net.input("x", 1, 4, 4, 2)
    y = net.add("y", op.clip(net.add("s", op.add(net.conv("c", x, 2), x)), -1.0, 6.0))
    z = net.conv("z", y, 3, 1, bias=False)
    values = Graph.of(sequence.run(sequence.FLOAT, net.done(z))).values()
    first, second = match_op(values["y"]), match_op(values["z"])
    assert first is not None and second is not None
    assert first[2] == {"strides": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1, "low": -1.0, "high": 6.0}
    assert [str(first[1][0].name), const_value(first[1][1]).shape, const_value(first[1][2]).dtype, str(first[1][3].name)] == [
        "x",
        (2, 3, 3, 2),
        np.float32,
        "x",
    ]
    assert (second[2]["low"], second[2]["high"]) == (-NO_LIMIT, NO_LIMIT) and not const_value(second[1][2]).any()


def test_select_float_computes_the_same() -> None:
    net = Net()
    x = net.input("x", 1, 4, 4, 6)
    parts = net.add("parts", op.split(x, 2, axis=3))
    left, right = (net.add(f"part{i}", relax.TupleGetItem(parts, i)) for i in range(2))
    y = net.add("y", op.nn.relu(net.add("s", op.add(net.conv("c", left, 3), right))))
    t = net.add("t", op.nn.conv2d_transpose(y, net.random(3, 2, 3, 4), strides=2, dilation=(2, 1), padding=(1, 1, 1, 1), **NHWC_T))
    d = net.add("d", op.add(net.add("m", op.matmul(t, net.random(4, 5))), net.random(5)))
    module = net.done(d)
    chosen = sequence.run(sequence.FLOAT, module)
    assert names(chosen)["part1"] == "relax.strided_slice" and "parts" not in names(chosen)
    inputs = random_inputs(module)
    # the transposed convolution by its definition: every input pixel scatters its kernel
    reference = run(chosen, inputs, keep="all")
    kernel = const_value(Graph.of(module).values()["t"].args[1])
    source, scattered = reference["y"][0], np.zeros((4 * 2 - 2 + 3, 4 * 2 - 2 + 3, 4))
    for i, j, a, b in np.ndindex(4, 4, 2, 3):
        scattered[2 * i + 2 * a, 2 * j + b] += source[i, j] @ kernel[:, a, b, :]
    np.testing.assert_allclose(reference["t"][0], scattered[1:-1, 1:-1], rtol=1e-4, atol=1e-5)


def test_one_dimensional_networks_pass() -> None:
    net = Net()
    x = net.add("x4", op.expand_dims(net.input("x", 1, 20, 3), 1))
    y = net.add("y", op.nn.conv2d(x, net.random(4, 1, 5, 3), padding=(0, 2, 0, 2), **NHWC))
    agrees(net.done(net.add("soft", op.nn.softmax(net.add("flat", op.squeeze(y, [1]))))))
