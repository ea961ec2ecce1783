"""Compiling to an accuracy target, on the example network: sensitivities against whole runs, targets met and missed, bad input."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_nets import OnnxNet

import qcompiler
from qcompiler.base.errors import DataError
from qcompiler.base.targets import find_target
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration.data import CheckedSamples, open_samples, take
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.importers.model import load
from qcompiler.numerics.spec import QParams
from qcompiler.passes import sequence
from qcompiler.passes.graph import Graph, GraphBuilder, dtype_of, shape_of, substitute
from qcompiler.pipeline import accuracy_target
from qcompiler.pipeline.compile import compile_stages
from qcompiler.pipeline.library import Compilation
from qcompiler.pipeline.survey import layer_noise, rounded_layers
from qcompiler.plan.sensitivity import measure_sensitivity
from qcompiler.runtime.session import Session
from qcompiler.verification.bits import bit_parity
from qcompiler.verification.interpreter import run
from qcompiler.verification.parity import verify

Twins = tuple[Session, Session, dict[str, tuple[np.ndarray, np.ndarray]]]


def samples(count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(demo_data()[0], count))


@pytest.fixture(scope="module")
def plain() -> Compilation:
    return compile_stages(MODEL, calibration=samples(16), preset="fast")


@pytest.fixture(scope="module")
def sessions(plain: Compilation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    """(float, float with int8 weights, the weights with their biases)."""
    folder = tmp_path_factory.mktemp("twin")
    measured = plain.quantized.measured
    weights = dict(rounded_layers(plain.integer, measured))
    original, rounded = (Session(measured.twin.link().save(folder / f"{i}.so")) for i in range(2))
    rounded.set_constants(measured.twin.constants_with((name, {1: w, 2: b}) for name, (w, b) in weights.items()))
    yield original, rounded, weights


def with_value(compilation: Compilation, name: str, sample: dict[str, np.ndarray]) -> np.ndarray:
    """The logits in the reference arithmetic, with one value of the float network rounded to its 8 bits."""
    module = sequence.run(sequence.FLOAT, compilation.quantized.model.module)
    params = compilation.quantized.plan.params(name)
    assert params is not None
    values = run(module, sample, keep="all")
    graph = Graph.of(module)
    builder = GraphBuilder(graph.attrs)
    env = {str(p.name): builder.input(str(p.name), shape_of(p), dtype_of(p)) for p in graph.inputs}
    feed = dict(sample)
    for binding, expr in graph.bindings:
        if binding == name:
            env[binding] = builder.input(f"{binding}~given", shape_of(expr), "float32")
            feed[f"{binding}~given"] = params.dequantize(params.quantize(values[binding])).astype(np.float32)
        else:
            env[binding] = builder.emit(binding, substitute(expr, lambda v: env[str(v.name)]))
    if name in feed:
        feed[name] = params.dequantize(params.quantize(sample[name])).astype(np.float32)
    return run(builder.finish([("logits", env[str(graph.outputs[0][1].name)])]), feed)["logits"]


def test_sensitivity_of_values(plain: Compilation, sessions: Twins) -> None:
    """Noise of single roundings equals that of whole runs in the reference arithmetic; afterwards nothing has changed."""
    original, rounded, _ = sessions
    few = samples(2)
    before = [original.run(s)["logits"] for s in few]
    params = {v: p for v in ("image", "relu2", "relu5", "flatten1") if (p := plain.quantized.plan.params(v)) is not None}
    assert len(params) == 4
    found = measure_sensitivity(original, rounded, [], params, few)
    assert found.samples == 2 and found.weights == {}
    assert measure_sensitivity(original, rounded, [], params, few, work=1.0).samples == 1, "of large networks fewer samples tell"
    power = sum(np.square(b.astype(np.float64)).sum() for b in before)
    for name in ("image", "relu2", "relu5"):
        noise = sum(np.square(with_value(plain, name, s).astype(np.float64) - b).sum() for s, b in zip(few, before, strict=True))
        assert found.values[name] == pytest.approx(noise / power, rel=0.02), name
    assert [original.run(s)["logits"].tobytes() for s in few] == [b.tobytes() for b in before]


def test_more_samples_are_for_roundings_that_count(plain: Compilation, sessions: Twins) -> None:
    """One with next to no noise is known by the first two; of the other all samples tell."""
    original, rounded, _ = sessions
    few, known = samples(4), plain.quantized.plan.params("relu5")
    assert known is not None
    reports = list[int]()
    params = {"relu5": known, "image": QParams(1e-3, 0, "int16")}
    found = measure_sensitivity(original, rounded, [], params, few, progress=lambda stage, done, total: reports.append(done))
    assert found.samples == 4 and reports[-1] == 2 * 2 + 2 and found.values["image"] < found.values["relu5"] / 2
    for name, seen in (("image", few[:2]), ("relu5", few)):
        assert found.values[name] == measure_sensitivity(original, rounded, [], {name: params[name]}, seen).values[name]


def test_sensitivity_of_weights(plain: Compilation, sessions: Twins) -> None:
    """Noise of one layer's weights equals that of a whole run with these constants; in bounded time at least one sample is seen."""
    original, rounded, weights = sessions
    few = samples(2)
    assert len(weights) == 10
    found = measure_sensitivity(original, rounded, set(weights), {}, few, seconds=0.0)
    assert found.samples == 1 and set(found.weights) == set(weights) and min(found.weights.values()) > 0
    reference = original.run(few[0])["logits"].astype(np.float64)
    twin = plain.quantized.measured.twin
    before = twin.constants.tobytes()
    for name in ("relu1", "clip2", "logits"):
        original.set_constants(twin.constants_with([(name, dict(enumerate(weights[name], 1)))]))
        noise = np.square(original.run(few[0])["logits"] - reference).sum() / np.square(reference).sum()
        assert found.weights[name] == pytest.approx(noise, rel=1e-6), name
    assert twin.constants.tobytes() == before
    original.set_constants(twin.constants)
    np.testing.assert_array_equal(original.run(few[0])["logits"], reference.astype(np.float32))


