"""The rewrites between import and layout: what each matches, what it must leave alone, and that values stay the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from qcompiler.passes.fold_batch_norm import fold_batch_norm
from qcompiler.passes.fold_constants import fold_constants
from qcompiler.passes.graph import Graph, GraphBuilder, const, const_value, is_const, plain, relax_op
from qcompiler.passes.merge_pad import merge_pad
from qcompiler.passes.products import products
from qcompiler.passes.recognise import recognise
from qcompiler.passes.sequence import CANONICAL, run
from qcompiler.passes.simplify import simplify
from tests.onnx_nets import OnnxNet, agrees, execute, operators

op = relax.op
RNG = np.random.default_rng(5)


def randoms(*shape: int, low: float | None = None) -> Any:
    values = RNG.standard_normal(shape).astype(np.float32)
    return const(values if low is None else np.abs(values) + np.float32(low))


def module_of(make: Callable[..., Any], *shape: int) -> tvm.IRModule:
    """`make(emit, x)` returns the output variable (or several); emit(name, expr) binds."""
    builder = GraphBuilder()
    result = make(builder.emit, builder.input("x", shape, "float32"))
    outputs = result if isinstance(result, (list, tuple)) else [result]
    return builder.finish([(f"out{i}", v) for i, v in enumerate(outputs)])


def same(before: tvm.IRModule, after: tvm.IRModule, tolerance: float = 2e-5) -> None:
    shape = [int(d) for d in Graph.of(before).inputs[0].ty.shape]
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32) * 3
    for (name, a), (other, b) in zip(execute(before, {"x": x}).items(), execute(after, {"x": x}).items(), strict=True):
        assert name == other
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance * np.abs(a).max())


# -- folding into weights ---------------------------------------------------------------------------------------------------------------


def scaled_conv(emit: Any, x: Any) -> Any:
    y = emit("conv", op.add(emit("c", op.nn.conv2d(x, randoms(6, 2, 3, 3), groups=2)), randoms(1, 6, 1, 1)))
    return emit("bn", op.add(emit("m", op.multiply(y, randoms(1, 6, 1, 1, low=0.1))), randoms(6, 1, 1)))


def scaled_transposed(emit: Any, x: Any) -> Any:
    y = emit("c", op.nn.conv2d_transpose(x, randoms(4, 3, 3, 3), groups=2, strides=(2, 2)))
    return emit("bn", op.add(emit("m", op.divide(y, randoms(1, 6, 1, 1, low=0.5))), randoms(1, 6, 1, 1)))


def scaled_signal(emit: Any, x: Any) -> Any:
    y = emit("c", op.nn.conv1d(emit("flat", op.reshape(x, (1, 4, 64))), randoms(6, 4, 3)))
    return emit("bn", op.subtract(const(np.float32(1.5)), emit("m", op.multiply(randoms(6, 1), y))))


def scaled_product(emit: Any, x: Any) -> Any:
    y = emit("c", op.matmul(x, randoms(8, 5)))
    return emit("bn", op.add(emit("m", op.multiply(emit("b", op.add(y, randoms(5))), const(np.float32(0.25)))), randoms(1, 5)))


def slope_of_hard_sigmoid(emit: Any, x: Any) -> Any:
    y = emit("conv", op.add(emit("c", op.nn.conv2d(x, randoms(6, 4, 1, 1))), randoms(1, 6, 1, 1)))
    return emit("act", op.clip(emit("bn", op.add(emit("m", op.multiply(y, const(np.float32(1 / 6)))), const(np.float32(0.5)))), 0.0, 1.0))


@pytest.mark.parametrize("make", [scaled_conv, scaled_transposed, scaled_signal, scaled_product, slope_of_hard_sigmoid], ids=lambda f: f.__name__)
def test_affine_chains_fold_into_weights(make: Callable[..., Any]) -> None:
    before = module_of(make, 1, 4, 8, 8)
    after = fold_batch_norm(before)
    kinds = [o for o in operators(after) if o not in ("reshape", "clip")]
    assert len(kinds) == 2
    assert kinds[1] == "add"
    assert "bn" in Graph.of(after).values()  # the chain's last value keeps its id
    same(before, after)


def test_image_without_convolution_becomes_depthwise() -> None:
    def make(emit: Any, x: Any) -> Any:
        return emit("bn", op.add(emit("m", op.multiply(x, randoms(1, 4, 1, 1))), randoms(1, 4, 1, 1)))

    before = module_of(make, 1, 4, 5, 6)
    after = fold_batch_norm(before)
    assert operators(after) == ["conv2d", "add"]
    conv = Graph.of(after).bindings[0][1]
    assert int(conv.attrs.groups) == 4
    same(before, after)


def read_twice(emit: Any, x: Any) -> Any:
    y = emit("c", op.nn.conv2d(x, randoms(6, 4, 1, 1)))
    return [emit("bn", op.multiply(y, randoms(1, 6, 1, 1))), emit("r", op.nn.relu(y))]


def output_inside(emit: Any, x: Any) -> Any:
    y = emit("c", op.nn.conv2d(x, randoms(6, 4, 1, 1)))
    return [y, emit("bn", op.multiply(y, randoms(1, 6, 1, 1)))]


def not_per_channel(emit: Any, x: Any) -> Any:
    return emit("bn", op.multiply(emit("c", op.nn.conv2d(x, randoms(6, 4, 1, 1))), randoms(1, 1, 1, 8)))


def bias_alone(emit: Any, x: Any) -> Any:
    return emit("b", op.add(emit("c", op.nn.conv2d(x, randoms(6, 4, 1, 1))), randoms(1, 6, 1, 1)))


def scalars_alone(emit: Any, x: Any) -> Any:
    return emit("b", op.add(emit("m", op.multiply(x, const(np.float32(2)))), const(np.float32(1))))


@pytest.mark.parametrize("make", [read_twice, output_inside, not_per_channel, bias_alone, scalars_alone], ids=lambda f: f.__name__)
def test_what_must_not_fold(make: Callable[..., Any]) -> None:
    before = module_of(make, 1, 4, 8, 8)
    assert operators(fold_batch_norm(before)) == operators(before)


# -- products in a row --------------------------------------------------------------------------------------------------------------------


def sliced(x: Any, axes: list[int], begin: list[int], end: list[int], step: list[int] | None = None) -> Any:
    return op.strided_slice(x, axes, begin, end, step or [1] * len(axes))


def two_layers(emit: Any, x: Any) -> Any:
    return emit("z", op.matmul(emit("y", op.matmul(x, randoms(8, 20))), randoms(20, 5)))


def three_layers(emit: Any, x: Any) -> Any:
    return emit("w", op.matmul(two_layers(emit, x), randoms(5, 4)))


def middle_columns(emit: Any, x: Any) -> Any:
    return emit("z", sliced(emit("y", op.matmul(x, randoms(8, 20))), [3], [2], [17], [3]))


def real_parts(emit: Any, x: Any) -> Any:
    pairs = emit("pairs", op.reshape(emit("y", op.matmul(x, randoms(8, 20))), (32, 10, 2)))
    return emit("z", op.reshape(emit("real", sliced(pairs, [2], [0], [1])), (4, 8, 10)))


def filtered(emit: Any, x: Any) -> Any:
    return emit("bank", op.matmul(real_parts(emit, x), randoms(10, 3)))


def backwards(emit: Any, x: Any) -> Any:
    return emit("w", op.matmul(emit("z", sliced(emit("y", op.matmul(x, randoms(8, 20))), [-1], [19], [-21], [-1])), randoms(20, 5)))


@pytest.mark.parametrize("make", [two_layers, three_layers, middle_columns, real_parts, filtered, backwards], ids=lambda f: f.__name__)
def test_products_in_a_row_are_one(make: Callable[..., Any]) -> None:
    before = module_of(make, 1, 4, 8, 8)
    after = products(before)
    assert [o for o in operators(after) if o != "reshape"] == ["matmul"]
    assert [name for name, _ in Graph.of(after).outputs] == [name for name, _ in Graph.of(before).outputs]
    same(before, after)


def narrow(emit: Any, x: Any) -> Any:
    return emit("z", op.matmul(emit("y", op.matmul(x, randoms(8, 2))), randoms(2, 8)))


def between_read(emit: Any, x: Any) -> Any:
    y = emit("y", op.matmul(x, randoms(8, 20)))
    return [emit("z", op.matmul(y, randoms(20, 5))), emit("r", op.nn.relu(y))]


def between_output(emit: Any, x: Any) -> Any:
    y = emit("y", op.matmul(x, randoms(8, 20)))
    return [y, emit("z", sliced(y, [3], [0], [7]))]


def rows_left_out(emit: Any, x: Any) -> Any:
    return emit("z", sliced(emit("y", op.matmul(x, randoms(8, 20))), [2], [0], [7]))


def rows_mixed(emit: Any, x: Any) -> Any:
    return emit("z", op.matmul(emit("flat", op.reshape(emit("y", op.matmul(x, randoms(8, 20))), (4, 160))), randoms(160, 2)))


def turned(emit: Any, x: Any) -> Any:
    return emit("z", op.matmul(emit("t", op.permute_dims(emit("y", op.matmul(x, randoms(8, 8))), [0, 1, 3, 2])), randoms(8, 5)))


@pytest.mark.parametrize("make", [narrow, between_read, between_output, rows_left_out, rows_mixed, turned], ids=lambda f: f.__name__)
def test_products_that_stay(make: Callable[..., Any]) -> None:
    before = module_of(make, 1, 4, 8, 8)
    assert operators(products(before)) == operators(before)


# -- padding ----------------------------------------------------------------------------------------------------------------------------

PAD = [0, 0, 0, 0, 1, 2, 0, 3]


def padding_of(module: tvm.IRModule, name: str) -> list[int]:
    return [int(p) for p in plain(Graph.of(module).values()[name].attrs.padding)]


def test_pad_merges_into_every_convolution_that_reads_it() -> None:
    def make(emit: Any, x: Any) -> Any:
        p = emit("p", op.nn.pad(x, PAD))
        return [emit("a", op.nn.conv2d(p, randoms(2, 4, 3, 3), padding=(1, 1, 1, 1))), emit("b", op.nn.conv2d(p, randoms(2, 4, 1, 1), strides=(2, 2)))]

    before = module_of(make, 1, 4, 8, 8)
    after = merge_pad(before)
    assert operators(after) == ["conv2d", "conv2d"]
    assert padding_of(after, "a") == [2, 1, 3, 4]
    assert padding_of(after, "b") == [1, 0, 2, 3]
    same(before, after)


def test_pad_merges_into_pools() -> None:
    def make(emit: Any, x: Any) -> Any:
        p = emit("p", op.nn.pad(emit("r", op.nn.relu(x)), PAD))
        return [emit("m", op.nn.max_pool2d(p, (4, 4), (2, 2))), emit("a", op.nn.avg_pool2d(p, (3, 3), (2, 2)))]

    before = module_of(make, 1, 4, 8, 8)
    after = merge_pad(before)
    assert operators(after) == ["relu", "max_pool2d", "avg_pool2d"]
    same(before, after)


@pytest.mark.parametrize(
    "make",
    [
        lambda emit, x: emit("y", op.nn.conv2d(emit("p", op.nn.pad(x, PAD, "constant", 1.0)), randoms(2, 4, 3, 3))),
        lambda emit, x: emit("y", op.nn.conv2d(emit("p", op.nn.pad(x, PAD, "reflect")), randoms(2, 4, 3, 3))),
        lambda emit, x: emit("y", op.nn.conv2d(emit("p", op.nn.pad(x, [0, 0, 1, 1, 0, 0, 0, 0])), randoms(2, 6, 3, 3))),
        lambda emit, x: emit("y", op.nn.max_pool2d(emit("p", op.nn.pad(x, PAD)), (4, 4))),  # x may be negative
        lambda emit, x: emit("y", op.nn.max_pool2d(emit("p", op.nn.pad(emit("r", op.nn.relu(x)), PAD)), (2, 2))),  # windows of padding only
        lambda emit, x: emit("y", op.nn.avg_pool2d(emit("p", op.nn.pad(x, PAD)), (3, 3), padding=(1, 1, 1, 1))),
    ],
    ids=["value", "reflect", "channels", "negative", "empty-window", "padded-twice"],
)
def test_pads_that_stay(make: Callable[..., Any]) -> None:
    before = module_of(make, 1, 4, 8, 8)
    assert operators(merge_pad(before)) == operators(before)


def test_tf_style_padding_through_the_importer(tmp_path: Path) -> None:
    net = OnnxNet(17)
    x = net.input("x", 1, 4, 9, 9)
    four = [net.const(np.abs(net.rng.standard_normal(8)) + 0.5) for _ in range(4)]
    y = net.op("Conv", net.op("Pad", x, net.ints(0, 0, 1, 1, 0, 0, 2, 2)), net.weight(8, 4, 3, 3), strides=[2, 2])
    y = net.op("Relu", net.op("BatchNormalization", y, *four))
    z = net.op("MaxPool", net.op("Pad", y, net.ints(0, 0, 1, 1, 0, 0, 1, 1)), kernel_shape=[3, 3], strides=[2, 2])
    assert operators(agrees(net.save(tmp_path / "net.onnx", [z]))) == ["permute_dims", "conv2d", "add", "relu", "max_pool2d", "permute_dims"]


# -- simplify ---------------------------------------------------------------------------------------------------------------------------


def one(value: float) -> Any:
    return const(np.float32(value))


def joined(emit: Any, x: Any) -> Any:
    """x, exp(x) and a constant, side by side along channels."""
    return emit("joined", op.concat([x, emit("e", op.exp(x)), randoms(1, 4, 8, 8)], 1))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda e, x: e("y", op.nn.relu(e("m", op.multiply(e("a", op.add(x, one(0))), randoms(1, 4, 1, 1).__class__ and one(1))))), ["relu"]),
        (lambda e, x: e("y", op.reshape(e("a", op.reshape(x, (4, 64))), (16, 16))), ["reshape"]),
        (lambda e, x: e("y", op.nn.relu(e("a", op.reshape(e("b", op.reshape(x, (4, 64))), (1, 4, 8, 8))))), ["relu"]),
        (lambda e, x: e("y", op.permute_dims(e("a", op.permute_dims(x, [0, 2, 3, 1])), [0, 3, 2, 1])), ["permute_dims"]),
        (lambda e, x: e("y", op.nn.relu(e("a", op.permute_dims(e("b", op.permute_dims(x, [0, 2, 3, 1])), [0, 3, 1, 2])))), ["relu"]),
        (lambda e, x: e("y", op.divide(x, one(4))), ["multiply"]),
        (lambda e, x: e("y", op.subtract(x, randoms(1, 4, 1, 1))), ["add"]),
        (lambda e, x: e("y", op.clip(e("a", op.nn.relu(x)), -5.0, 6.0)), ["clip"]),
        (lambda e, x: e("y", op.minimum(e("a", op.maximum(x, one(0))), one(6))), ["clip"]),
        (lambda e, x: e("y", op.maximum(one(0), x)), ["relu"]),
        (lambda e, x: e("y", op.clip(x, 0.0, 3.4028234663852886e38)), ["relu"]),
        (lambda e, x: e("y", op.nn.avg_pool2d(x, (8, 8))), ["mean"]),
        (lambda e, x: e("y", op.astype(e("a", op.nn.relu(x)), "float32")), ["relu"]),
        (lambda e, x: [e("y", op.clip(e("a", op.nn.relu(x)), 0.0, 6.0)), e("z", op.tanh(e("b", op.nn.relu(x))))], ["clip", "relu", "tanh"]),
        (lambda e, x: (lambda r: [e("y", op.clip(r, 0.0, 6.0)), r])(e("a", op.nn.relu(x))), ["relu", "clip"]),
        (lambda e, x: e("y", op.add(x, const(np.zeros((2, 1, 1, 1), np.float32)))), ["add"]),  # broadcasts
        (lambda e, x: e("y", op.divide(one(1), e("a", op.exp(x)))), ["exp", "divide"]),
        (lambda e, x: e("y", op.nn.relu(e("s", op.strided_slice(x, [1, -1], [-9, 0], [4, 99])))), ["relu"]),
        (lambda e, x: e("y", op.strided_slice(joined(e, x), [1], [4], [8])), ["exp"]),
        (lambda e, x: e("y", op.strided_slice(joined(e, x), [1, 2], [5, 1], [8, 7], [2, 3])), ["exp", "strided_slice"]),
        (lambda e, x: e("y", op.strided_slice(joined(e, x), [-3], [-7], [-5])), ["exp", "strided_slice"]),
        (lambda e, x: e("y", op.strided_slice(joined(e, x), [1], [3], [5])), ["exp", "concat", "strided_slice"]),
        (lambda e, x: e("y", op.strided_slice(joined(e, x), [1], [3], [0], [-1])), ["exp", "concat", "strided_slice"]),
        (lambda e, x: e("y", op.strided_slice(joined(e, x), [1], [8], [9])), ["exp", "concat", "strided_slice"]),  # of a constant
        (lambda e, x: e("y", op.strided_slice(e("t", op.concat([joined(e, x), x], 1)), [1], [6], [7])), ["exp", "strided_slice"]),
    ],
)
def test_simplify(make: Callable[..., Any], expected: list[str]) -> None:
    before = module_of(make, 1, 4, 8, 8)
    after = simplify(before)
    assert operators(after) == expected
    same(before, after)


def test_constants_fold() -> None:
    def make(emit: Any, x: Any) -> Any:
        a = emit("a", op.reshape(randoms(6), (1, 6, 1, 1)))
        b = emit("b", op.tanh(emit("c", op.add(a, const(np.float32(1))))))
        kept = emit("d", op.multiply(x, b))
        return [kept, emit("e", op.permute_dims(b, [1, 0, 2, 3]))]

    before = module_of(make, 1, 6, 4, 4)
    after = fold_constants(before)
    graph = Graph.of(after)
    assert [relax_op(e) for _, e in graph.bindings if not is_const(e)] == ["relax.multiply"]
    assert [n for n, _ in graph.outputs] == ["out0", "out1"]
    assert const_value(graph.values()[str(graph.outputs[1][1].name)]).shape == (6, 1, 1, 1)
    same(before, after)


# -- activations ------------------------------------------------------------------------------------------------------------------------


def silu(e: Any, x: Any) -> Any:
    return e("y", op.multiply(e("s", op.sigmoid(x)), x))


def gelu_last_half(e: Any, x: Any) -> Any:
    t = e("t", op.add(e("f", op.erf(e("d", op.divide(x, one(2**0.5))))), one(1)))
    return e("y", op.multiply(e("m", op.multiply(x, t)), one(0.5)))


def gelu_first_half(e: Any, x: Any) -> Any:
    t = e("t", op.add(one(1), e("f", op.erf(e("d", op.multiply(x, one(2**-0.5)))))))
    return e("y", op.multiply(e("h", op.multiply(x, one(0.5))), t))


def swish_divides_last(e: Any, x: Any) -> Any:
    gate = e("g", op.clip(e("a", op.add(x, one(3))), 0.0, 6.0))
    return e("y", op.divide(e("m", op.multiply(x, gate)), one(6)))


def swish_divides_first(e: Any, x: Any) -> Any:
    gate = e("g", op.divide(e("c", op.minimum(e("r", op.nn.relu(e("a", op.add(x, one(3))))), one(6))), one(6)))
    return e("y", op.multiply(gate, x))


def leaky(e: Any, x: Any) -> Any:
    return e("y", op.nn.prelu(x, const(np.full(4, 0.2, np.float32)), 1))


SLOPES = const(np.array([0.1, 0.3, 2.0, -0.5], np.float32).reshape(4, 1, 1))


def smaller_part(e: Any, x: Any) -> Any:
    return e("y", op.maximum(e("m", op.multiply(one(0.1), x)), x))


def two_rectifiers(e: Any, x: Any) -> Any:
    negative = e("n", op.nn.relu(e("g", op.negative(x))))
    return e("y", op.subtract(e("r", op.nn.relu(x)), e("m", op.multiply(negative, one(0.1)))))


def choice(e: Any, x: Any) -> Any:
    return e("y", op.where(e("c", op.less(x, one(0))), e("m", op.multiply(x, one(0.1))), x))


def keras_prelu(e: Any, x: Any) -> Any:
    negative = e("n", op.nn.relu(e("g", op.negative(x))))
    return e("y", op.add(e("r", op.nn.relu(x)), e("m", op.multiply(negative, const(-const_value(SLOPES))))))


def paper_prelu(e: Any, x: Any) -> Any:
    negative = e("n", op.subtract(x, e("a", op.abs(x))))
    return e("y", op.add(e("r", op.nn.relu(x)), e("h", op.multiply(e("m", op.multiply(negative, SLOPES)), one(0.5)))))


def chosen_relu(e: Any, x: Any) -> Any:
    return e("y", op.where(e("c", op.greater(x, one(0))), x, e("m", op.multiply(x, one(0)))))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (smaller_part, ["leakyrelu"]), (two_rectifiers, ["leakyrelu"]), (choice, ["leakyrelu"]), (chosen_relu, ["relu"]),
        (keras_prelu, ["prelu"]), (paper_prelu, ["prelu"]),
        (silu, ["silu"]), (gelu_last_half, ["gelu"]), (gelu_first_half, ["gelu"]), (leaky, ["leakyrelu"]),
        (swish_divides_last, ["multiply", "add", "clip", "multiply"]), (swish_divides_first, ["multiply", "add", "clip", "multiply"]),
    ],
)  # fmt: skip
def test_spelled_out_activations(make: Callable[..., Any], expected: list[str]) -> None:
    before = module_of(make, 1, 4, 8, 8)
    after = recognise(simplify(before))
    assert operators(after) == expected
    assert Graph.of(after).outputs[0][1].name == "y"
    same(before, after, tolerance=1e-4)  # TVM's erf and tanh are polynomials
    assert operators(run(CANONICAL[:-1], after)) == expected  # stable


@pytest.mark.parametrize("shape", [(), (3,), (2, 4), (1, 5, 4)])
def test_rectifiers_of_any_rank(shape: tuple[int, ...]) -> None:
    before = module_of(smaller_part, *shape)
    after = recognise(before)
    assert operators(after) == ["leakyrelu"]
    same(before, after)


def test_look_alikes_stay() -> None:
    def make(e: Any, x: Any) -> Any:
        other = e("o", op.tanh(x))
        bent = [
            e("b0", op.maximum(x, e("m0", op.multiply(other, one(0.1))))),  # of two tensors
            e("b1", op.maximum(x, e("m1", op.add(e("k1", op.multiply(x, one(0.1))), one(0.5))))),  # bends beside zero
            e("b3", op.maximum(e("p3", op.add(x, one(1e-6))), e("m3", op.multiply(x, one(0.1))))),  # and a little
            e("b2", op.add(e("r2", op.nn.relu(x)), e("m2", op.multiply(e("n2", op.minimum(x, one(0))), randoms(1, 4, 8, 8))))),  # a slope per element
        ]
        bent += [e("b4", op.add(x, one(1e-6))), e("b5", op.add(x, one(1e-30)))]
        return [e("y", op.multiply(x, e("s", op.sigmoid(other)))), e("z", op.nn.prelu(x, randoms(4), 1)), other, *bent]

    before = module_of(make, 1, 4, 8, 8)
    assert operators(recognise(before)) == operators(before)
