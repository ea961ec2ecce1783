"""Bias correction: the linear algebra of means, and that it finds and removes a bias that is known to be there."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from calibrated import ModuleExecutor, random_samples, watch
from small_nets import Net, op, residual_net

from qcompiler.base.errors import DataError
from qcompiler.base.targets import find_target
from qcompiler.calibration.table import calibrate
from qcompiler.numerics import operators as numerics
from qcompiler.passes import sequence
from qcompiler.passes.graph import Graph, const_value, is_const, match_op
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.replace_operands import BIAS, replace_operands
from qcompiler.plan.planner import decide, observed_ids
from qcompiler.refine.correction import correct_biases, stated_biases, steady
from qcompiler.refine.integer_layers import integer_layers
from qcompiler.refine.means import FloatMeans, pre_activation, reach, tap_means
from qcompiler.verification import interpreter

SAMPLES = 6


@pytest.mark.parametrize(
    "size, kernel, stride, before, after, dilation", [(7, 3, 1, 1, 1, 1), (8, 3, 2, 0, 1, 1), (9, 5, 3, 2, 2, 1), (12, 3, 2, 2, 2, 2), (5, 1, 2, 0, 0, 1)]
)
def test_reach_counts_what_a_convolution_touches(size: int, kernel: int, stride: int, before: int, after: int, dilation: int) -> None:
    out = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    wanted = np.zeros((kernel, size), np.float32)
    for tap in range(kernel):
        for y in range(out):
            position = y * stride + tap * dilation - before
            if 0 <= position < size:
                wanted[tap, position] = 1
    np.testing.assert_array_equal(reach(size, out, kernel, stride, before, dilation), wanted)


GEOMETRY = [
    {"strides": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1},
    {"strides": [2, 1], "padding": [0, 1, 2, 0], "dilation": [1, 2], "groups": 2},
    {"strides": [2, 2], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 4},
]


@pytest.mark.parametrize("attrs", GEOMETRY)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_mean_of_a_convolution_follows_from_the_means_of_its_input(attrs: dict[str, Any], transposed: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-100, 100, (2, 9, 8, 4)).astype(np.int8)
    w = rng.integers(-100, 100, (8, 3, 3, 4 // attrs["groups"])).astype(np.int8)
    parameters = (x, w, np.zeros(8, np.int32), np.ones(8, np.float32))
    more = {**attrs, "x_zero_point": 3, "out_dtype": "float32", "zero_point": 0, "low": -128, "high": 127}
    y = numerics.conv2d_transpose(*parameters, **more, output_padding=[0, 0]) if transposed else numerics.conv2d(*parameters, **more)
    means = tap_means(x.astype(np.float32) - 3, "conv2d_transpose" if transposed else "conv2d", attrs, (3, 3), y.shape)
    np.testing.assert_allclose(pre_activation(w, means[None], attrs["groups"])[0], y.mean((0, 1, 2), dtype=np.float64), rtol=1e-6, atol=1e-4)


def test_the_mean_of_a_dense_layer() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 5, 16)).astype(np.float32), rng.standard_normal((7, 16)).astype(np.float32)
    means = tap_means(x, "dense", {}, (1, 1), (2, 5, 7))
    np.testing.assert_allclose(pre_activation(w, means[None])[0], (x @ w.T).mean((0, 1), dtype=np.float64), atol=1e-5)


class Stepper:
    """An integer module run binding by binding with the reference arithmetic; all samples share the constants."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.graph = Graph.of(module)
        self.steps = [name for name, _ in self.graph.bindings]
        self.biases: dict[str, np.ndarray] = {}
        self.context_bytes = 1000
        self.contexts: list[StepperContext] = []

    def new_context(self, inputs: Mapping[str, np.ndarray]) -> StepperContext:
        self.contexts.append(StepperContext(self, inputs))
        return self.contexts[-1]

    def set_bias(self, value_id: str, bias: np.ndarray) -> None:
        assert bias.dtype == np.int32
        self.biases[value_id] = bias


class StepperContext:
    lane = 0

    def __init__(self, owner: Stepper, inputs: Mapping[str, np.ndarray]) -> None:
        self.owner, self.values, self.ran = owner, dict(inputs), []

    def run(self, begin: int, end: int) -> None:
        for name, expr in self.owner.graph.bindings[begin:end]:
            found = match_op(expr)
            assert found is not None, "this network is all integer"
            tensors = [const_value(t) if is_const(t) else self.values[str(t.name)] for t in found[1]]
            if name in self.owner.biases:
                tensors[2] = self.owner.biases[name]
            self.values[name] = interpreter.OPERATORS[found[0]](*tensors, **found[2])
            self.ran.append(name)

    def view(self, value_id: str) -> np.ndarray:
        return self.values[value_id]

    def outputs(self) -> dict[str, np.ndarray]:
        return {name: self.values[str(v.name)] for name, v in self.owner.graph.outputs}