def test_layers_by_their_noise(plain: Compilation, sessions: Twins) -> None:
    """What `explain --sensitivity` shows: the estimate of the whole plan is near what the library has; layers are in order of what they gain."""
    seen, estimate, rows = layer_noise(plain.quantized)
    measured = verify(plain.artifact.save(sessions[0].path.parent / "plain.so"), MODEL, samples(16), layer_samples=0)
    assert seen == 16 and estimate == pytest.approx(measured.outputs[0].metrics.sqnr_db, abs=2.5)
    assert [r.gain_db for r in rows] == sorted((r.gain_db for r in rows), reverse=True) and len(rows) == 11
    assert all(-1 < r.work < 3 for r in rows) and max(r.work for r in rows) > 0.1
    assert all(r.sqnr_db > estimate and r.gain_db >= 0 for r in rows) and max(r.gain_db for r in rows) > 0.5
    assert {r.kind for r in rows} == {"conv2d", "mean", "dense"}


def test_a_target_between_int8_and_float_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers stay float, with reasons; the library keeps the promise on digits it never saw; the rest is what it would be."""
    monkeypatch.setattr(accuracy_target, "_MEASURING", 0.2)
    _, evaluation, labels = demo_data()
    goal: Any = {"min_sqnr": 36.0, "max_accuracy_drop": 5.0, "labels": demo_labels(48)}
    made = compile_stages(MODEL, calibration=samples(48), preset="fast", disable=["analytic-bias"], keep_float=["relu4"], **goal)
    account = made.artifact.manifest["mixed_precision"]
    assert account["met"] and "is met with" in account["statement"] and account["held_out"] == 12
    first, *others = account["points"]
    assert first["float_layers"] == ["relu4"] and not first["met"] and others
    (chosen,) = (p for p in account["points"] if p["chosen"])
    assert chosen["met"] and chosen["sqnr_bound_db"] >= 36 > first["sqnr_db"] and chosen["bytes"] == pytest.approx(made.artifact.size, rel=0.1)
    assert chosen["seconds"] == min(p["seconds"] for p in account["points"] if p["met"])
    reasons = {f["id"]: f["reason"] for f in made.artifact.manifest["float_ops"]}
    assert set(chosen["float_layers"]) <= set(reasons) and reasons["relu4"].startswith("kept in float32 as asked")
    assert all("chosen to meet --min-sqnr 36" in reasons[n] for n in chosen["float_layers"] if n != "relu4")
    curve = [p["sqnr_db"] for p in account["curve"]]
    assert curve[0] == pytest.approx(first["sqnr_db"]) and len(curve) > 3 and len(account["sensitivity"]["layers"]) == 10
    library = made.artifact.save(tmp_path / "m.so")
    report = verify(library, MODEL, open_samples(evaluation, made.quantized.model.inputs), labels=labels, min_sqnr=35.5, max_accuracy_drop=2.0)
    assert report.passed, report.failures
    session, sample = Session(library), samples(1)[0]
    expected = run(made.integer, sample, keep="all")
    int8 = [v for v in ("image~nhwc", "relu1") if v in expected and expected[v].dtype == np.int8]
    assert not int8 or bit_parity(session, {v: expected[v] for v in int8}, sample) == []


def demo_labels(count: int) -> np.ndarray:
    """What the float network says of the calibration digits: labels by which it is always right."""
    module = sequence.run(sequence.FLOAT, load(MODEL).module)
    return np.array([int(run(module, s)["logits"].argmax()) for s in samples(count)])


def test_a_target_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One calibration sample, a second of time, 200 dB, a target that this machine is not: the library is written, the statement is clear, and the
    exit status is 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accuracy_target, "missing_features", lambda target: ["other"])
    ticks = itertools.count(1)  # a second each time that somebody looks at the clock, however fast this machine is
    monkeypatch.setattr(accuracy_target._Clock, "spent", property(lambda clock: float(next(ticks))))
    np.savez("one.npz", image=samples(1)[0]["image"])
    words = ["compile", str(MODEL), "--calibration", "one.npz", "--target", "x86-avx2", "--output", "m.so", "--preset", "fast", "--json"]
    words += ["--min-sqnr", "200", "--time-budget", "1s"]
    assert main(words) == 1
    account = json.loads(capsys.readouterr().out)["mixed_precision"]
    assert not account["met"] and "THE TARGET (--min-sqnr 200) IS NOT MET" in account["statement"] and "time budget of 1 s" in account["statement"]
    assert account["measured_on"] == find_target("native").name
    assert "the 1 calibration sample themselves" in account["findings"][0]["found"]
    assert Session("m.so").run(samples(1)[0])["logits"].shape == (1, 10)
    assert main(["inspect", "m.so"]) == 0
    assert "IS NOT MET" in capsys.readouterr().out


def test_bad_input(tmp_path: Path) -> None:
    few = samples(2)
    for wrong, message in (
        ({"labels": [1, 2]}, "labels serves an accuracy target only"),
        ({"time_budget": 5.0}, "time_budget serves an accuracy target only"),
        ({"max_accuracy_drop": 1.0}, "needs labels"),
        ({"max_accuracy_drop": 1.0, "labels": [1, 2, 3]}, "3 labels for 2 samples"),
        ({"max_accuracy_drop": 1.0, "labels": [1, 10]}, r"labels lie in \[1, 10\], but output 'logits' has 10 classes"),
        ({"min_agreement": 2.0}, "a fraction from 0 to 1"),
    ):
        with pytest.raises(DataError, match=message):
            qcompiler.compile(MODEL, calibration=few, **wrong)  # type: ignore[arg-type]
    net = OnnxNet()
    image = net.op("Conv", net.input("x", 1, 3, 8, 8), net.weight(4, 3, 3, 3))
    with pytest.raises(DataError, match="needs? an output of shape"):
        qcompiler.compile(net.save(tmp_path / "n.onnx", [image]), calibration=[{"x": np.zeros((1, 3, 8, 8), np.float32)}], min_agreement=0.9)


def test_take() -> None:
    some = take(CheckedSamples(samples(6), open_inputs()), [1, 4])
    assert some.count == 2 and [s["image"].tobytes() for s in some] == [samples(6)[i]["image"].tobytes() for i in (1, 4)]
    assert len(list(some)) == 2, "read again and again"


def open_inputs() -> tuple[TensorInfo, ...]:
    return (TensorInfo("image", (1, 1, 16, 16), "float32"),)
