"""Which operators a plan leaves in float, which values share a quantization, and what a plan refuses."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrated import sketched_table
from small_nets import Net, in_float, op, residual_net, scalar

from qcompiler.base.errors import PlanError
from qcompiler.base.targets import find_target
from qcompiler.calibration.histogram import Histogram
from qcompiler.calibration.observers import relative_error
from qcompiler.calibration.table import CalibrationTable
from qcompiler.cli.demo import MODEL
from qcompiler.importers.model import load
from qcompiler.numerics.spec import QParams
from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import find_groups
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.plan.planner import choose_params, decide, named_groups, observed_ids, propose
from qcompiler.plan.quant_plan import Derived, Fixed, Float, Quantized, QuantPlan, Shared
from qcompiler.plan.recipes import PRESETS, recipe
from qcompiler.plan.weights import RATIOS, choose_scales, quantize_weight, squared_errors

TARGET = find_target("x86-avx2")


def planned(module: Any, preset: str = "default") -> QuantPlan:
    return decide(module, sketched_table(module), TARGET, preset)


@functools.cache
def residual_table() -> tuple[Any, CalibrationTable]:
    """The residual network of the pass tests and its calibration table, computed once."""
    module = residual_net()
    return module, sketched_table(module)


def plan_of(make: Callable[[Net, Any], Any], shape: tuple[int, ...] = (1, 8, 8, 8)) -> tuple[QuantPlan, Any]:
    """conv -> `make(net, value)` -> conv -> float head; so that what `make` makes lies between int8 operators."""
    net = Net(1)
    y = make(net, net.conv("first", net.input("x", *shape), shape[-1]))
    module = net.done(net.conv("last", y, 4, 1))
    return planned(module), module


def test_a_residual_network_is_int8_from_end_to_end() -> None:
    module, table = residual_table()
    plan = decide(module, table, TARGET)
    assert plan.reasons == {}
    assert isinstance(plan.edges["image"], Quantized) and plan.edges["nhwc"] == Derived("image", "transpose keeps its input's quantization")
    assert plan.edges["logits"] == Float("network output: computed in float32 from the int32 accumulator")
    assert isinstance(plan.edges["gate"], Fixed) and plan.params("gate") == QParams(1 / 256, -128)
    assert plan.edges["avg"] == Shared("cat", "concatenated in 'cat'") and plan.edges["max"] == Derived("excited", "max_pool2d keeps its input's quantization")
    assert plan.edges["excited"] == Shared("cat", "concatenated in 'cat'") and plan.edges["flat"] == Derived("cat", "reshape keeps its input's quantization")
    assert plan.params("a1_r").range[0] == 0.0, "the range is that behind the activation"
    insert_qdq(module, plan)  # carries it out without a refusal
    assert Graph.of(insert_qdq(module, plan)).attrs["qc.float_ops"] == {}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_choose_the_least_error_of_their_observers(preset: str) -> None:
    module, table = residual_table()
    plan = decide(module, table, TARGET, preset)
    chosen = {v: e for v, e in plan.edges.items() if isinstance(e, Quantized) and isinstance(e.params, QParams)}
    assert chosen and all(e.observer in recipe(preset).observers for e in chosen.values())
    for value in ("image", "stem_r", "h2" if "h2" in chosen else "swish"):
        histogram = table.values[value].histogram
        floor = relative_error(histogram, QParams.from_range(histogram.low, histogram.high))
        assert relative_error(histogram, chosen[value].params) <= floor * (1 + 1e-9)
        assert math.isfinite(chosen[value].sqnr) and chosen[value].sqnr > 20


def test_a_clipping_observer_must_earn_its_place() -> None:
    rng = np.random.default_rng(0)
    tail, flat = Histogram(), Histogram()
    for array, histogram in ((rng.standard_t(3, 100_000), tail), (rng.uniform(-1, 1, 100_000), flat)):
        array = array.astype(np.float32)
        histogram.add(array, float(array.min()), float(array.max()), float(np.square(array, dtype=np.float64).sum()))
    assert choose_params(tail, propose(tail, recipe("default").observers))[1] != "min-max"
    assert choose_params(flat, propose(flat, recipe("default").observers))[1] == "min-max"
    assert choose_params(tail, propose(tail, recipe("fast").observers))[1] == "min-max"
    assert choose_params(tail, propose(tail, recipe("default").observers))[2] > choose_params(tail, propose(tail, recipe("fast").observers))[2]


@pytest.mark.parametrize(
    "name, make, params",
    [
        ("sigmoid", lambda n, x: op.sigmoid(x), QParams(1 / 256, -128)),
        ("tanh", lambda n, x: op.tanh(x), QParams(1 / 128, 0)),
        ("hard sigmoid", lambda n, x: op.clip(n.add("s", op.add(n.add("t", op.multiply(x, scalar(1 / 6))), scalar(0.5))), 0.0, 1.0), QParams(1 / 255, -128)),
    ],
)
def test_fixed_parameters(name: str, make: Callable[[Net, Any], Any], params: QParams) -> None:
    plan, _ = plan_of(lambda net, x: net.add("y", make(net, x)))
    edge = plan.edges["y"]
    assert isinstance(edge, Fixed) and edge.params == params and edge.sqnr > 30, name


def test_a_sigmoid_that_is_concatenated_with_other_values_takes_their_scale() -> None:
    plan, _ = plan_of(lambda net, x: net.add("cat", op.concat([net.add("s", op.sigmoid(x)), net.conv("other", x, 8)], axis=3)))
    assert plan.edges["s"] == Shared("cat", "concatenated in 'cat'") and isinstance(plan.edges["cat"], Quantized)
    plan, _ = plan_of(lambda net, x: net.add("cat", op.concat([net.add("s", op.sigmoid(x)), net.add("t", op.sigmoid(net.conv("other", x, 8)))], axis=3)))
    assert isinstance(plan.edges["cat"], Fixed) and plan.params("t") == plan.params("s") == QParams(1 / 256, -128)


@pytest.mark.parametrize(
    "kind, make",
    [
        ("max_pool2d", lambda x: op.nn.max_pool2d(x, (2, 2), (2, 2), layout="NHWC")),
        ("reshape", lambda x: op.reshape(x, (1, 4, 16, 8))),
        ("transpose", lambda x: op.permute_dims(x, [0, 2, 1, 3])),
        ("slice", lambda x: op.strided_slice(x, [1], [0], [4])),
        ("pad", lambda x: op.nn.pad(x, (0, 0, 1, 1, 1, 1, 0, 0))),
        ("select", lambda x: op.nn.pad(x, (0, 0, 1, 1, 1, 1, 0, 0), "reflect")),
        ("select", lambda x: op.flip(x, 2)),
        (
            "resize2d",
            lambda x: op.image.resize2d(
                x, (16, 16), layout="NHWC", method="nearest_neighbor", coordinate_transformation_mode="asymmetric", rounding_method="floor"
            ),
        ),
    ],
)
def test_what_keeps_values_keeps_the_quantization(kind: str, make: Callable[[Any], Any]) -> None:
    plan, module = plan_of(lambda net, x: net.add("y", make(x)))
    assert {g.id: g.kind for g in find_groups(module)}["y"] == kind
    assert plan.edges["y"] == Derived("first_b", f"{kind} keeps its input's quantization")
    assert plan.params("y") == plan.params("first_b") is not None


def test_every_output_of_a_split_keeps_the_quantization() -> None:
    def halves(net: Net, x: Any) -> Any:
        parts = net.add("parts", op.split(x, 2, axis=3))
        from tvm import relax

        a, b = (net.add(f"part{i}", relax.TupleGetItem(parts, i)) for i in range(2))
        return net.add("sum", op.add(a, b))

    plan, _ = plan_of(halves)
    assert plan.params("part0") == plan.params("part1") == plan.params("first_b") is not None


def test_a_concat_of_operands_shares_one_quantization_that_covers_all() -> None:
    plan, module = plan_of(lambda net, x: net.add("cat", op.concat([net.conv("a", x, 8), net.add("b", op.nn.relu(net.conv("b0", x, 8))), x], axis=3)))
    assert plan.params("a_b") == plan.params("b") == plan.params("cat") == plan.params("first_b")
    low, high = plan.params("cat").range
    table = sketched_table(module)
    assert low <= 0.8 * table.values["cat"].low and high >= 0.8 * table.values["cat"].high


def test_an_operand_with_other_readers_keeps_a_much_finer_scale() -> None:
    def make(net: Net, x: Any) -> Any:
        small = net.add("small", op.clip(x, -0.05, 0.05))
        wide = net.conv("wide", small, 8)
        return net.add("cat", op.concat([net.add("again", op.add(net.conv("c", small, 8), wide)), small], axis=3))

    plan, _ = plan_of(make)
    assert plan.params("small") != plan.params("cat") == plan.params("again")
    assert plan.params("small").scale < 0.5 * plan.params("cat").scale


def test_padding_with_a_constant_widens_the_range_unless_it_is_far_off() -> None:
    def pad(value: float) -> Callable[[Net, Any], Any]:
        def make(net: Net, x: Any) -> Any:
            y = net.add("y", op.nn.pad(net.add("r", op.clip(x, 0.0, 1.0)), (0, 0, 1, 1, 1, 1, 0, 0), pad_value=value))
            return net.add("m", op.nn.max_pool2d(y, (3, 3), (2, 2), layout="NHWC"))

        return make

    plan, _ = plan_of(pad(-0.5))
    assert plan.params("r").range[0] == pytest.approx(-0.5, abs=0.01) and "widened to padding with -0.5" in plan.edges["r"].reason
    plan, _ = plan_of(pad(-3e38))
    assert plan.params("r").range[0] == 0.0 and plan.params("m") == plan.params("y") == plan.params("r")


def test_float_operators_have_a_reason_and_int8_neighbours() -> None:
    plan, module = plan_of(lambda net, x: net.add("y", in_float(x)))
    assert plan.reasons == {"y": "softmax has an integer form over the last axis only"}
    assert isinstance(plan.edges["y"], Fixed), "softmax values are quantized for the convolution behind it"
    assert plan.edges["first_b"] == Float("float32 operators read it only: computed in float32 from the int32 accumulator")
    insert_qdq(module, plan)


@pytest.mark.parametrize(("name", "factor"), [("sin", 30.0), ("sin", 0.5), ("silu", 30.0), *itertools.product(["sigmoid", "tanh", "silu"], [0.5, 3.0])])
def test_a_function_that_makes_much_of_a_rounding_stays_float(name: str, factor: float) -> None:
    """A sine of many periods; not one of a part of a period, and not activations."""

    def make(net: Net, x: Any) -> Any:
        scaled = net.add("scaled", op.multiply(net.conv("c", x, 8), scalar(factor)))
        y = net.add("y", op.nn.silu(scaled) if name == "silu" else getattr(op, name)(scaled))
        return net.conv("z", y, 8)

    plan, _ = plan_of(make)
    reasons = {k: v for k, v in plan.reasons.items() if "argument" in v}
    assert bool(reasons) == ((name, factor) == ("sin", 30.0)), reasons
    assert all("8 bits of its argument would leave" in r for r in reasons.values())


def test_the_argument_of_a_steep_function_is_not_rounded_either() -> None:
    def make(net: Net, x: Any) -> Any:
        scaled = net.add("scaled", op.multiply(x, scalar(30)))
        moved = net.add("moved", op.reshape(scaled, (1, 64, 1, 8)))
        waves = [net.conv(f"of {f}", net.add(f, getattr(op, f)(moved)), 8, 1) for f in ("sin", "cos")]
        return net.add("both", op.reshape(net.add("sum", op.add(*waves)), (1, 8, 8, 8)))

    plan, _ = plan_of(make)
    assert plan.reasons["scaled"].endswith("dB of 'sin'") and plan.reasons["sin"].startswith("8 bits of its argument")
    assert {"sin", "cos", "moved", "scaled"} <= plan.reasons.keys() and not {"first", "last", "sum"} & plan.reasons.keys()


def test_layers_kept_float_by_name() -> None:
    """By node, value, or a convolution that its BatchNorm swallowed; a typo names the nearest; its neighbours lose a rounding."""
    model = load(MODEL)
    assert named_groups(model, ["dense", "conv3", "relu3", "batchnormalization8~conv"]) == ["relu3", "clip2", "logits"]
    with pytest.raises(PlanError, match="^no layer is named 'con3'. Did you mean 'conv3'"):
        named_groups(model, ["con3"])
    assert named_groups(model, ["op:Gemm"]) == ["logits"] and named_groups(model, ["dens?", "clip*"]) == ["clip1", "clip2", "logits"]
    every = named_groups(model, ["op:Conv"])
    assert len(every) > 5 and set(every) <= set(named_groups(model, ["*"]))
    with pytest.raises(PlanError, match="^the model has no operator 'Cnv'. Did you mean 'Conv'"):
        named_groups(model, ["op:Cnv"])
    with pytest.raises(PlanError, match="^no layer is named 'x/[*]'"):
        named_groups(model, ["x/*"])
    table = sketched_table(model.module)
    plan = decide(model, table, TARGET, keep_float={"relu4": "because", "batchnormalization5": "of this"})
    assert plan.reasons == {"relu4": "because", "batchnormalization5": "of this"}
    assert plan.params("relu4") is None and isinstance(plan.edges["relu3"], Quantized) and isinstance(plan.edges["batchnormalization5"], Quantized)
    assert set(plan.scales) == set(decide(model, table, TARGET).scales) - {"relu4", "batchnormalization5"}


def test_light_operators_between_float_operators_stay_float() -> None:
    def make(net: Net, x: Any) -> Any:
        a = net.add("a", in_float(x))
        b = net.add("b", in_float(x))
        product = net.add("product", op.multiply(a, b))
        return net.add("swish", op.nn.silu(net.add("moved", op.reshape(product, (1, 4, 16, 8)))))

    plan, module = plan_of(make)
    assert plan.reasons["product"] == "its operands are float32"
    assert isinstance(plan.edges["product"], Quantized) and plan.edges["moved"] == Derived("product", "reshape keeps its input's quantization")
    assert "swish" not in plan.reasons
    insert_qdq(module, plan)


def test_the_tail_of_the_network_stays_float() -> None:
    net = Net(2)
    a = net.conv("body", net.input("x", 1, 8, 8, 3), 8)
    score = net.add("score", op.sigmoid(net.conv("class", a, 4, 1)))
    boxes = net.add("boxes", op.reshape(net.conv("box", a, 4, 1), (1, 64, 4)))
    both = net.add("both", op.concat([boxes, net.add("flat", op.reshape(score, (1, 64, 4)))], axis=2))
    module = net.done(both)
    plan = planned(module)
    assert plan.reasons == {
        "score": "its operands are float32",
        "boxes": "it carries float32 values to float32 operators or outputs",
        "flat": "it carries float32 values to float32 operators or outputs",
        "both": "it carries float32 values to float32 operators or outputs",
    }
    assert all(plan.params(v) is None for v in ("class_b", "box_b", "score", "boxes", "flat", "both")) and plan.params("body_b") is not None
    insert_qdq(module, plan)


def test_a_large_activation_at_the_end_is_int8() -> None:
    net = Net(2)
    module = net.done(net.add("mask", op.sigmoid(net.conv("class", net.input("x", 1, 80, 80, 3), 4, 1))))
    plan = planned(module)
    assert plan.reasons == {} and isinstance(plan.edges["mask"], Fixed) and isinstance(plan.edges["class_b"], Quantized)


def test_an_output_that_is_read_on_is_stored_in_int8() -> None:
    net = Net(2)
    a = net.conv("body", net.input("x", 1, 8, 8, 3), 8)
    plan = planned(net.done(a, net.conv("head", a, 2, 1)))
    assert isinstance(plan.edges["body_b"], Quantized) and isinstance(plan.edges["head_b"], Float)


def test_a_network_without_int8_operators_stays_float() -> None:
    net = Net(2)
    x = net.input("x", 1, 10)
    module = net.done(net.add("y", in_float(net.add("z", op.reshape(x, (1, 10))))))
    plan = planned(module)
    assert all(isinstance(e, Float) for e in plan.edges.values()) and plan.edges["x"] == Float("network input read by float32 operators only")
    assert insert_qdq(module, plan) is not None


def test_an_always_zero_value_is_noted() -> None:
    plan, _ = plan_of(lambda net, x: net.add("dead", op.clip(x, 0.0, 0.0)))
    assert plan.edges["dead"] == Quantized(QParams(1.0, 0), "none", math.inf, "always zero in the calibration data")
    assert plan.notes == ["value 'dead' was always zero in the calibration data; it is stored with scale 1 and zero point 0"]


def test_a_target_without_a_kernel_row_leaves_the_operator_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    import qcompiler.schedules.table as table

    net = Net(1)
    y = net.add("y", op.nn.max_pool2d(net.conv("first", net.input("x", 1, 8, 8, 8), 8), (2, 2), (2, 2), layout="NHWC"))
    module = net.done(net.conv("last", y, 4, 1))
    statistics = sketched_table(module)
    decide(module, statistics, TARGET)  # fills the table of rows
    monkeypatch.setitem(table.KERNELS, "qc.max_pool2d", [])
    assert decide(module, statistics, TARGET).reasons == {"y": "no kernel row implements qc.max_pool2d on target x86-avx2"}


# -- weights ------------------------------------------------------------------------------------------------------------------------------


def test_weight_scales_never_lose_to_min_max() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 3, 3, 512)).astype(np.float32)
    flat, full = weight.reshape(8, -1), np.abs(weight).reshape(8, -1).max(1) / 127
    for ratios in RATIOS.values():
        chosen = choose_scales(weight, ratios)
        error = squared_errors(flat, chosen.scale)
        assert (error <= squared_errors(flat, full) * (1 + 1e-5)).all()
        quantized = quantize_weight(weight, chosen.scale)
        measured = np.square(weight - chosen.scale[:, None, None, None] * quantized).reshape(8, -1).sum(1)
        np.testing.assert_allclose(error, measured, rtol=1e-3)
        assert chosen.sqnr == pytest.approx(10 * np.log10(np.square(flat).sum() / error.sum()), abs=0.01)
        assert quantized.dtype == np.int8 and np.abs(quantized.astype(int)).max() <= 127
    assert choose_scales(weight, RATIOS["accurate"]).clipped > 0 == choose_scales(weight, RATIOS["fast"]).clipped


def test_a_channel_of_zeros_states_its_bias() -> None:
    weight = np.zeros((3, 1, 1, 4), np.float32)
    weight[0] = 1
    scale = choose_scales(weight, (1.0,)).with_bias(np.array([0.5, 0.01, 0.0]), 0.05).scale
    assert scale[2] == 1.0 and np.rint(0.01 / (0.05 * scale[1])) * 0.05 * scale[1] == pytest.approx(0.01, rel=1e-6)
    assert not quantize_weight(weight, scale)[1:].any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1e-37, 1e-30])
def test_dead_channels_have_usable_scales(tiny: float) -> None:
    """Training with weight decay leaves channels of subnormal weights."""
    weight = np.ones((2, 1, 1, 4), np.float32)
    weight[0] = tiny
    for ratios in RATIOS.values():
        chosen = choose_scales(weight, ratios).with_bias(np.array([tiny, 1.0]), 1.0)
        assert (np.float32(chosen.scale) >= 2.0**-126).all() and chosen.sqnr > 20
        error = np.abs(quantize_weight(weight, chosen.scale) * chosen.scale[:, None, None, None] - weight)
        assert error.max() < 0.01 and error[0].max() < max(0.01 * tiny, 1e-37)


# -- files, text, errors -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, QuantPlan]:
    module, table = residual_table()
    plan = decide(module, table, TARGET)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    return path, module, plan


def test_round_trip(saved: tuple[Path, Any, QuantPlan]) -> None:
    path, module, plan = saved
    again = QuantPlan.load(path, module)
    assert again.digest == plan.digest and again.edges == plan.edges
    for group in plan.scales:
        for a, b in zip(again.weight(group), plan.weight(group), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(PlanError, match="loaded without its model"):
        QuantPlan.load(path).weight("logits")
    with pytest.raises(PlanError, match="no weight scales for operator 'gate'"):
        again.weight("gate")


def test_explain_has_a_row_per_value_and_every_reason(saved: tuple[Path, Any, QuantPlan]) -> None:
    _, module, plan = saved
    groups = find_groups(module)
    text = plan.explain(groups)
    lines = text.splitlines()
    assert lines[0] == f"preset default: {len(groups)} of {len(groups)} operators in int8"
    assert len(lines) == 2 + len(plan.edges)
    for value, edge in plan.edges.items():
        (line,) = [row for row in lines[2:] if row.split()[0] == value]
        assert edge.reason in line and ("int8" in line) == (plan.params(value) is not None)


def test_a_plan_for_another_model_is_refused(saved: tuple[Path, Any, QuantPlan]) -> None:
    path, _, _ = saved
    net = Net()
    other = net.done(net.conv("head", net.input("x", 1, 4, 4, 3), 2))
    with pytest.raises(PlanError, match="made for another model|no row for value"):
        QuantPlan.load(path, other)
    with pytest.raises(PlanError, match="no statistics in the calibration table, which was made for another model"):
        decide(other, residual_table()[1], TARGET)


def test_damaged_files_are_refused(saved: tuple[Path, Any, QuantPlan], tmp_path: Path) -> None:
    document = json.loads(saved[0].read_text())
    bad = {"a": "nonsense", "b": json.dumps({**document, "format": 7}), "c": json.dumps({**document, "edges": {"x": {"kind": "odd"}}}), "d": json.dumps([])}
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(PlanError, match="can't be read as a quantization plan|format 7 is not supported"):
            QuantPlan.load(tmp_path / name)
    with pytest.raises(PlanError, match="can't be read"):
        QuantPlan.load(tmp_path / "missing")


@pytest.mark.parametrize(
    "value, edge, message",
    [
        ("stem_r", Float("no"), "conv2d '.*' is planned in 8 bits, but its input 'stem_r' stays float32|conv2d 'stem_r' is planned"),
        ("swish", Float("no"), "unary 'swish' is planned in 8 bits, but its output stays float32"),
        ("flat", Quantized(QParams(0.5, 3), "min-max", 1.0, ""), "reshape 'flat' .* its input 'cat' has scale"),
        ("cat", Shared("flat", ""), "round in a circle: "),
        ("cat", Shared("nowhere", ""), "no row for value 'nowhere'"),
        ("stranger", Float(""), "row for value 'stranger', which the model does not have"),
    ],
)
def test_validate_names_the_contradiction(saved: tuple[Path, Any, QuantPlan], value: str, edge: Any, message: str) -> None:
    _, module, plan = saved
    changed = dataclasses.replace(plan, edges={**plan.edges, value: edge})
    with pytest.raises(PlanError, match=message):
        changed.validate(find_groups(module), ["image"])


def test_validate_checks_weight_scales(saved: tuple[Path, Any, QuantPlan]) -> None:
    _, module, plan = saved
    for scale in (plan.scales["logits"][:-1], -plan.scales["logits"]):
        with pytest.raises(PlanError, match="dense 'logits' .* lacks 10 positive weight scales"):
            dataclasses.replace(plan, scales={**plan.scales, "logits": scale}).validate(find_groups(module), ["image"])


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(PlanError, match="unknown preset 'acurate'. Did you mean 'accurate'"):
        decide(*residual_table(), TARGET, "acurate")


def test_observed_ids_suffice(saved: tuple[Path, Any, QuantPlan]) -> None:
    _, module, plan = saved
    assert {v for v in plan.edges if plan.params(v) is not None} <= set(observed_ids(module))
