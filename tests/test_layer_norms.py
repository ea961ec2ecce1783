"""Equalization behind layer normalizations (SmoothQuant's case): what may be scaled, that the float network keeps its function, and what int8 gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrated import random_samples, watch
from onnx_nets import OnnxNet, agrees, operators
from small_nets import Net, op, random_inputs, scalar

import qcompiler
from qcompiler.base.targets import find_target
from qcompiler.calibration.data import CheckedSamples
from qcompiler.importers.model import load
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.passes.graph import const
from qcompiler.passes.layer_norms import layer_norms
from qcompiler.passes.replace_weights import replace_weights
from qcompiler.pipeline.job import Job
from qcompiler.pipeline.stages import equalize
from qcompiler.plan.recipes import recipe
from qcompiler.refine.equalization import ChannelWatcher, Extremes, decide_channels, equalized_layers, find_streams
from qcompiler.verification import interpreter

TOKENS, WIDTH, HEADS = 8, 32, 4
OUTLIERS, RAISED = (3, 20), 9


def gamma_and_beta(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What large language models learn: a few channels sixty times louder than the others, and one far from zero."""
    gamma, beta = 1 + 0.2 * rng.standard_normal(WIDTH), 0.2 * rng.standard_normal(WIDTH)
    gamma[list(OUTLIERS)] *= 60
    beta[RAISED] += 40
    return gamma.astype(np.float32), beta.astype(np.float32)


def quiet_rows(rng: np.random.Generator, width: int) -> np.ndarray:
    """float32[WIDTH, width]: weights that listen little to the loud channels."""
    weight = rng.standard_normal((WIDTH, width)) * WIDTH**-0.5
    weight[[*OUTLIERS, RAISED]] /= 30
    return weight.astype(np.float32)


