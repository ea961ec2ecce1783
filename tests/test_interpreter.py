"""Whole modules: the interpreter against values computed by hand, by TVM, and against the compiled library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from small_nets import NHWC_T, Net, TinyPlan, evaluate, one_op, op, random_inputs, residual_net
from tvm import relax

from qcompiler.base.errors import DataError
from qcompiler.numerics import operators as numerics
from qcompiler.passes import sequence
from qcompiler.passes.graph import Graph, GraphBuilder, const, dtype_of, make_op, match_op, relax_op, shape_of
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.verification.interpreter import run


def hand_made() -> tvm.IRModule:
    """qc.* operators, leftover Relax operators with one and with two results, a constant binding, an alias, and an input handed out."""
    b = GraphBuilder()
    x = b.input("x", (1, 2, 2, 4), "float32")
    q = b.emit("q", make_op("qc.quantize", [x], {"scale": 0.5, "zero_point": 3, "low": -128, "high": 127}, (1, 2, 2, 4), "int8"))
    d = b.emit("d", make_op("qc.dequantize", [q], {"scale": 0.5, "zero_point": 3}, (1, 2, 2, 4), "float32"))
    parts = b.emit("parts", op.split(d, [1], axis=3))
    left, right = (b.emit(f"part{i}", relax.TupleGetItem(parts, i)) for i in (0, 1))
    c = b.emit("c", const(np.array([2.0, 3.0, 4.0], np.float32)))
    scaled = b.emit("scaled", op.multiply(right, c))
    joined = b.emit("joined", op.concat([left, scaled, const(np.ones((1, 2, 2, 1), np.float32))], axis=3))
    alias = b.emit("alias", joined)
    total = b.emit("total", op.sum(alias, axis=[1, 2, 3]))
    return b.finish([("sum", total), ("all", alias), ("left", left), ("echo", x)])


def test_operators_of_every_kind() -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, 2, 4)).astype(np.float32)
    got = run(hand_made(), {"x": x})
    assert list(got) == ["sum", "all", "left", "echo"]
    d = np.clip(np.rint(x * 2), -131, 124) * np.float32(0.5)
    joined = np.concatenate([d[..., :1], d[..., 1:] * np.array([2, 3, 4], np.float32), np.ones((1, 2, 2, 1), np.float32)], 3)
    np.testing.assert_array_equal(got["all"], joined)
    np.testing.assert_array_equal(got["left"], d[..., :1])
    np.testing.assert_allclose(got["sum"], joined.sum((1, 2, 3)), rtol=1e-6)
    assert got["echo"].tolist() == x.tolist()


def test_keep_all_gives_inputs_and_every_tensor_but_no_tuples() -> None:
    module = hand_made()
    x = np.ones((1, 2, 2, 4), np.float32)
    values = run(module, {"x": x}, keep="all")
    assert set(values) == {"x", *(n for n, _ in Graph.of(module).bindings)} - {"parts"}
    assert values["q"].dtype == np.int8 and values["q"].reshape(-1).tolist() == [5] * 16
    assert values["c"].tolist() == [2, 3, 4] and values["part1"].shape == (1, 2, 2, 3)


def test_inputs_are_checked() -> None:
    module = hand_made()
    with pytest.raises(DataError, match="input 'x' is missing; given: 'y'"):
        run(module, {"y": np.zeros(1)})
    with pytest.raises(DataError, match=r"input 'x' is float64 \[1, 2, 2, 4\]; wanted: float32 \[1, 2, 2, 4\]"):
        run(module, {"x": np.zeros((1, 2, 2, 4))})
    with pytest.raises(DataError, match=r"input 'x' is float32 \[4\]; wanted"):
        run(module, {"x": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match="keep is 'some'; it must be"):
        run(module, {"x": np.zeros((1, 2, 2, 4), np.float32)}, keep="some")


def test_equal_operators_with_other_constants_do_not_share_results() -> None:
    """Compiled code is reused; what differs must be an argument of it."""
    b = GraphBuilder()
    x = b.input("x", (3,), "float32")
    ys = [b.emit(f"y{i}", op.add(x, const(np.full(3, i, np.float32)))) for i in range(3)]
    zs = [b.emit(f"z{i}", op.clip(x, 0, i)) for i in (1, 2)]
    got = run(b.finish([(str(v.name), v) for v in [*ys, *zs]]), {"x": np.full(3, 9, np.float32)})
    assert [v[0] for v in got.values()] == [9, 10, 11, 1, 2]


# -- QDQ modules ------------------------------------------------------------------------------------------------------------------------


def test_a_qdq_network_is_what_tvm_computes() -> None:
    module = residual_net()
    plan = TinyPlan(module, random_inputs(module))
    qdq = insert_qdq(module, plan)
    quantized = [n for n, e in Graph.of(qdq).bindings if relax_op(e) == "relax.quantize"]
    values = run(qdq, plan.inputs, keep="all")
    whole = evaluate(qdq, plan.inputs, ["logits"])
    assert len(quantized) >= 15 and all(values[n].dtype == np.int8 for n in quantized)
    np.testing.assert_allclose(run(qdq, plan.inputs)["out0"], whole["logits"], atol=0.1 * np.abs(whole["logits"]).max())
    # one operator at a time the order of a float sum may differ, so a quantized value may differ by one step
    again = evaluate(qdq, plan.inputs, quantized, {n: values[n] for n in quantized})
    for name in quantized:
        assert np.abs(values[name].astype(int) - again[name].astype(int)).max() <= 1, name


@pytest.mark.parametrize("attrs", [{}, {"dilation": (2, 1), "padding": (1, 0, 2, 1)}, {"output_padding": (1, 0)}, {"groups": 2}], ids=str)
def test_a_transposed_convolution_in_nhwc(attrs: dict[str, Any]) -> None:
    """TVM can't legalize it; its definition: every input pixel scatters its kernel."""
    groups = attrs.get("groups", 1)
    module = one_op(lambda n, x: n.add("y", op.nn.conv2d_transpose(x, n.random(8, 2, 3, 6 // groups), strides=2, **attrs, **NHWC_T)), (1, 3, 4, 8))
    plan = TinyPlan(module, random_inputs(module), skip={"y": "tested in float"}, parameters={"y": None})
    values = run(insert_qdq(module, plan), plan.inputs, keep="all")
    (weight,) = [e.args[1].value.numpy() for _, e in Graph.of(module).bindings if relax_op(e) == "relax.nn.conv2d_transpose"]
    down, right = attrs.get("dilation", (1, 1))
    top, left, bottom, end = attrs.get("padding", (0, 0, 0, 0))
    more = attrs.get("output_padding", (0, 0))
    wanted = np.zeros((2 * 2 + down + 1 + more[0], 3 * 2 + 2 * right + 1 + more[1], 6))
    for i, j, a, b, c, o in np.ndindex(3, 4, 2, 3, 8, 6):
        if c // (8 // groups) == o // (6 // groups):
            wanted[2 * i + a * down, 2 * j + b * right, o] += values["x"][0, i, j, c] * float(weight[c, a, b, o % (6 // groups)])
    wanted = wanted[top : wanted.shape[0] - bottom, left : wanted.shape[1] - end]
    np.testing.assert_allclose(values["y"][0], wanted, rtol=1e-5, atol=1e-5)


# -- integer modules --------------------------------------------------------------------------------------------------------------------


def typed(module: tvm.IRModule, values: dict[str, np.ndarray]) -> None:
    """Every value has the shape and dtype that its binding declares, and int8 results keep to their clamp."""
    for name, expr in Graph.of(module).bindings:
        if name not in values:
            continue
        assert values[name].shape == shape_of(expr) and str(values[name].dtype) == dtype_of(expr), name
        found = match_op(expr)
        if found is not None and values[name].dtype == np.int8 and "low" in found[2]:
            assert found[2]["low"] <= values[name].min() and values[name].max() <= found[2]["high"], name


def test_an_integer_network() -> None:
    module = residual_net()
    plan = TinyPlan(module, random_inputs(module))
    integer = sequence.run(sequence.INTEGER, insert_qdq(module, plan))
    calls = {found[0] for _, e in Graph.of(integer).bindings if (found := match_op(e)) is not None}
    assert {"qc.quantize", "qc.conv2d", "qc.dense", "qc.lut", "qc.mul", "qc.mean", "qc.max_pool2d", "qc.avg_pool2d", "qc.concat", "qc.reshape"} <= calls
    values = run(integer, plan.inputs, keep="all")
    typed(integer, values)
    exact = evaluate(module, plan.inputs, ["logits"])["logits"]
    error = run(integer, plan.inputs)["out0"] - exact
    assert 10 * np.log10((exact**2).sum() / (error**2).sum()) > 20, "dB of signal to quantization noise"
    # any one operator by itself, from the values of its operands
    name, expr = next((n, e) for n, e in Graph.of(integer).bindings if (match_op(e) or ("",))[0] == "qc.conv2d" and len(e.args) == 6)
    _, tensors, attrs = match_op(expr) or ("", [], {})
    x, *constants, residual = tensors
    again = numerics.conv2d(values[str(x.name)], *(c.value.numpy() for c in constants), values[str(residual.name)], **attrs)
    assert (again == values[name]).all()


@pytest.mark.parametrize("skip", ["", "part0", "part1"])
def test_both_halves_of_a_split(skip: str) -> None:
    """In int8 both are slices of one value; one that is kept in float is a slice too, of the dequantized value."""
    net = Net(1)
    x = net.add("r", op.nn.relu(net.input("x", 1, 4, 4, 8)))
    parts = net.add("parts", op.split(x, 2, axis=3))
    left, right = (net.add(f"part{i}", relax.TupleGetItem(parts, i)) for i in (0, 1))
    module = net.done(net.add("soft", op.nn.softmax(net.add("sum", op.add(left, right)))), right)
    plan = TinyPlan(module, random_inputs(module))
    if skip:
        plan.skip |= {skip: "asked for", "sum": "asked for"}
        plan.parameters[skip] = None
    qdq = insert_qdq(module, plan)
    integer = sequence.run(sequence.INTEGER, qdq)
    assert not [n for n, e in Graph.of(integer).bindings if isinstance(e, relax.TupleGetItem)]
    values = run(integer, plan.inputs, keep="all")
    typed(integer, values)
    for i in (0, 1):
        assert (values[f"part{i}"].dtype == np.float32) == (skip == f"part{i}")
    wanted, got = run(qdq, plan.inputs), run(integer, plan.inputs)
    np.testing.assert_array_equal(got["out1"], wanted["out1"])
    np.testing.assert_allclose(got["out0"], wanted["out0"], atol=0.01)