@functools.cache
def quantized() -> tuple[Any, Any, FloatMeans, Sequence[dict[str, np.ndarray]]]:
    """(float module, integer module, float means, samples) of the residual network."""
    module = residual_net()
    samples = random_samples(module, SAMPLES)
    means = FloatMeans(module, SAMPLES)
    table = calibrate(ModuleExecutor(module), samples, ids=observed_ids(module), watchers=[means])
    return module, sequence.run(sequence.INTEGER, insert_qdq(module, decide(module, table, find_target("x86-avx2")))), means, samples


def outputs_of(module: Any, samples: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    return np.stack([interpreter.run(module, s)["out0"] for s in samples])


def test_expected_pre_activations_are_those_of_the_float_network() -> None:
    module, _, means, samples = quantized()
    executor, seen = ModuleExecutor(module), {"logits": [], "block_b": []}  # type: dict[str, list[np.ndarray]]
    for sample in samples:
        executor.trace(sample, lambda name, array: seen[name].append(array) if name in seen else None)
    for group in ("logits", "block_b"):  # no activation: the output is the pre-activation, its residual included
        wanted = np.stack([a.reshape(-1, a.shape[-1]).mean(0, dtype=np.float64) for a in seen[group]])
        np.testing.assert_allclose(means.expected(group, SAMPLES, residual=group == "block_b"), wanted, atol=1e-4)


def test_integer_layers_state_real_units() -> None:
    """Unit times accumulator is the real pre-activation: compared with the float network, whose values they approximate."""
    _, integer, means, samples = quantized()
    layers = {layer.id: layer for layer in integer_layers(integer)}
    values = [interpreter.run(integer, s, keep="all") for s in samples]
    for name in ("stem_r", "logits", "h1" if "h1" in layers else "stem_r"):
        layer = layers[name]
        taps = [
            tap_means(
                v[layer.x].astype(np.float32) - layer.attrs["x_zero_point"],
                layer.kind,
                layer.attrs,
                layer.weight.shape[1:3] if layer.weight.ndim == 4 else (1, 1),
                layer.shape,
            )
            for v in values
        ]
        real = (layer.bias + pre_activation(layer.weight, np.stack(taps), int(layer.attrs.get("groups", 1)))) * layer.unit
        np.testing.assert_allclose(real, means.expected(layer.group, SAMPLES, False), atol=0.15)


def test_an_injected_bias_is_found_and_removed() -> None:
    """Every layer's bias is wrong by a known amount; afterwards the mean error of the outputs is next to nothing."""
    _, integer, means, samples = quantized()
    layers = integer_layers(integer)
    rng = np.random.default_rng(1)
    wrong = {layer.id: (layer.bias + np.rint(rng.uniform(-0.3, 0.3, len(layer.bias)) / layer.unit)).astype(np.int32) for layer in layers}
    damaged = replace_operands(integer, {BIAS: wrong})
    reference = np.stack([o["out0"] for o in means.outputs])
    assert np.abs((outputs_of(damaged, samples) - reference).mean((0, 1))).max() > 0.1
    stepper = Stepper(damaged)
    result = correct_biases(damaged, stepper, means, samples)
    assert result.kept and result.samples == SAMPLES and result.after > result.before + 6 and result.skipped == {}
    assert all(context.ran == 2 * stepper.steps for context in stepper.contexts), "every step runs once for each of the two measurements"
    mended = outputs_of(replace_operands(damaged, {BIAS: result.biases}), samples)
    assert np.abs((mended - reference).mean((0, 1))).max() < 1e-3
    for layer in integer_layers(replace_operands(damaged, {BIAS: result.biases})):  # the biases in the module are those in the executor
        np.testing.assert_array_equal(layer.bias, stepper.biases.get(layer.id, layer.bias))


def test_biases_as_they_were() -> None:
    """What was added to biases goes where that does harm, and comes back where it did good."""
    _, integer, means, samples = quantized()
    layers = integer_layers(integer)
    rng = np.random.default_rng(2)
    added = {layer.group: rng.uniform(-0.3, 0.3, len(layer.bias)) for layer in layers}
    shifted = {layer.id: (layer.bias + np.rint(added[layer.group] / layer.unit)).astype(np.int32) for layer in layers}
    damaged = replace_operands(integer, {BIAS: shifted})
    result = stated_biases(added, damaged, Stepper(damaged), means, samples)
    assert result.kept and result.summary().startswith("biases as they were, of ")
    for layer in layers:
        assert np.abs(result.biases[layer.id] - layer.bias).max() <= 1
    stepper = Stepper(integer)
    result = stated_biases(added, integer, stepper, means, samples)
    assert not result.kept
    for layer in layers:
        np.testing.assert_array_equal(stepper.biases[layer.id], layer.bias)


def test_the_better_network_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """With references of another network the corrected outputs are worse: the old biases come back."""
    _, integer, means, samples = quantized()
    stepper = Stepper(integer)
    actual = [interpreter.run(integer, s) for s in samples]
    monkeypatch.setattr(means, "outputs", [{k: v + np.float32(1e-6) for k, v in o.items()} for o in actual])
    result = correct_biases(integer, stepper, means, samples)
    assert not result.kept and result.after < result.before and "dropped" in result.summary()
    assert stepper.biases.keys() == result.biases.keys() and result.biases
    for layer in integer_layers(integer):
        np.testing.assert_array_equal(stepper.biases.get(layer.id, layer.bias), layer.bias)


def test_correction_helps_a_sound_network_or_leaves_it_alone() -> None:
    _, integer, means, samples = quantized()
    result = correct_biases(integer, Stepper(integer), means, samples)
    assert np.isfinite([result.before, result.after]).all()
    assert result.kept == (result.after > result.before)
    assert f"{result.before:.2f} dB -> {result.after:.2f} dB" in result.summary()


def test_memory_bounds_the_number_of_samples() -> None:
    _, integer, means, samples = quantized()
    assert correct_biases(integer, Stepper(integer), means, samples, memory=2500).samples == 2
    assert correct_biases(integer, Stepper(integer), means, samples, memory=1).samples == 1


def test_a_correction_beyond_int32_is_skipped() -> None:
    _, integer, means, samples = quantized()
    layer = integer_layers(integer)[0]

    class Absurd(FloatMeans):
        """One group, whose mean can't be met."""

        def __init__(self) -> None:
            self.outputs, self.groups = means.outputs, {layer.group: means.groups[layer.group]}

        def expected(self, group_id: str, count: int, residual: bool) -> np.ndarray:
            return np.full((count, len(layer.bias)), 1e12)

    result = correct_biases(integer, Stepper(integer), Absurd(), samples[:3])
    assert result.skipped == {layer.id: "a corrected bias leaves int32"} and result.biases == {}


def test_only_what_samples_share_is_steady() -> None:
    rng = np.random.default_rng(0)
    noise = rng.choice([-1.0, 1.0], (1000, 1)) * [0.0, 0.5, 5.0]
    np.testing.assert_allclose(steady(0.5 + noise - noise.mean(0)), [0.5, 0.25, 0.005], rtol=0.02)
    np.testing.assert_array_equal(steady(np.array([[0.5, 0.0]])), [0.0, 0.0], err_msg="one sample tells nothing")


def test_chance_is_not_taken_for_a_shift() -> None:
    """What three samples have in common by chance is left mostly alone, a shift that they share is taken."""
    noise = np.random.default_rng(0).standard_normal((3, 10000))
    assert np.square(steady(noise)).mean() < 0.4 * np.square(noise.mean(axis=0)).mean()
    np.testing.assert_allclose(steady(10 + 0.1 * noise), 10, rtol=0.05)


def test_no_samples_is_an_error() -> None:
    module, integer, means, _ = quantized()
    with pytest.raises(DataError, match="at least one calibration sample"):
        correct_biases(integer, Stepper(integer), means, [])
    with pytest.raises(DataError, match="at least one calibration sample"):
        correct_biases(integer, Stepper(integer), FloatMeans(module, SAMPLES), random_samples(module, 1))


def test_inputs_behind_a_reshape_are_collected() -> None:
    """A flattened tensor may be a view that no step computes: its means come from the value behind it."""
    net = Net(4)
    x = net.add("r", op.nn.relu(net.conv("c", net.input("x", 1, 4, 4, 3), 4)))
    module = net.done(net.add("y", op.matmul(net.add("flat", op.reshape(x, (1, 64))), net.random(64, 5))))
    executor, means = ModuleExecutor(module), FloatMeans(module, 3)
    samples = random_samples(module, 3)
    outputs = []
    for number, sample in enumerate(samples):

        def visit(name: str, array: np.ndarray, number: int = number) -> None:
            if name != "flat":
                watch(means, number, name, array)

        outputs.append(executor.trace(sample, visit)["out0"])
        means.end_sample({"out0": outputs[-1]})
    np.testing.assert_allclose(means.expected("y", 3, False), np.concatenate(outputs), atol=1e-5)
