"""Weight rounding: the patches a layer sees, the moments of its inputs, and that rounding by data beats rounding to nearest on that data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_correction import SAMPLES, Stepper, quantized

from qcompiler.numerics import operators as numerics
from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import Group
from qcompiler.passes.replace_operands import WEIGHT, replace_operands
from qcompiler.refine import rounding
from qcompiler.refine.integer_layers import integer_layers
from qcompiler.refine.rounding import DataRounder, Gram, choose, ending, least_error, patches, round_weight
from qcompiler.refine.weight_rounding import round_weights

GEOMETRY = [
    {"strides": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1},
    {"strides": [2, 1], "padding": [0, 1, 2, 0], "dilation": [1, 2], "groups": 2},
    {"strides": [2, 2], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 4},
]


def cost(error: np.ndarray, own: np.ndarray) -> np.ndarray:
    """float64[G, O]: error H error^T of each output."""
    return np.asarray(np.einsum("gok,gkl,gol->go", error, own, error, optimize=True))


def correlated(rng: np.random.Generator, groups: int, rows: int, width: int) -> np.ndarray:
    """float32[G, P, K] whose columns hang together, as those of image patches do."""
    return (rng.standard_normal((groups, rows, width)) @ rng.standard_normal((groups, width, width)) * 20).astype(np.float32)


@pytest.mark.parametrize("attrs", GEOMETRY)
def test_patches_times_weights_are_the_convolution(attrs: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-100, 100, (2, 9, 8, 4)).astype(np.int8)
    w = rng.integers(-100, 100, (8, 3, 3, 4 // attrs["groups"])).astype(np.int8)
    wanted = numerics.conv2d(
        x, w, np.zeros(8, np.int32), np.ones(8, np.float32), **attrs, x_zero_point=3, out_dtype="float32", zero_point=0, low=-128, high=127
    )
    at = np.arange(0, wanted[..., 0].size, 3)
    seen = patches(x.astype(np.float32) - 3, "conv2d", attrs, (3, 3), wanted.shape, at)
    product = np.einsum("gpk,gok->pgo", seen, w.reshape(attrs["groups"], -1, seen.shape[2]).astype(np.float32)).reshape(len(at), 8)
    np.testing.assert_array_equal(product, wanted.reshape(-1, 8)[at])


def test_patches_of_a_dense_layer_are_its_rows() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(patches(x, "dense", {}, (1, 1), (2, 3, 7), np.array([1, 4])), x.reshape(6, 4)[[1, 4]][None])


def test_rounding_by_data_beats_nearest_on_new_data_of_the_same_kind() -> None:
    rng = np.random.default_rng(0)
    x = correlated(rng, 2, 4000, 24)
    gram = Gram(2, 24)
    gram.add(x[:, :2000])
    steps = rng.uniform(-100, 100, (10, 2, 2, 6))
    rounded = round_weight(steps, gram)
    assert rounded.dtype == np.int8 and rounded.shape == steps.shape

    def noise(w: np.ndarray) -> float:
        return float(np.square(np.einsum("gpk,gok->gpo", x[:, 2000:], (w - steps).reshape(2, 5, 24))).sum())

    assert noise(rounded.astype(np.float64)) < 0.7 * noise(np.rint(steps))


def test_rounding_finds_the_best_of_all_roundings_of_a_small_layer() -> None:
    rng = np.random.default_rng(1)
    x = correlated(rng, 1, 200, 4)[0].astype(np.float64)
    own = (x.T @ x / len(x))[None]
    target = rng.uniform(-50, 50, (1, 30, 4))
    corners = np.stack(np.meshgrid(*[[-1, 0, 1, 2]] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    every = target[0][:, None] - (np.floor(target[0])[:, None] + corners)
    best = np.einsum("ock,kl,ocl->oc", every, own[0], every).min(axis=1)
    found = cost(least_error(target, own), own)[0]
    assert (found == pytest.approx(best)) or (found.sum() < 1.5 * best.sum())


def plainly_rounded(target: np.ndarray, own: np.ndarray) -> np.ndarray:
    """float64[O, K]: what is left of `target` by the definition: a column at a time, in float64."""
    factor = np.linalg.cholesky(own[::-1, ::-1])[::-1, ::-1]
    error = np.zeros_like(target)
    for matrix in (factor, own):
        for j in range(len(own)):
            pull = error @ (matrix[:, j] / matrix[j, j]) - error[:, j]
            error[:, j] = target[:, j] - np.clip(np.rint(target[:, j] + pull), -127, 127)
    return error


@pytest.mark.parametrize("width", [rounding._PART - 1, rounding._BLOCK, 2 * rounding._BLOCK + rounding._PART + 3])
def test_blocks_in_float32_round_as_column_after_column(width: int) -> None:
    """But for weights that lie in the middle between two whole numbers, as near as float32 tells."""
    rng = np.random.default_rng(5)
    x = correlated(rng, 3, 3 * width, width).astype(np.float64) / width**0.5
    own = x.transpose(0, 2, 1) @ x / (3 * width)
    own += 0.05 * own.diagonal(axis1=1, axis2=2).mean() * np.eye(width)
    target = rng.uniform(-140, 140, (3, 20, width))
    found, wanted = least_error(target, own), np.stack([plainly_rounded(t, h) for t, h in zip(target, own, strict=True)])
    assert found.dtype == np.float32 and (np.abs(found - wanted) < 1e-3).mean() > 0.99
    np.testing.assert_allclose(cost(found, own), cost(wanted, own), rtol=0.02)


def test_it_is_the_same_however_many_samples_a_product_takes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    _, integer, means, samples = quantized()
    found = []
    for rows in (1, 100, 10**9):
        monkeypatch.setattr(rounding, "_ROWS", rows)
        found.append(round_weights(DataRounder(64), integer, WeightStepper(integer), means, samples).weights)
    assert found[0]
    for other in found[1:]:
        assert found[0].keys() == other.keys() and all(np.array_equal(w, other[name]) for name, w in found[0].items())


def test_saturation_is_part_of_the_error() -> None:
    rng = np.random.default_rng(2)
    gram = Gram(1, 3)
    gram.add(correlated(rng, 1, 100, 3))
    rounded = round_weight(np.array([[300.0, 0.2, -0.7], [-126.9, 127.4, 1.0]]), gram)
    assert rounded.min() >= -127 and rounded[0, 0] == 127


def test_wide_layers_are_cut_and_silent_inputs_keep_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompiler.refine.rounding.WIDEST", 5)
    gram = Gram(1, 12)
    assert gram.blocks == 3
    gram.add(np.zeros((1, 10, 12), np.float32))
    steps = np.random.default_rng(3).uniform(-100, 100, (4, 12))
    np.testing.assert_array_equal(round_weight(steps, gram), np.rint(steps))


class WeightStepper(Stepper):
    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.weights: dict[str, np.ndarray] = {}

    def set_weight(self, value_id: str, weight: np.ndarray) -> None:
        assert weight.dtype == np.int8
        self.weights[value_id] = weight
        self.graph = Graph.of(replace_operands(self.module, {WEIGHT: self.weights}))


def test_a_network_is_judged_on_samples_that_rounding_has_not_seen() -> None:
    """Whatever the verdict, the executor ends with the network that the verdict names."""
    _, integer, means, samples = quantized()
    stepper = WeightStepper(integer)
    result = round_weights(DataRounder(64), integer, stepper, means, samples)
    assert result.samples == SAMPLES - SAMPLES // 3 and result.held_out == SAMPLES // 3
    assert result.weights and result.kept == (result.after > result.before)
    assert "weight rounding" in result.summary() and "judged on 2 others" in result.summary()
    original = {layer.id: layer.weight for layer in integer_layers(integer)}
    final = {layer.id: layer.weight for layer in integer_layers(replace_operands(integer, {WEIGHT: stepper.weights}))}
    for name, weight in original.items():
        wanted = result.weights.get(name, weight) if result.kept else weight
        np.testing.assert_array_equal(final[name], wanted)


def test_bad_weights_are_dropped() -> None:
    _, integer, means, samples = quantized()

    class Opposite:
        def weight(self, layer: Any, group: Any, fitted: Any, judges: Any) -> np.ndarray:
            flipped: np.ndarray = -np.maximum(layer.weight, -127)
            return flipped

    stepper = WeightStepper(integer)
    result = round_weights(Opposite(), integer, stepper, means, samples)
    assert not result.kept and result.after < result.before
    for layer in integer_layers(integer):
        np.testing.assert_array_equal(stepper.weights.get(layer.id, layer.weight), layer.weight)


def test_each_channel_takes_the_candidate_that_serves_it_on_other_data() -> None:
    """Rounding about the mean leaves less variance; a channel keeps weights that are right already; what a clamp cuts off does not count."""
    rng = np.random.default_rng(4)
    x = correlated(rng, 2, 3000, 12) + 200 * rng.uniform(size=(2, 1, 12)).astype(np.float32)
    gram = Gram(2, 12)
    gram.add(x[:, :2000])
    steps = rng.uniform(-60, 60, (6, 12))
    steps[1] = np.rint(steps[1])
    nearest, centered = np.rint(steps).astype(np.int8), round_weight(steps, gram, centered=True)

    def spread(w: np.ndarray) -> np.ndarray:
        lost: np.ndarray = np.einsum("gpk,gok->pgo", x[:, 2000:], (w - steps).reshape(2, 3, 12)).reshape(1000, 6).var(axis=0)
        return lost

    plain = Group("dense", "y", ("y",), ("x",))
    chosen = choose([nearest, centered], steps, x[:, 2000:], ending(plain, np.ones(6)))
    np.testing.assert_allclose(spread(chosen), np.minimum(spread(nearest), spread(centered)), rtol=1e-3)
    assert spread(chosen).sum() < 0.7 * spread(nearest).sum()
    np.testing.assert_array_equal(chosen[1], nearest[1])
    for shut in (replace(plain, low=1e9), replace(plain, slopes=np.zeros(6), bias=np.full(6, -1e9))):
        np.testing.assert_array_equal(choose([nearest, centered], steps, x[:, 2000:], ending(shut, np.ones(6))), nearest)


def test_what_follows_a_layer() -> None:
    group = Group("dense", "y", ("y",), ("x",), bias=np.array([1.0, 4.0]), slopes=np.array([0.5, -1.0]), low=-3.0)
    sums, unit = np.array([[-6.0, 2.0], [-12.0, -10.0]]), np.array([0.5, 2.0])  # -2, 8 and -5, -16 in real numbers
    assert (unit * ending(group, unit)(sums)).tolist() == [[-1.0, 8.0], [-2.5, 16.0]]
    assert (unit * ending(replace(group, residual="r"), unit)(sums)).tolist() == [[-1.0, 8.0], [-2.5, 16.0]]
    assert (unit * ending(replace(group, residual="r", bends_sum=True), unit)(sums)).tolist() == [[-2.0, 8.0], [-5.0, -16.0]]


def test_narrow_rounding_leaves_wide_layers_alone() -> None:
    _, integer, means, samples = quantized()
    result = round_weights(DataRounder(64, narrow=27), integer, WeightStepper(integer), means, samples)
    wide = {layer.id for layer in integer_layers(integer) if layer.weight[0].size > 27}
    assert wide and wide <= set(result.skipped) and not wide & set(result.weights)
