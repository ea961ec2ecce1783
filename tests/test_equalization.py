"""Channel equalization: which values may be scaled, that the float network keeps its function, that clamps never open, and that int8 gains."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from calibrated import ModuleExecutor, random_samples
from small_nets import Net, evaluate, op, random_inputs, residual_net

from qcompiler.base.targets import find_target
from qcompiler.calibration.headroom import MANY
from qcompiler.calibration.table import calibrate
from qcompiler.passes import sequence
from qcompiler.passes.graph import Graph, const
from qcompiler.passes.groups import find_groups
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.replace_weights import replace_weights
from qcompiler.plan.planner import decide, observed_ids
from qcompiler.refine.analytic import mean_of_rounding
from qcompiler.refine.equalization import CAP, ChannelWatcher, Extremes, decide_channels, equalized_layers, find_streams, reliability
from qcompiler.runtime.channels import Channels, stored_form
from qcompiler.verification import interpreter

COUNT = 12


def uneven(module: Any, seed: int = 0) -> Any:
    """The same function of the module's input, with writers and biases whose channels differ a hundredfold: what training often leaves."""
    rng = np.random.default_rng(seed)
    layers = {}
    for group in find_groups(module):
        if group.kind in ("conv2d", "dense"):
            assert group.weight is not None
            factor = np.exp(rng.uniform(-3, 1, len(group.weight)))
            layers[group.id] = (
                (group.weight * factor.reshape(-1, *[1] * (group.weight.ndim - 1))).astype(np.float32),
                np.zeros(len(factor)) if group.bias is None else group.bias * factor,
            )
    return replace_weights(module, layers)


def mobile_net(seed: int = 0) -> Any:
    """Stem, expansion, depthwise with ReLU6, linear projection twice with a residual, a head without padding."""
    net = Net(seed)
    x = net.add("nhwc", op.permute_dims(net.input("image", 1, 3, 12, 12), [0, 2, 3, 1]))
    x = net.add("stem6", op.clip(net.conv("stem", x, 8, strides=2), 0.0, 6.0))
    trunk = net.conv("p0", x, 8, 1)
    for i in (1, 2):
        e = net.add(f"e{i}_6", op.clip(net.conv(f"e{i}", trunk, 16, 1), 0.0, 6.0))
        d = net.add(f"d{i}_6", op.clip(net.conv(f"d{i}", e, 16, groups=16, bias=i == 1), 0.0, 6.0))
        trunk = net.add(f"t{i}", op.add(net.conv(f"p{i}", d, 8, 1), trunk))
    h = net.add("h_r", op.nn.relu(net.conv("h", trunk, 24, 1)))
    m = net.add("flat", op.reshape(net.add("mean", op.mean(h, [1, 2], True)), (1, 24)))
    return net.done(net.add("logits", op.add(net.add("product", op.matmul(m, net.random(24, 10, spread=0.2))), net.random(10))))


def seen_by(module: Any, count: int = COUNT) -> ChannelWatcher:
    watcher = ChannelWatcher(module)
    calibrate(ModuleExecutor(module), random_samples(module, count), ids=(), watchers=[watcher])
    return watcher


def streams_of(module: Any) -> dict[str, float | None]:
    return {" ".join(s.values): s.limit for s in find_streams(module)}


def test_streams_follow_residuals_pooling_and_stop_at_what_mixes_or_bends() -> None:
    assert streams_of(mobile_net()) == {
        "stem6": 6.0, "p0_b t1 t2": None, "e1_6": 6.0, "d1_6": 6.0, "e2_6": 6.0, "d2_6": 6.0, "h_r mean flat": None,
    }  # fmt: skip
    found = streams_of(residual_net())
    assert found["b1_r"] is None and found["a1_r"] == 6.0 and "stem_r" in found
    assert not any("swish" in k or "logits" in k or "block_b" in k for k in found), "a hard-swish is no homogeneous function; outputs stay as they are"