class Transformer(Net):
    """One block over tokens [1, T, C]; every value has a name that says what it is."""

    def norm(self, name: str, x: Any, axes: Any = -1) -> Any:
        return self.add(name, op.nn.layer_norm(x, *map(const, gamma_and_beta(self.rng)), axes=axes))

    def dense(self, name: str, x: Any, weight: np.ndarray) -> Any:
        return self.add(f"{name}_b", op.add(self.add(name, op.matmul(x, const(weight))), self.random(weight.shape[1], spread=0.1)))

    def heads(self, name: str, x: Any, axes: list[int]) -> Any:
        split = self.add(f"{name}_split", op.reshape(self.dense(name, x, quiet_rows(self.rng, WIDTH)), (1, TOKENS, HEADS, WIDTH // HEADS)))
        return self.add(f"{name}_heads", op.permute_dims(split, axes))

    def block(self, x: Any, post: bool = False) -> Any:
        """post: normalizations stand on the residual path, as in BERT."""
        h = self.norm("norm1", x)
        q, k, v = (self.heads(n, h, [0, 2, 3, 1] if n == "k" else [0, 2, 1, 3]) for n in "qkv")
        scores = self.add("scaled", op.multiply(self.add("scores", op.matmul(q, k)), scalar((WIDTH // HEADS) ** -0.5)))
        mixed = self.add("mixed", op.matmul(self.add("soft", op.nn.softmax(scores)), v))
        joined = self.add("joined", op.reshape(self.add("moved", op.permute_dims(mixed, [0, 2, 1, 3])), (1, TOKENS, WIDTH)))
        weight = self.rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) * 0.2
        x = self.add("sum", op.add(self.dense("projection", joined, weight), h if post else x))
        hidden = self.dense("up", self.norm("norm2", x), quiet_rows(self.rng, 2 * WIDTH))
        gelu = self.add("gelu", op.multiply(hidden, self.add("gate", op.sigmoid(hidden))))
        return self.dense("down", gelu, self.rng.standard_normal((2 * WIDTH, 10)).astype(np.float32) * 0.1)


def transformer(post: bool = False) -> Any:
    net = Transformer(1)
    return net.done(net.block(net.input("tokens", 1, TOKENS, WIDTH), post))


def seen_by(module: Any) -> dict[str, Extremes]:
    watcher = ChannelWatcher(module)
    for number, sample in enumerate(random_samples(module, 6)):
        for name, array in interpreter.run(module, sample, keep="all").items():
            watch(watcher, number, name, array)
    return watcher.values


def streams_of(module: Any) -> dict[str, set[str]]:
    """First value -> readers."""
    return {s.values[0]: {r.id for r in s.readers} for s in find_streams(module)}


def test_products_behind_a_normalization_share_its_channels() -> None:
    assert streams_of(transformer()) == {"norm1": {"q_b", "k_b", "v_b"}, "norm2": {"up_b"}}


def test_a_normalization_on_the_residual_path_is_left_alone() -> None:
    """Its sum with the block's output is normalized again, over all channels: nothing there could take a factor back."""
    module = transformer(post=True)
    assert streams_of(module) == {"norm2": {"up_b"}}
    assert set(decide_channels(module, seen_by(module)).channels) == {"norm2"}


@pytest.mark.parametrize("last", ["dense", "network output", "softmax"])
def test_a_residual_sum_is_scaled_only_where_weights_take_it_back(last: str) -> None:
    net = Transformer(2)
    h = net.norm("norm", net.input("x", 1, TOKENS, WIDTH))
    s = net.add("sum", op.add(net.dense("a", h, quiet_rows(net.rng, WIDTH)), h))
    y = {"dense": lambda: net.dense("b", s, quiet_rows(net.rng, 4)), "network output": lambda: s, "softmax": lambda: net.add("y", op.nn.softmax(s))}[last]()
    assert streams_of(net.done(y)) == ({"norm": {"sum", "b_b"}} if last == "dense" else {})


def test_only_constants_of_the_last_axis_can_be_scaled() -> None:
    net = Transformer(3)
    x = net.input("x", 1, TOKENS, WIDTH)
    both = net.add("both", op.nn.layer_norm(x, net.random(TOKENS, WIDTH), net.random(TOKENS, WIDTH), axes=[-2, -1]))
    first = net.add("first", op.nn.layer_norm(both, net.random(TOKENS), net.random(TOKENS), axes=[1]))
    given = net.add("given", op.nn.layer_norm(first, net.input("gamma", WIDTH), net.random(WIDTH), axes=[-1]))
    fine = net.norm("fine", given)
    module = net.done(*(net.dense(f"d_{n}", v, quiet_rows(net.rng, 3)) for n, v in (("both", both), ("first", first), ("given", given), ("fine", fine))))
    assert set(layer_norms(module)) == {"fine"} and set(streams_of(module)) == {"fine"}


def test_movement_that_keeps_channels_apart_passes_them_on() -> None:
    """Windows of tokens, and a class token cut out of the sequence; but not what moves channels."""
    net = Transformer(4)
    h = net.norm("norm", net.input("x", 1, TOKENS, WIDTH))
    windows = net.add("swapped", op.permute_dims(net.add("windows", op.reshape(h, (1, 2, TOKENS // 2, WIDTH))), [0, 2, 1, 3]))
    a = net.dense("a", windows, quiet_rows(net.rng, 6))
    token = net.add("flat", op.reshape(net.add("token", op.strided_slice(h, [1], [0], [1])), (1, WIDTH)))
    assert streams_of(net.done(a, net.dense("b", token, quiet_rows(net.rng, 4)))) == {"norm": {"a_b", "b_b"}}
    for move in (lambda h: op.permute_dims(h, [0, 2, 1]), lambda h: op.strided_slice(h, [2], [WIDTH - 1], [-WIDTH - 1], [-1])):
        net = Transformer(5)
        moved = net.add("moved", move(net.norm("norm", net.input("x", 1, WIDTH, WIDTH))))
        assert streams_of(net.done(net.dense("a", moved, quiet_rows(net.rng, 6)))) == {}


@pytest.mark.parametrize("absorb", [False, True])
def test_the_float_network_keeps_its_function(absorb: bool) -> None:
    module = transformer()
    found = decide_channels(module, seen_by(module), absorb)
    assert set(found.channels) == {"norm1", "norm2"} and found.shifted == 2 * absorb
    changed = replace_weights(module, equalized_layers(module, found.channels))
    before, after = (interpreter.run(m, random_inputs(m), keep="all") for m in (module, changed))
    for name in ("norm1", "q_b", "k_b", "v_b", "soft", "sum", "norm2", "up_b", "down_b"):
        wanted = found.channels[name].stored(before[name]) if name in found.channels else before[name]
        np.testing.assert_allclose(after[name], wanted, rtol=1e-4, atol=2e-6 * np.abs(wanted).max(), err_msg=name)
    loudest = [np.abs(v["norm1"]).max(axis=(0, 1)) for v in (before, after)]
    assert loudest[1].max() / np.median(loudest[1]) < 0.2 * loudest[0].max() / np.median(loudest[0])


def onnx_transformer(path: Path) -> Path:
    """The same block as a file."""
    net = OnnxNet(17, 1)

    def dense(x: str, weight: np.ndarray) -> str:
        return net.op("Add", net.op("MatMul", x, net.const(weight)), net.const(0.1 * net.rng.standard_normal(weight.shape[1])))

    def norm(x: str, name: str) -> str:
        return net.op("LayerNormalization", x, *map(net.const, gamma_and_beta(net.rng)), axis=-1, name=name)

    def heads(x: str) -> str:
        split = net.op("Reshape", dense(x, quiet_rows(net.rng, WIDTH)), net.ints(1, TOKENS, HEADS, WIDTH // HEADS))
        return net.op("Transpose", split, perm=[0, 2, 1, 3])

    x = net.input("tokens", 1, TOKENS, WIDTH)
    h = norm(x, "norm1_")
    q, k, v = (heads(h) for _ in range(3))
    scores = net.op("Mul", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), net.const((WIDTH // HEADS) ** -0.5))
    mixed = net.op("Transpose", net.op("MatMul", net.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    x = net.op("Add", dense(net.op("Reshape", mixed, net.ints(1, TOKENS, WIDTH)), net.rng.standard_normal((WIDTH, WIDTH)) * 0.2), x)
    hidden = net.op("Relu", dense(norm(x, "norm2_"), quiet_rows(net.rng, 2 * WIDTH)))
    return net.save(path, [dense(hidden, net.rng.standard_normal((2 * WIDTH, 10)) * 0.1)])


def tokens(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"tokens": rng.standard_normal((1, TOKENS, WIDTH)).astype(np.float32)} for _ in range(count)]


def test_libraries_gain_from_it_and_say_so(tmp_path: Path) -> None:
    path, sqnr = onnx_transformer(tmp_path / "net.onnx"), {}
    for steps in ((), ("equalize",)):
        artifact = qcompiler.compile(path, calibration=tokens(12, 0), preset="fast", enable=steps)
        report = qcompiler.verify(artifact.save(tmp_path / "net.so"), path, tokens(8, 1))
        sqnr[steps] = report.outputs[0].metrics.sqnr_db
    assert sqnr["equalize",] > sqnr[()] + 6, sqnr
    norms = {name for name in artifact.manifest["channels"] if name.startswith("norm")}
    assert len(norms) == 2
    assert artifact.manifest["quantization"]["channel_equalization"].startswith(f"{len(artifact.manifest['channels'])} values scaled")
    layers = {row.name: row.metrics.sqnr_db for row in report.layers}
    assert all(layers[name] > 20 for name in norms), "compared as they are stored"


def test_statistics_are_of_the_scaled_network(tmp_path: Path) -> None:
    """The float network's code is kept: its normalizations get their constants in place."""
    model = load(onnx_transformer(tmp_path / "net.onnx"))
    equalized = equalize(Job(model, CheckedSamples(tokens(6, 0), model.inputs), recipe("fast", ["equalize", "shift"]), find_target("native")))
    assert len([c for c in equalized.equalization.channels.values() if c.shift.any()]) >= 2
    sample = tokens(1, 5)[0]
    wanted = interpreter.run(model.module, sample, keep="all")
    stored: dict[str, np.ndarray] = {}
    equalized.twin.code().session().trace(sample, lambda name, array: stored.__setitem__(name, array.copy()))
    output = model.outputs[0].name
    assert sqnr_db(stored[output], wanted[output]) > 90
    for name, channels in equalized.equalization.channels.items():
        assert sqnr_db(stored[name], channels.stored(wanted[name])) > 90, name


# -- spelled-out normalizations ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["Div", "Reciprocal", "One"])
@pytest.mark.parametrize("square, gamma, beta", [("Pow", True, True), ("Mul", True, False), ("Pow", False, True), ("Mul", False, False)])
def test_spelled_out_normalizations_are_recognized(tmp_path: Path, square: str, end: str, gamma: bool, beta: bool) -> None:
    net = OnnxNet(13, 2)
    x = net.input("x", 1, 6, 10)
    y = net.spelled_norm(x, net.weight(10) if gamma else None, net.weight(1, 1, 10) if beta else None, square=square, end=end)
    assert operators(agrees(net.save(tmp_path / "net.onnx", [y]))) == ["layer_norm"]


def test_channels_of_an_image_are_normalized_in_its_own_layout(tmp_path: Path) -> None:
    net = OnnxNet(13, 2)
    x = net.op("Conv", net.input("x", 1, 3, 8, 8), net.weight(6, 3, 3, 3))
    y = net.op("Conv", net.spelled_norm(x, net.weight(6, 1, 1), net.weight(6, 1, 1), axis=1), net.weight(4, 6, 2, 2), strides=[2, 2])
    model = agrees(net.save(tmp_path / "net.onnx", [y]))
    assert operators(model).count("layer_norm") == 1 and len(layer_norms(model.module)) == 1
    (stream,) = find_streams(model.module)
    assert [w.kind for w in stream.writers] == ["layer_norm"] and [r.kind for r in stream.readers] == ["conv2d"]


def unlike(net: OnnxNet, x: str) -> list[str]:
    """Expressions that are no layer normalizations, though nearly."""
    d = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1], keepdims=1))
    other = net.op("Sub", x, net.op("ReduceMean", x, axes=[1], keepdims=1))

    def over(top: str, square: str, axes: tuple[int, ...] = (-1,), power: float = 2.0) -> str:
        variance = net.op("ReduceMean", net.op("Pow", square, net.const(power)), axes=list(axes), keepdims=1)
        return net.op("Div", top, net.op("Sqrt", net.op("Add", variance, net.const(1e-3))))

    another_mean, another_axis, two_axes, another_power = over(other, d), over(d, d, (1,)), over(d, d, (1, 2)), over(d, d, power=4.0)
    root_mean_square, not_centered = over(x, x), over(d, x)
    return [another_mean, another_axis, two_axes, another_power, root_mean_square, not_centered]


def test_what_only_looks_like_one_is_left_as_it_is(tmp_path: Path) -> None:
    net = OnnxNet(13, 2)
    found = unlike(net, net.op("Relu", net.input("x", 1, 6, 10)))
    assert "layer_norm" not in operators(agrees(net.save(tmp_path / "net.onnx", found)))


def test_scales_along_another_axis_stay_products(tmp_path: Path) -> None:
    net = OnnxNet(13, 2)
    y = net.spelled_norm(net.input("x", 1, 6, 10), net.weight(6, 1), net.weight(10))
    assert operators(agrees(net.save(tmp_path / "net.onnx", [y]))) == ["layer_norm", "multiply", "add"]


def test_values_inside_that_others_read_are_kept(tmp_path: Path) -> None:
    net = OnnxNet(13, 2)
    y = net.spelled_norm(net.input("x", 1, 6, 10), net.weight(10), net.weight(10))
    normalized = net.nodes[-2].input[0]
    assert sorted(operators(agrees(net.save(tmp_path / "net.onnx", [y, normalized])))) == ["layer_norm", "layer_norm"]
