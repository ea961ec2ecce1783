"""Float kernels of ours against numpy in float64, at ragged lengths, extremes and infinities; and the same bits whatever the vector width."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from emulated import Host
from small_nets import Net, op, scalar
from tools import require_target

from qcompiler import schedules
from qcompiler.backend.build import build, session_of
from qcompiler.base.targets import Target, find_target, missing_features
from qcompiler.passes import sequence
from qcompiler.passes.graph import make_op
from qcompiler.schedules import harness
from qcompiler.schedules.table import Layout, OpCall, select
from qcompiler.verification import interpreter

X86 = [find_target(name) for name in ("x86-avx2", "x86-avx512vnni")]
schedules.load(X86[0])


def run(name: str, operands: list[np.ndarray], attrs: dict[str, Any], shape: tuple[int, ...], target: Target, runtime: int = 1) -> np.ndarray:
    """The first `runtime` operands are computed at run time, the others are constants."""
    layouts = [Layout(a.shape, str(a.dtype)) for a in operands[:runtime]]
    call = OpCall(name, [*layouts, *operands[runtime:]], attrs, Layout(shape, "float32"))
    row = select(call, target)
    kernel = row.build(call, row.default(call, target), target)
    inputs = [harness.store(a, layout) for a, layout in zip(operands, layouts, strict=False)]
    return harness.fetch(harness.run_kernel(kernel, inputs, call.output, target), call.output)


def everywhere(*arguments: Any, **more: Any) -> np.ndarray:
    """The result of `run` on every x86 target that this machine can run; they are the same bits."""
    able = [t for t in X86 if not missing_features(t)]
    results = [run(*arguments, target=t, **more) for t in able]
    for target, result in zip(able[1:], results[1:], strict=True):
        np.testing.assert_array_equal(result, results[0], f"{target.name} against {able[0].name}")
    return results[0]


def normal(*shape: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape) * spread, np.float32)


_erf = np.vectorize(math.erf, otypes=[np.float64])
FUNCTIONS: dict[str, tuple[Callable[..., np.ndarray], float]] = {  # with the largest error, relative to the larger of the result and 2^-20 of |x|
    "exp": (np.exp, 3e-7),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 3e-7),
    "tanh": (np.tanh, 4e-7),
    "erf": (_erf, 4e-7),
    "gelu": (lambda x: x * 0.5 * np.vectorize(math.erfc)(-x / math.sqrt(2)), 6e-7),
    "gelu_tanh": (lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), 2e-6),
    "silu": (lambda x: x / (1 + np.exp(-x)), 3e-7),
    "sqrt": (lambda x: np.sqrt(np.abs(x)), 1e-7),
    "relu": (lambda x: np.maximum(x, 0), 0),
    "square": (np.square, 1e-7),
    "cube": (lambda x: x**3, 2e-7),
    "abs": (np.abs, 0),
    "negative": (np.negative, 0),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(function: str) -> None:
    wanted, tolerance = FUNCTIONS[function]
    x = np.concatenate([np.linspace(-20, 20, 4001), np.geomspace(1e-6, 80, 301), -np.geomspace(1e-6, 80, 301)]).astype(np.float32)
    x = np.abs(x) if function == "sqrt" else x
    y = everywhere("qc.f32.pointwise", [x], {"function": function}, x.shape)
    exact = wanted(x.astype(np.float64))
    scale = np.maximum(np.abs(exact), 2.0**-20 * np.minimum(np.abs(x), 1.0))
    if function == "gelu_tanh":  # its tail is the difference of 1 and a tanh near it, in its definition too
        scale = np.maximum(scale, 1e-3)
    assert (np.abs(y - exact) / np.maximum(scale, 1e-37)).max() <= tolerance


@pytest.mark.parametrize("function", ["exp", "sigmoid", "tanh", "relu", "gelu"])
def test_the_ends_of_the_number_line(function: str) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38, 0.0, 1e-40], np.float32)
    y = everywhere("qc.f32.pointwise", [x], {"function": function}, x.shape)
    high = {"exp": math.exp(88), "sigmoid": 1, "tanh": 1, "relu": np.inf, "gelu": np.inf}[function]
    low = {"exp": 0, "sigmoid": 0, "tanh": -1, "relu": 0, "gelu": 0}[function]
    np.testing.assert_allclose(y[[0, 1]], [high, low], rtol=1e-6, atol=1e-37)
    assert np.isnan(y[2]) and np.isfinite(y[5])


@pytest.mark.parametrize(
    ("function", "wanted"),
    [("add", np.add), ("subtract", np.subtract), ("multiply", np.multiply), ("divide", np.divide), ("maximum", np.maximum), ("minimum", np.minimum)],
)
@pytest.mark.parametrize("shapes", [((3, 5, 19), (19,)), ((3, 1, 19), (1, 5, 19)), ((2, 37), (2, 1)), ((7,), ())])
def test_two_operands(function: str, wanted: Callable[..., np.ndarray], shapes: tuple[tuple[int, ...], ...]) -> None:
    a, b = (normal(*s, seed=i) for i, s in enumerate(shapes))
    shape = np.broadcast_shapes(*shapes)
    for runtime in (1, 2):
        np.testing.assert_array_equal(everywhere("qc.f32.pointwise", [a, b], {"function": function}, shape, runtime=runtime), wanted(a, b))


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 100])
def test_softmax(width: int) -> None:
    x = normal(3, 5, width, spread=6)
    x[0, 0, width // 2] = -np.inf if width > 1 else 0
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    np.testing.assert_allclose(everywhere("qc.f32.softmax", [x], {}, x.shape), e / e.sum(-1, keepdims=True), rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("width", [1, 3, 16, 31, 384])
def test_normalizations(width: int) -> None:
    x, gamma, beta = normal(4, 3, width) + 5, normal(width, seed=1), normal(width, seed=2)
    wide = x.astype(np.float64)
    centered = wide - wide.mean(-1, keepdims=True)
    wanted = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-3) * gamma + beta
    np.testing.assert_allclose(everywhere("qc.f32.layer_norm", [x, gamma, beta], {"epsilon": 1e-3}, x.shape), wanted, rtol=1e-5, atol=1e-5)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * gamma
    np.testing.assert_allclose(everywhere("qc.f32.rms_norm", [x, gamma], {"epsilon": 1e-3}, x.shape), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 3, 5, 12), 3), ((1, 7, 24), 24), ((2, 600, 8), 1), ((1, 5, 4, 96), 3), ((1, 2, 3, 3, 40), 4), ((1, 1, 6), 2)]
)
def test_group_normalization(shape: tuple[int, ...], groups: int) -> None:
    x, gamma, beta = normal(*shape) + 50, normal(shape[-1], seed=1), normal(shape[-1], seed=2)
    parted = x.astype(np.float64).reshape(shape[0], -1, groups, shape[-1] // groups)
    centered = parted - parted.mean((1, 3), keepdims=True)
    wanted = (centered / np.sqrt((centered**2).mean((1, 3), keepdims=True) + 1e-3)).reshape(shape) * gamma + beta
    y = everywhere("qc.f32.group_norm", [x, gamma, beta], {"groups": groups, "epsilon": 1e-3}, shape)
    np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 2), (1, 3), (2, 3), (3, 4), (0, 4)])
@pytest.mark.parametrize(("function", "wanted"), [("mean", np.mean), ("variance", np.var), ("sum", np.sum), ("max", np.max), ("min", np.min)])
def test_reductions(function: str, wanted: Callable[..., np.ndarray], first: int, last: int) -> None:
    x = normal(3, 5, 6, 21)
    exact = wanted(x.astype(np.float64), axis=tuple(range(first, last)))
    y = everywhere("qc.f32.reduce", [x], {"function": function, "first": first, "last": last}, exact.shape)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_look_ups_beyond_the_table_read_its_ends(dtype: str) -> None:
    table, ids = normal(11, 35), np.array([[0, 10, -1], [11, 5, -(2**31)]], dtype)
    call = OpCall("qc.f32.take", [table, Layout(ids.shape, dtype)], {}, Layout((2, 3, 35), "float32"))
    row = select(call, X86[0])
    y = harness.run_kernel(row.build(call, {}, X86[0]), [harness.store(ids, call.tensors[0])], call.output, X86[0])
    np.testing.assert_array_equal(harness.fetch(y, call.output), table[np.clip(ids, 0, 10)])


PRODUCTS = [((1, 1), (1, 1)), ((3, 5, 7), (3, 7, 33)), ((2, 3, 9, 20), (1, 3, 20, 70)), ((6, 300), (300, 17)), ((5, 1, 2, 4), (3, 4, 6))]


@pytest.mark.parametrize(("left", "right"), PRODUCTS, ids=str)
def test_products_of_two_tensors(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = normal(*left), normal(*right, seed=1)
    wanted = a.astype(np.float64) @ b
    bound = (np.abs(a).astype(np.float64) @ np.abs(b)) * left[-1] * 2.0**-24 + 1e-30
    for runtime in (1, 2):
        assert (np.abs(everywhere("qc.f32.matmul", [a, b], {}, wanted.shape, runtime=runtime) - wanted) <= bound).all()


SHAPES = [  # batch, heads, rows, columns, depth of q and k, depth of v
    (1, 1, 1, 1, 1, 1),
    (2, 3, 7, 5, 4, 6),
    (1, 2, 33, 49, 32, 32),
    (1, 12, 8, 100, 64, 64),
    (2, 1, 3, 17, 20, 90),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "keys", "constant", "all keys of a row"])
def test_attention(shape: tuple[int, ...], mask: str) -> None:
    batch, heads, rows, columns, depth, out = shape
    q, k, v = normal(batch, rows, heads, depth, seed=1), normal(batch, columns, heads, depth, seed=2), normal(batch, columns, heads, out, seed=3)
    operands, bias = [q, k, v], np.zeros((1, 1, 1, columns), np.float32)
    if mask == "keys":
        bias = np.where(np.arange(columns) < max(1, columns * 2 // 3), np.float32(0), np.float32(np.finfo(np.float32).min))[None, None, None]
        bias = np.broadcast_to(bias, (batch, 1, 1, columns)).copy()
    elif mask == "constant":
        bias = normal(1, heads, rows, columns, seed=4)
    elif mask == "all keys of a row":
        bias = np.zeros((1, 1, rows, columns), np.float32)
        bias[:, :, -1] = -np.inf
    operands += [] if mask == "none" else [bias]
    y = everywhere("qc.f32.attention", operands, {"scale": 0.3}, (batch, rows, heads, out), runtime=3 if mask == "constant" else len(operands))
    logits = np.einsum("bshd,bthd->bhst", q.astype(np.float64), k) * 0.3 + bias
    top = logits.max(-1, keepdims=True)
    e = np.exp(logits - np.where(np.isinf(top), 0, top))
    total = e.sum(-1, keepdims=True)
    wanted = np.einsum("bhst,bthv->bshv", e / np.where(total == 0, 1, total), v)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=3e-6)
    if mask == "all keys of a row":
        assert (y[:, -1] == 0).all()


def float_operators() -> tvm.IRModule:
    """Every float operator with a kernel of ours once, on shapes with ragged ends; no convolution or dense layer."""
    net = Net(5)
    x = net.input("x", 2, 9, 42)
    y = net.add("norm", op.nn.layer_norm(x, net.random(42), net.random(42), [2], 1e-5))
    q, k, v = (net.add(f"heads{i}", op.reshape(net.add(f"part{i}", op.strided_slice(y, [2], [14 * i], [14 * i + 14])), (2, 9, 2, 7))) for i in range(3))
    mixed = net.add("mixed", op.nn.attention(q, k, v, net.random(2, 1, 1, 9), scale=0.4))
    y = net.add("joined", op.concat([net.add("flat", op.reshape(mixed, (2, 9, 14))), net.add("rest", op.strided_slice(x, [2], [14], [42]))], 2))
    y = net.add("sum", op.add(y, x))
    for name, function in (("gelu", op.nn.gelu), ("silu", op.nn.silu), ("tanh", op.tanh), ("erf", op.erf), ("gelu_tanh", op.nn.gelu_tanh)):
        y = net.add(name, op.add(net.add(f"{name}_inside", function(y)), x))
    y = net.add("rms", op.nn.rms_norm(y, net.random(42), [2], 1e-6))
    p = net.add("soft", op.nn.softmax(net.add("turned", op.permute_dims(y, [0, 2, 1]))))
    mixture = net.add("mixture", op.matmul(p, y))
    powers = net.add("powers", op.add(net.add("squared", op.power(p, scalar(2.0))), net.add("cubed", op.power(p, scalar(3.0)))))
    spread = net.add("spread", op.variance(mixture, [1, 2]))
    return net.done(
        y, p, mixture, powers, spread, net.add("pooled", op.mean(y, [1])), net.add("clipped", op.clip(net.add("high", op.max(y, [2], True)), -1.0, 1.0))
    )


def test_a_network_of_float_operators_needs_no_legalization_and_equals_the_oracle() -> None:
    module, x = float_operators(), normal(2, 9, 42)
    built = build(module, X86[0], "lower")
    assert not [s.writes for s in built.program.steps if s.name == "float"]
    wanted = interpreter.run(module, {"x": x})
    with session_of(built.link()) as session:
        found = session.run({"x": x})
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


def test_the_same_bits_on_arm64(tmp_path: Path) -> None:
    target, module, x = find_target("arm64-neon"), float_operators(), normal(2, 9, 42)
    require_target(target)
    found, _ = Host.build(target, tmp_path).run(build(module, target, "lower").link(), {"x": x}, tmp_path / "run")
    with session_of(build(module, X86[0], "lower").link()) as session:
        wanted = session.run({"x": x})
    for name, value in found.items():
        np.testing.assert_array_equal(value, wanted[name], name)


def test_what_a_padded_convolution_reads_has_a_border() -> None:
    """Whatever writes an image, with rows of its own or all in one go."""
    net = Net(7)
    x, table = net.input("x", 1, 6, 7, 4), net.random(9, 7, 4)
    images = {name: getattr(op, name)(x, [3], True) for name in ("mean", "variance", "sum", "max", "min")}
    images |= {
        "joined": op.concat([net.add("m", op.max(x, [3], True)), net.add("n", op.mean(x, [3], True))], 3),
        "taken": op.take(table, net.builder.input("ids", (1, 6), "int64"), 0, "clip"),
        "group": op.nn.group_norm(x, net.random(4), net.random(4), 2, 3, [1, 2]),
        "layer": op.nn.layer_norm(x, net.random(4), net.random(4), [3]),
        "root": op.nn.rms_norm(x, net.random(4), [3]),
        "soft": op.nn.softmax(x),
        "product": op.matmul(net.add("turned", op.permute_dims(x, [0, 1, 3, 2])), x),
        "running": make_op("qc.cumulative", [x], {"axis": 1, "exclusive": 0, "reverse": 0, "reduction": "add"}, (1, 6, 7, 4), "float32"),
        "sine": op.sin(x),
        "gelu": op.nn.gelu(x),
    }
    module = net.done(*(net.conv(f"{name}_conv", net.add(name, image), 5) for name, image in images.items()))
    feeds = {"x": normal(1, 6, 7, 4), "ids": np.arange(6)[None]}
    with session_of(build(sequence.run(sequence.FLOAT, module), X86[0], "lower").link()) as session:
        found = session.run(feeds)
    for name, wanted in interpreter.run(module, feeds).items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-4, err_msg=name)