def test_a_relu6_that_is_wider_than_zero_is_left_alone() -> None:
    net = Net(1)
    a = net.add("a6", op.clip(net.conv("a", net.input("x", 1, 6, 6, 4), 8), -1.0, 6.0))
    assert find_streams(net.done(net.conv("b", a, 4))) == []


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("make", [mobile_net, residual_net])
def test_the_float_network_keeps_its_function(make: Any, absorb: bool) -> None:
    module = uneven(make())
    found = decide_channels(module, seen_by(module).values, absorb)
    assert found.channels and (found.shifted > 0) == absorb
    changed = replace_weights(module, equalized_layers(module, found.channels))
    assert [g.id for g in find_groups(changed)] == [g.id for g in find_groups(module)]
    names = [g.id for g in find_groups(module)]
    executors = [ModuleExecutor(m) for m in (module, changed)]
    for sample in random_samples(module, 3):  # of those that were seen
        before: dict[str, np.ndarray] = {}
        after: dict[str, np.ndarray] = {}
        for executor, values in zip(executors, (before, after), strict=True):
            executor.trace(sample, values.__setitem__)
        for name in names:
            wanted = found.channels[name].stored(before[name]) if name in found.channels else before[name]
            np.testing.assert_allclose(after[name], wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max(), err_msg=name)


def test_a_clamp_never_opens_and_closes_only_beyond_what_was_seen() -> None:
    module = uneven(mobile_net())
    watcher = seen_by(module)
    found = decide_channels(module, watcher.values)
    clamped = [v for v in found.channels if v.endswith("_6") or v == "stem6"]
    assert clamped
    for value in clamped:
        channels, top = found.channels[value], watcher.values[value].high
        assert (channels.scale >= 1).all() and (channels.scale <= CAP).all() and not channels.shift.any()
        assert (channels.scale * top <= 6.0 + 1e-5).all(), "the clamp lies above everything seen"
        assert (channels.scale[top >= 6] == 1).all() and (channels.scale[top == 0] == 1).all()


def test_few_samples_close_a_clamp_less_than_many_of_the_same() -> None:
    module = uneven(mobile_net())
    few = seen_by(module).values

    def repeated(e: Extremes) -> Extremes:
        times = MANY // e.samples
        return replace(e, samples=MANY, count=times * e.count, total=times * e.total, square=times * e.square, moments=times * e.moments)

    closed = [decide_channels(module, seen).channels["stem6"].scale for seen in (few, {v: repeated(e) for v, e in few.items()})]
    assert (closed[0] <= closed[1]).all() and 1 < closed[0].max() <= CAP ** math.sqrt(few["stem6"].samples / MANY) < closed[1].max()


def test_a_channel_that_few_samples_excite_reaches_further() -> None:
    steady, rare = Extremes(), Extremes()
    for i in range(10):
        steady.add(np.full((1, 2, 2, 1), 2.0, np.float32))
        rare.add(np.full((1, 2, 2, 1), 2.0 if i == 0 else 0.0, np.float32))
    nothing = np.zeros(1)
    more = np.sqrt(100 / 10)  # the fewer samples, the further
    assert steady.reach(1, nothing) == pytest.approx(2 * (1 + 0.05 * more)) and rare.reach(1, nothing) == pytest.approx(2 * (1 + (0.05 + 9) * more))
    assert steady.reach(0, nothing) == 0


def test_channels_that_differ_by_chance_are_left_alone() -> None:
    """One sample decides nothing; differences that other samples would not show have no part in the scales."""
    module = uneven(mobile_net())
    assert not decide_channels(module, seen_by(module, 1).values).channels and decide_channels(module, seen_by(module, 3).values).channels
    rng = np.random.default_rng(0)
    span, doubt = np.exp(0.3 * rng.standard_normal(1000)), np.full(1000, 0.09)
    assert reliability(span, doubt) < 0.1 and reliability(span * np.exp(rng.standard_normal(1000)), doubt) > 0.85


