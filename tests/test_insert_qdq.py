"""The QDQ module: structure, weights, what stays float, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from small_nets import NHWC, NHWC_T, Net, TinyPlan, evaluate, in_float, op, random_inputs, residual_net, scalar

from qcompiler.base.errors import PlanError
from qcompiler.numerics.spec import QParams
from qcompiler.passes.graph import Graph, const_value, is_const, relax_op
from qcompiler.passes.groups import find_groups
from qcompiler.passes.insert_qdq import BIAS_LIMIT, fit_bias, insert_qdq, quantized_bias


def planned(module: tvm.IRModule, **options: object) -> TinyPlan:
    return TinyPlan(module, random_inputs(module), **options)  # type: ignore[arg-type]


def test_before_and_after() -> None:
    net = Net()
    y = net.add("y", op.nn.relu(net.conv("c", net.input("x", 1, 4, 4, 2), 3)))
    module = net.done(net.add("soft", in_float(y)))
    plan = planned(module)
    graph = Graph.of(insert_qdq(module, plan))
    assert [(n, relax_op(e)) for n, e in graph.bindings] == [
        ("y~weight", "relax.dequantize"),
        ("x~q", "relax.quantize"),
        ("x~dq", "relax.dequantize"),
        ("c", "relax.nn.conv2d"),
        ("c_b", "relax.add"),
        ("y", "relax.nn.relu"),
        ("y~q", "relax.quantize"),
        ("y~dq", "relax.dequantize"),
        ("soft", "relax.nn.softmax"),
    ]
    assert graph.attrs["qc.float_ops"] == {"soft": "softmax has an integer form over the last axis only"}
    values = graph.values()
    weight, scale = plan.weight("y")
    np.testing.assert_array_equal(const_value(values["y~weight"].args[0]), weight)
    np.testing.assert_array_equal(const_value(values["y~weight"].args[1]), scale.astype(np.float32))
    params = plan.params("y")
    assert params is not None and float(const_value(values["y~q"].args[1])) == np.float32(params.scale)
    assert int(const_value(values["y~q"].args[2])) == params.zero_point
    assert str(values["c"].args[0].name) == "x~dq" and str(values["soft"].args[0].name) == "y~dq"


def test_groups_are_the_same_in_both_modules() -> None:
    module = residual_net()
    qdq = insert_qdq(module, planned(module))
    before = {g.id: g for g in find_groups(module)}
    after = {g.id: g for g in find_groups(qdq) if g.kind not in ("quantize", "dequantize")}
    assert list(before) == list(after)
    for name, group in before.items():
        twin = after[name]
        assert (twin.kind, twin.attrs, twin.low, twin.high) == (group.kind, group.attrs, group.low, group.high)
        assert [i.removesuffix("~dq") for i in twin.inputs] == list(group.inputs)
        if group.weight is not None:
            assert twin.weight is not None and twin.weight_scale is not None and twin.weight.dtype == np.int8
            real = twin.weight * twin.weight_scale.reshape(-1, *[1] * (twin.weight.ndim - 1))
            assert np.abs(real - group.weight).max() <= 0.51 * twin.weight_scale.max()


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_weights_survive_the_round_trip(groups: int) -> None:
    net = Net()
    y = net.add("y", op.nn.conv2d_transpose(net.input("x", 1, 5, 5, 4), net.random(4, 3, 2, 3), strides=2, groups=groups, **NHWC_T))
    module = net.done(net.add("soft", in_float(y)))
    plan = planned(module)
    qdq = insert_qdq(module, plan)
    group = next(g for g in find_groups(qdq) if g.id == "y")
    weight, scale = plan.weight("y")
    np.testing.assert_array_equal(group.weight, weight)
    np.testing.assert_array_equal(group.weight_scale, scale.astype(np.float32))
    inputs = random_inputs(module)
    exact, rounded = (evaluate(m, inputs, ["y"])["y"] for m in (module, qdq))
    assert np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()


def test_qdq_network_stays_close_to_float() -> None:
    module = residual_net()
    plan = planned(module)
    inputs = random_inputs(module)
    exact, rounded = (evaluate(m, inputs, ["logits"])["logits"] for m in (module, insert_qdq(module, plan)))
    noise = np.square(exact - rounded).sum() / np.square(exact).sum()
    assert 0 < noise < 1e-2  # 20 dB at least; a random network has no redundancy


def test_float_consumers_see_what_int8_consumers_see() -> None:
    net = Net()
    y = net.conv("c", net.input("x", 1, 4, 4, 2), 2)
    module = net.done(net.add("soft", in_float(y)), net.conv("d", y, 2))
    graph = Graph.of(insert_qdq(module, planned(module)))
    assert str(graph.values()["soft"].args[0].name) == "c_b~dq" == str(graph.values()["d"].args[0].name)
    assert [str(v.name) for _, v in graph.outputs] == ["soft", "d_b"]  # a dense output is float32: never rounded to 8 bits


def test_skipped_groups_and_float_values_keep_float() -> None:
    net = Net()
    x = net.input("x", 1, 4, 4, 2)
    a = net.conv("a", x, 2)
    b = net.conv("b", a, 2)
    module = net.done(net.conv("c", b, 2))
    graph = Graph.of(insert_qdq(module, planned(module, skip={"b_b": "the user asked for it"})))
    assert graph.attrs["qc.float_ops"] == {"b_b": "the user asked for it"}
    assert is_const(graph.values()["b"].args[1]) and str(graph.values()["b"].args[0].name) == "a_b~dq"
    assert str(graph.values()["c"].args[0].name) == "b_b~dq"


def test_float_data_movement_needs_no_reason_in_the_plan() -> None:
    net = Net()
    y = net.conv("c", net.input("x", 1, 4, 4, 2), 3)
    module = net.done(net.add("nchw", op.permute_dims(y, [0, 3, 1, 2])))
    plan = planned(module, parameters={"c_b": None, "nchw": None})
    graph = Graph.of(insert_qdq(module, plan))
    assert graph.attrs["qc.float_ops"] == {"nchw": "it moves float32 data"} and str(graph.values()["nchw"].args[0].name) == "c_b"


def test_constant_operand_becomes_int8() -> None:
    net = Net()
    module = net.done(net.add("soft", in_float(net.add("y", op.multiply(net.random(1, 3, 1, 1), net.input("x", 1, 3, 3, 6))))))
    qdq = insert_qdq(module, planned(module))
    group = next(g for g in find_groups(qdq) if g.id == "y")
    assert group.kind == "mul" and group.attrs["constant"] == 0 and group.weight is not None and group.weight.dtype == np.int8
    before = next(g for g in find_groups(module) if g.id == "y")
    assert before.weight is not None and group.weight_scale is not None
    real = (group.weight.astype(np.float64) - group.weight_zero_point) * group.weight_scale
    assert np.abs(real - before.weight).max() <= group.weight_scale.max() * 0.51


def test_accumulators_beyond_int32_stay_float() -> None:
    net = Net()
    x = net.input("x", 1, 140000)
    module = net.done(net.add("y", op.matmul(x, net.random(140000, 2))))
    plan = planned(module)
    plan.weight = lambda group: (np.full((2, 140000), 127, np.int8), np.ones(2))  # type: ignore[method-assign]
    reason = Graph.of(insert_qdq(module, plan)).attrs["qc.float_ops"]["y"]
    assert reason.startswith("its accumulator can reach ") and reason.endswith(", beyond int32")


@pytest.mark.parametrize("residual", [True, False])
def test_sums_of_unlike_scales_stay_float(residual: bool) -> None:
    net = Net()
    x = net.input("x", 1, 4, 4, 2)
    y = net.add("y", op.add(x, net.conv("c", x, 2) if residual else net.add("t", op.mean(x, [3], True))))
    module = net.done(net.add("soft", in_float(y)))
    plan = planned(module, parameters={"x": QParams(1e3, 0), "y": QParams(1e-6, 0)})
    reason = Graph.of(insert_qdq(module, plan)).attrs["qc.float_ops"]["y"]
    assert "too large beside the output scale" in reason


def test_plan_without_parameters_is_refused() -> None:
    net = Net()
    module = net.done(net.add("soft", in_float(net.add("y", op.sigmoid(net.input("x", 1, 4))))))
    with pytest.raises(PlanError, match="^unary 'y': the plan has no 8-bit parameters for its output; give them, or a reason to keep it in float$"):
        insert_qdq(module, planned(module, parameters={"y": None}))
    with pytest.raises(PlanError, match="^unary 'y' is planned in 8 bits, but its input 'x' has no 8-bit parameters"):
        insert_qdq(module, planned(module, parameters={"x": None}))


def test_plan_with_wrong_weights_is_refused() -> None:
    net = Net()
    module = net.done(net.conv("c", net.input("x", 1, 4, 4, 2), 3))
    plan = planned(module)
    plan.weight = lambda group: (np.zeros((3, 3, 3, 1), np.int8), np.ones(3))  # type: ignore[method-assign]
    wanted = r"weights are int8 \[3, 3, 3, 1\] with \[3\] scales; wanted: int8 \[3, 3, 3, 2\] with one scale per output channel$"
    with pytest.raises(PlanError, match="^conv2d 'c_b': the plan's " + wanted):
        insert_qdq(module, plan)


def test_huge_biases_coarsen_their_channel() -> None:
    weight = np.array([[100, -7], [50, 127]], np.int8)
    scale, bias = np.array([1e-9, 0.1]), np.array([3.0, -2.0])
    value, coarser = fit_bias(weight, scale, bias, 0.01)
    assert coarser[1] == 0.1 and (value[1] == weight[1]).all() and (value[0] == 0).all()
    assert quantized_bias(bias, 0.01, coarser).tolist() == [BIAS_LIMIT, -2000]
    assert quantized_bias(None, 0.01, scale).tolist() == [0, 0]
    with pytest.raises(OverflowError, match="beyond int32"):
        quantized_bias(bias, 0.01, scale)


def test_network_input_that_floats_also_read_is_kept() -> None:
    net = Net()
    x = net.input("x", 1, 4, 4, 2)
    module = net.done(net.conv("c", x, 2), net.add("soft", in_float(x)))
    graph = Graph.of(insert_qdq(module, planned(module)))
    assert str(graph.values()["soft"].args[0].name) == "x" and str(graph.values()["c"].args[0].name) == "x~dq"


def test_scalars_are_not_quantized() -> None:
    net = Net()
    module = net.done(net.add("soft", in_float(net.add("y", op.multiply(net.input("x", 1, 4), scalar(0.1))))))
    graph = Graph.of(insert_qdq(module, planned(module, parameters={"y": QParams(0.01, 3)})))
    assert float(const_value(graph.values()["y"].args[1])) == np.float32(0.1)


def test_conv_of_a_reshaped_input_is_found_behind_its_quantization() -> None:
    net = Net()
    image = net.add("image", op.reshape(net.input("x", 1, 4, 8), (1, 4, 4, 2)))
    module = net.done(net.add("c", op.nn.conv2d(image, net.random(3, 1, 1, 2), **NHWC)))
    graph = Graph.of(insert_qdq(module, planned(module)))
    assert [n for n, _ in graph.bindings] == ["x~q", "x~dq", "image", "c~weight", "image~q", "image~dq", "c"]
