"""Groups: what belongs together, what ends a group, why an operator stays float."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from small_nets import NHWC, NHWC_T, Net, one_op, op, residual_net, scalar
from tvm import relax

from qcompiler.passes.graph import Graph, const
from qcompiler.passes.groups import Group, find_groups
from qcompiler.passes.unary import Unary, join_clamps


def groups_of(module: tvm.IRModule) -> dict[str, Group]:
    found = find_groups(module)
    members = [m for g in found for m in g.members]
    assert sorted(members) == sorted(n for n, _ in Graph.of(module).bindings), "every binding belongs to exactly one group"
    order = {n: i for i, (n, _) in enumerate(Graph.of(module).bindings)}
    assert [order[g.id] for g in found] == sorted(order[g.id] for g in found)
    assert all(g.id in g.members for g in found)
    assert all(g.reason is not None for g in found if g.kind == "float")
    return {g.id: g for g in found}


def test_residual_net() -> None:
    groups = groups_of(residual_net())
    kinds = {k: g.kind for k, g in groups.items()}
    assert kinds == {
        "nhwc": "transpose", "stem_r": "conv2d", "a1_r": "conv2d", "a2_b": "conv2d", "block_a": "conv2d", "b1_r": "conv2d",
        "block_b": "conv2d", "swish": "unary", "mean": "mean", "squeeze_b": "conv2d", "gate": "unary", "excited": "mul",
        "max": "max_pool2d", "avg": "avg_pool2d", "cat": "concat", "flat": "reshape", "logits": "dense",
    }  # fmt: skip
    block = groups["block_a"]  # both operands of the add are convolutions: the later one takes it
    assert (block.members, block.inputs, block.residual) == (("skip", "skip_b", "sum_a", "block_a"), ("stem_r",), "a2_b")
    assert (block.low, block.high) == (0.0, None) and groups["a1_r"].high == 6.0
    assert (groups["block_b"].residual, groups["block_b"].inputs) == ("block_a", ("b1_r",))
    assert groups["b1_r"].attrs == {"strides": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 16}
    assert groups["swish"].function is not None and groups["swish"].function.name == "hard_swish"
    assert groups["logits"].weight is not None and groups["logits"].weight.shape == (10, 288)
    assert groups["cat"].inputs == ("max", "avg") and groups["cat"].attrs == {"axis": 3}


def test_bias_forms() -> None:
    net = Net()
    x = net.conv("c", net.input("x", 1, 4, 4, 2), 3, bias=False)
    x = net.add("a", op.add(const(np.array([1, 2, 3], np.float32)), x))
    x = net.add("s", op.subtract(x, const(np.array([[[[3, 2, 1]]]], np.float32))))
    x = net.add("t", op.add(x, scalar(0.5)))
    group = groups_of(net.done(x))["t"]
    assert group.members == ("c", "a", "s", "t") and group.bias is not None
    np.testing.assert_array_equal(group.bias, [-1.5, 0.5, 2.5])


def test_what_ends_a_group() -> None:
    net = Net()
    x = net.input("x", 1, 4, 4, 2)
    first = net.conv("first", x, 2)
    second = net.conv("second", first, 2)
    relu = net.add("relu", op.nn.relu(second))
    sigmoid = net.add("sigmoid", op.sigmoid(second))
    third = net.conv("third", x, 2)
    wide = net.add("wide", op.add(third, net.random(1, 4, 4, 2)))  # not per channel: no bias
    clamped = net.add("clamped", op.nn.relu(net.conv("fourth", x, 2)))
    summed = net.add("summed", op.add(clamped, wide))  # after the activation: not a residual of "fourth"
    groups = groups_of(net.done(first, relu, sigmoid, summed))
    assert groups["first_b"].kind == groups["second_b"].kind == groups["third_b"].kind == "conv2d"  # output; read twice; plain
    assert groups["wide"].kind == "add" and groups["wide"].inputs == ("third_b",) and groups["wide"].attrs["constant"] == 1
    assert groups["summed"].kind == "add" and groups["summed"].inputs == ("clamped", "wide")
    assert groups["relu"].function is not None and groups["relu"].function.name == "relu"


def test_slopes_are_part_of_a_layer_on_either_side_of_its_residual() -> None:
    net = Net()
    x = net.input("x", 1, 4, 4, 2)
    first = net.add("first", op.nn.prelu(net.conv("a", x, 2), const(np.array([0.25, -1], np.float32)), 3))
    before = net.add("before", op.add(net.add("bent", op.nn.leakyrelu(net.conv("b", first, 2), 0.5)), first))
    behind = net.add("behind", op.nn.relu(net.add("leaky", op.nn.leakyrelu(net.add("sum", op.add(net.conv("c", before, 2), before)), 0.5))))
    twice = net.add("twice", op.nn.leakyrelu(net.add("once", op.nn.leakyrelu(net.conv("d", behind, 2), 0.5)), 0.5))
    biased = net.add("biased", op.add(net.add("e_leaky", op.nn.leakyrelu(net.conv("e", twice, 2), 0.5)), net.random(2)))
    steep = net.add("steep", op.nn.leakyrelu(net.conv("f", biased, 2), float("inf")))
    groups = groups_of(net.done(steep))
    assert [(k, g.residual, g.bends_sum, g.straight) for k, g in groups.items() if g.slopes is not None] == [
        ("first", None, False, "a_b"), ("before", "first", False, "b_b"), ("behind", "before", True, "sum"), ("once", None, False, "d_b"),
        ("e_leaky", None, False, "e_b"),
    ]  # fmt: skip
    np.testing.assert_array_equal(groups["first"].slopes, [0.25, -1])
    assert {k: groups[k].kind for k in ("twice", "biased", "f_b", "steep")} == {"twice": "unary", "biased": "add", "f_b": "conv2d", "steep": "float"}
    front = groups["behind"].front
    assert (front.id, front.members, front.residual, front.slopes, front.low) == ("sum", ("c", "c_b", "sum"), "before", None, None)
    assert groups["before"].front.residual is None and groups["f_b"].front is groups["f_b"]


def test_residual_must_not_broadcast() -> None:
    net = Net()
    x = net.input("x", 1, 4, 4, 2)
    small = net.add("small", op.mean(x, [1, 2], True))
    y = net.add("y", op.add(net.conv("c", x, 2), small))
    groups = groups_of(net.done(net.add("z", op.nn.relu(y))))
    assert groups["c_b"].residual is None and groups["z"].kind == "add" and groups["z"].low == 0.0


def test_transposed_convolution_weight_form() -> None:
    net = Net()
    value = net.rng.standard_normal((4, 3, 2, 3)).astype(np.float32)  # I, KH, KW, O/groups
    y = net.add("y", op.nn.conv2d_transpose(net.input("x", 1, 5, 5, 4), const(value), strides=2, groups=2, output_padding=(1, 1), **NHWC_T))
    group = groups_of(net.done(y))["y"]
    assert group.weight is not None and group.weight.shape == (6, 3, 2, 2) and group.attrs["output_padding"] == [1, 1]
    np.testing.assert_array_equal(group.weight[4, :, :, 1], value[3, :, :, 1])  # second group: output 3 + 1, input 2 + 1


def test_split_becomes_slices() -> None:
    net = Net()
    parts = net.add("parts", op.split(net.input("x", 1, 4, 4, 7), [2, 3], axis=-1))
    taken = [net.add(f"p{i}", relax.TupleGetItem(parts, i)) for i in (2, 0)]
    groups = groups_of(net.done(*taken))
    assert {k: (g.kind, g.members) for k, g in groups.items()} == {"p2": ("slice", ("parts", "p2")), "p0": ("slice", ("p0",))}
    assert groups["p2"].attrs == {"begin": [0, 0, 0, 3], "end": [1, 4, 4, 7], "strides": [1, 1, 1, 1]} and groups["p2"].inputs == ("x",)


def hard_swish(n: Net, x: Any) -> Any:
    shifted = n.add("b", op.add(n.add("a", op.multiply(x, scalar(1 / 6))), scalar(0.5)))
    return op.multiply(x, n.add("c", op.clip(shifted, 0.0, 1.0)))


def erf_gelu(n: Net, x: Any) -> Any:
    half = n.add("h", op.multiply(x, scalar(0.5)))
    erf = n.add("e", op.erf(n.add("d", op.divide(x, scalar(2**0.5)))))
    return op.multiply(half, n.add("e1", op.add(erf, scalar(1))))


def mish(n: Net, x: Any) -> Any:
    softplus = n.add("l", op.log(n.add("o", op.add(n.add("e", op.exp(x)), scalar(1)))))
    return op.multiply(x, n.add("t", op.tanh(softplus)))


def chosen_elu(n: Net, x: Any) -> Any:
    bent = n.add("s", op.subtract(n.add("e", op.exp(x)), scalar(1)))
    return op.where(n.add("c", op.greater(x, scalar(0))), x, bent)


def computed_weights(n: Net, x: Any) -> Any:
    return op.nn.conv2d(x, n.add("w", op.reshape(x, (8, 1, 42, 1))), padding=(0, 18, 0, 17), groups=8, **NHWC)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("hard_swish", hard_swish),
        ("silu", lambda n, x: op.multiply(n.add("s", op.sigmoid(x)), x)),
        ("gelu", erf_gelu),
        ("mish", mish),
        ("where", chosen_elu),
        ("relu6", lambda n, x: op.clip(x, 0.0, 6.0)),
        ("multiply", lambda n, x: op.multiply(x, scalar(3))),
        ("leakyrelu", lambda n, x: op.nn.leakyrelu(x, 0.1)),
        ("hard_sigmoid", lambda n, x: op.divide(n.add("b", op.clip(n.add("a", op.add(x, scalar(3))), 0.0, 6.0)), scalar(6))),
    ],
)  # fmt: skip
def test_expressions_of_one_tensor(name: str, make: Any) -> None:
    net = Net()
    x = net.input("x", 1, 4, 4, 2)
    y = net.add("y", make(net, x))
    group = groups_of(net.done(net.add("soft", op.nn.softmax(y))))["y"]
    assert group.kind == "unary" and group.inputs == ("x",) and group.function is not None and group.function.name == name


def test_an_interior_value_read_elsewhere_splits_the_expression() -> None:
    net = Net()
    x = net.input("x", 1, 4)
    inner = net.add("inner", op.sigmoid(x))
    groups = groups_of(net.done(net.add("y", op.multiply(x, inner)), inner))
    assert groups["inner"].kind == "unary" and groups["y"].kind == "mul" and groups["y"].inputs == ("x", "inner")


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("softmax has an integer form over the last axis only", lambda n, x: op.nn.softmax(x, axis=1)),
        ("exp is too steep for the uniform steps of 8 bits", lambda n, x: op.exp(x)),
        ("log is not finite for every input", lambda n, x: op.log(x)),
        ("square is too steep for the uniform steps of 8 bits", lambda n, x: op.multiply(x, x)),
        ("the weights are computed at run time", computed_weights),
        (
            "conv2d has an int8 kernel for layouts NHWC and OHWI only, not NCHW and OIHW",
            lambda n, x: op.nn.conv2d(x, n.random(2, 6, 1, 1)),
        ),
        (
            "operator 'take' has no int8 kernel for indices outside of its operand",
            lambda n, x: op.take(x, relax.const(np.array([0, 9], np.int64)), 3, mode="clip"),
        ),
        (
            "resize has int8 kernels for layout NHWC, nearest and linear, not NHWC and cubic",
            lambda n, x: op.image.resize2d(x, (9, 9), layout="NHWC", method="cubic"),
        ),
        ("take of 65 pieces has no int8 kernel; supported: up to 64", lambda n, x: op.take(x, relax.const(np.array([0, 5, 1, 3] * 32 + [7, 0]), "int64"), 3)),
        ("average pooling with dilation has no int8 kernel", lambda n, x: op.nn.avg_pool2d(x, (2, 2), dilation=(2, 2), layout="NHWC")),
        ("operator 'where' has no int8 kernel", lambda n, x: op.where(n.input("c", 1, 6, 7, 8, dtype="bool"), scalar(1), scalar(0))),
        ("operator 'divide' has no int8 kernel", lambda n, x: op.divide(x, n.add("m", op.mean(x, [3], True)))),
        ("concatenation with a constant has no int8 kernel", lambda n, x: op.concat([x, n.random(1, 6, 7, 1)], axis=3)),
        ("a constant matrix of shape [6, 8, 3] has no int8 kernel; supported: [K, N]", lambda n, x: op.matmul(x, n.random(6, 8, 3))),
        (
            "there are int8 kernels for float32 tensors only, not int32",
            lambda n, x: op.add(n.add("i", op.astype(x, "int32")), const(np.int32(1))),
        ),
        ("pooling has an int8 kernel for layout NHWC only, not NCHW", lambda n, x: op.nn.max_pool2d(x)),
    ],
)  # fmt: skip
def test_reasons(reason: str, make: Any) -> None:
    net = Net()
    y = net.add("y", make(net, net.input("x", 1, 6, 7, 8)))
    group = groups_of(net.done(y))["y"]
    assert (group.kind, group.reason) == ("softmax" if "softmax" in reason else "float", reason)


def test_ceil_mode_is_padding() -> None:
    group = groups_of(one_op(lambda n, x: n.add("y", op.nn.max_pool2d(x, (3, 3), (2, 2), ceil_mode=True, layout="NHWC"))))["y"]
    assert group.shape == (1, 3, 3, 8) and group.attrs["padding"] == [0, 0, 1, 0]


def test_slice_bounds_are_normalized() -> None:
    group = groups_of(one_op(lambda n, x: n.add("y", op.strided_slice(x, [-1, 1], [-3, 1], [9223372036854775807, -1], [2, 1]))))["y"]
    assert group.attrs == {"begin": [0, 1, 0, 5], "end": [1, 5, 7, 8], "strides": [1, 1, 1, 2]} and group.shape == (1, 4, 7, 2)


def test_constant_output_and_shared_weight() -> None:
    net = Net()
    x = net.input("x", 1, 4, 4, 2)
    weight = net.random(2, 1, 1, 2)
    y = net.add("y", op.nn.conv2d(net.add("z", op.nn.conv2d(x, weight, **NHWC)), weight, **NHWC))
    groups = groups_of(net.done(y, net.add("k", net.random(3))))
    assert groups["y"].kind == groups["z"].kind == "conv2d" and groups["k"].reason == "a constant"


def test_join_clamps() -> None:
    assert join_clamps((None, None), (0.0, None)) == (0.0, None)
    assert join_clamps((0.0, None), (None, 6.0)) == (0.0, 6.0)
    assert join_clamps((0.0, 6.0), (7.0, 9.0)) == (7.0, 7.0)
    assert join_clamps((-1.0, 1.0), (0.0, None)) == (0.0, 1.0)


def test_unary_evaluates_in_float64() -> None:
    function = Unary(("multiply", "x", ("sigmoid", "x")))
    x = np.array([-800.0, -1.0, 0.0, 3.0], np.float32)
    np.testing.assert_allclose(function(x), [0.0, -1 / (1 + np.e), 0.0, 3 / (1 + np.exp(-3.0))], rtol=1e-14, atol=1e-14)
    assert Unary(("clip", "x", 0.0, 0.0))(x).shape == (4,)