def test_int8_gains_on_a_network_with_uneven_channels() -> None:
    module = uneven(mobile_net(1), 1)
    changed = replace_weights(module, equalized_layers(module, decide_channels(module, seen_by(module).values).channels))
    new = random_samples(module, 12, seed=9)
    executor, errors = ModuleExecutor(module), []
    reference = [executor.trace(s, lambda name, array: None)["out0"] for s in new]
    for candidate in (module, changed):
        table = calibrate(ModuleExecutor(candidate), random_samples(candidate, COUNT), ids=observed_ids(candidate))
        integer = sequence.run(sequence.INTEGER, insert_qdq(candidate, decide(candidate, table, find_target("native"), "default")))
        errors.append(sum(float(np.square(interpreter.run(integer, s)["out0"] - r).sum()) for s, r in zip(new, reference, strict=True)))
    assert errors[1] < 0.5 * errors[0]


def test_the_manifest_states_channels_exactly() -> None:
    channels = Channels(np.exp2(np.arange(5) / 8).astype(np.float32), np.array([0, 1, -2, 0.3, 0], np.float32))
    again = Channels.from_json(channels.to_json())
    np.testing.assert_array_equal([again.scale, again.shift], [channels.scale, channels.shift])
    assert "shift" not in Channels(channels.scale, np.zeros(5, np.float32)).to_json()
    x = np.ones((2, 5), np.float32)
    np.testing.assert_array_equal(stored_form({"channels": {"x": channels.to_json()}}, "x", x), (x - channels.shift) * channels.scale)
    assert stored_form({}, "x", x) is x


def test_replaced_weights_without_a_bias_get_one_and_several_become_one() -> None:
    net = Net(5)
    a = net.add("a_r", op.nn.relu(net.conv("a", net.input("x", 1, 5, 5, 3), 4, bias=False)))
    b = net.conv("b", a, 6, 1)
    module = net.done(net.add("b_bb", op.subtract(b, net.random(6))))
    groups = {g.id: g for g in find_groups(module)}
    same = replace_weights(module, {k: (g.weight, np.zeros(len(g.weight)) if g.bias is None else g.bias) for k, g in groups.items()})
    inputs = random_inputs(module)
    np.testing.assert_allclose(evaluate(same, inputs, ["b_bb"])["b_bb"], evaluate(module, inputs, ["b_bb"])["b_bb"], rtol=1e-5, atol=1e-5)
    moved = replace_weights(module, {"a_r": (groups["a_r"].weight, np.full(4, 2.0))})
    assert np.abs(evaluate(moved, inputs, ["a_r"])["a_r"] - np.maximum(evaluate(module, inputs, ["a"])["a"] + 2, 0)).max() < 1e-5


@pytest.mark.parametrize("groups, stride", [(1, 1), (4, 2)])
def test_analytic_correction_takes_the_mean_of_rounding_away(groups: int, stride: int) -> None:
    """Inputs that are the same everywhere but in the padding make the mean exact, so what is left is zero."""
    net = Net(2)
    x = net.input("x", 1, 7, 7, 8)
    y = net.conv("y", net.add("x2", op.add(x, const(np.float32(0)))), 8, groups=groups, strides=stride)
    module = net.done(net.conv("z", y, 4, 1))
    sample = {"x": np.broadcast_to(net.rng.uniform(1, 2, 8).astype(np.float32), (1, 7, 7, 8)).copy()}
    table = calibrate(ModuleExecutor(module), [sample], ids=observed_ids(module))
    plan = decide(module, table, find_target("native"), "fast")
    corrected = mean_of_rounding(module, plan, table)
    weight, scale = plan.weight("y_b")
    rounded = (weight * scale.reshape(-1, 1, 1, 1)).astype(np.float32)
    before = evaluate(replace_weights(module, {"y_b": (rounded, {g.id: g for g in find_groups(module)}["y_b"].bias)}), sample, ["y_b"])["y_b"]
    after = evaluate(replace_weights(module, {"y_b": (rounded, corrected["y_b"][1])}), sample, ["y_b"])["y_b"]
    wanted = evaluate(module, sample, ["y_b"])["y_b"].mean((0, 1, 2))
    assert np.abs(before.mean((0, 1, 2)) - wanted).max() > 1e-3
    np.testing.assert_allclose(after.mean((0, 1, 2)), wanted, atol=2e-5)
    assert Graph.of(module).outputs
