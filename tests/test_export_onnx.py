"""The exported ONNX QDQ model: valid, the library's own parameters, and the library's own numbers in ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import OnnxNet

import qcompiler
from qcompiler.base.errors import DataError, ModelError, OutputError
from qcompiler.calibration.data import CheckedSamples
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.exporters.export_onnx import Export, _source, export_onnx, qdq_model
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.passes.graph import Graph
from qcompiler.pipeline.compile import compile_stages
from qcompiler.pipeline.library import Compilation
from qcompiler.refine.integer_layers import integer_layers

Feeds = dict[str, np.ndarray]


def run(model: onnx.ModelProto, feeds: Feeds, outputs: list[str] | None = None) -> Feeds:
    """The model in ONNX Runtime, without its optimizer: the standard's arithmetic."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = runtime.InferenceSession(model.SerializeToString(), options)
    names = outputs or [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def traced(compilation: Compilation, sample: Feeds) -> tuple[Feeds, Feeds]:
    """(every value, outputs) of the library."""
    kept: Feeds = {}
    session = compilation.built.session()
    outputs = session.trace(sample, lambda name, array: kept.__setitem__(name, array.copy()))
    return kept, outputs


def step_by_step(export: Export, values: Feeds, sample: Feeds) -> dict[str, tuple[int, float]]:
    """Every 8-bit value computed by ONNX Runtime from the library's own inputs of that operator: (largest difference in steps, fraction that differs)."""
    model = onnx.ModelProto()
    model.CopyFrom(export.model)
    feeds, wanted = dict(sample), {}
    kept = []
    for node in model.graph.node:
        name = node.output[0]
        if node.op_type == "DequantizeLinear" and name in export.values and name in values and values[name].dtype == np.int8:
            value = values[name].transpose(0, 3, 1, 2) if values[name].ndim == 4 else values[name]
            feeds[name] = np.ascontiguousarray(export.values[name].dequantize(value), np.float32)
            model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape))
            model.graph.output.append(helper.make_tensor_value_info(node.input[0], TensorProto.INT8, None))
            wanted[node.input[0]] = (name, value)
        else:
            kept.append(node)
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in kept]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    found = run(model, feeds, list(wanted))
    result = {}
    for output, (name, value) in wanted.items():
        difference = np.abs(found[output].astype(int) - value.astype(int))
        result[name] = int(difference.max()), float((difference > 0).mean())
    return result


@pytest.fixture(scope="module")
def digits() -> tuple[Compilation, Export]:
    compilation = compile_stages(MODEL, "native", demo_data()[0])
    return compilation, qdq_model(_source(MODEL), compilation)


def test_digits_agree_end_to_end(digits: tuple[Compilation, Export]) -> None:
    compilation, export = digits
    onnx.checker.check_model(export.model, full_check=True)
    assert export.kept_float == {}
    samples = demo_data()[1][:64]
    session = compilation.built.session()
    ours = np.concatenate([session.run(s)["logits"] for s in samples])
    theirs = np.concatenate([run(export.model, s)["logits"] for s in samples])
    assert sqnr_db(theirs, ours) > 40
    assert (ours.argmax(1) == theirs.argmax(1)).all()


def test_digits_agree_operator_by_operator(digits: tuple[Compilation, Export]) -> None:
    compilation, export = digits
    sample = demo_data()[1][3]
    values, _ = traced(compilation, sample)
    differences = step_by_step(export, values, sample)
    assert len(differences) >= 10
    assert all(steps <= 1 and fraction < 0.002 for steps, fraction in differences.values()), differences


def test_parameters_are_the_librarys(digits: tuple[Compilation, Export]) -> None:
    compilation, export = digits
    tensors = {t.name: numpy_helper.to_array(t) for t in export.model.graph.initializer}
    manifest = {name.partition("~")[0]: value for name, value in compilation.artifact.manifest["values"].items()}
    assert set(export.values) == set(manifest)
    for node in export.model.graph.node:
        if node.op_type == "QuantizeLinear":
            name = node.output[0].removesuffix("~q").removesuffix("~dq")
            assert tensors[node.input[1]] == np.float32(manifest[name]["scale"]), name
            assert tensors[node.input[2]] == manifest[name]["zero_point"] and tensors[node.input[2]].dtype == np.int8, name
    layers = {layer.group: layer for layer in integer_layers(compilation.integer)}
    assert len(layers) == export.weighted == 10
    before = {layer.group: layer.bias for layer in integer_layers(compilation.quantized.integer)}
    assert any((layers[g].bias != before[g]).any() for g in layers), "the corrections were kept"
    for group, layer in layers.items():
        np.testing.assert_array_equal(tensors[f"{group}~bias_int32"], layer.bias)
        weight = tensors[f"{group}~weight_int8"]
        assert weight.dtype == np.int8 and weight.shape[0] == len(layer.bias)
        np.testing.assert_array_equal(np.sort(weight, axis=None), np.sort(layer.weight, axis=None))


def samples_of(path: Path, count: int = 4) -> CheckedSamples:
    from qcompiler.importers.model import load

    inputs = load(path).inputs
    rng = np.random.default_rng(5)
    return CheckedSamples([{i.name: rng.standard_normal(i.shape).astype(np.float32) for i in inputs} for _ in range(count)], inputs)


def many_operators(path: Path) -> Path:
    """Separate bias, BatchNormalization, merged Pad, residual, pooling, concatenation, constants, hard-swish, transposed convolution, a flattened image."""
    net = OnnxNet(17, seed=4)
    x = net.op("Pad", net.input("x", 1, 3, 12, 12), net.ints(0, 0, 1, 1, 0, 0, 1, 1))
    x = net.op("Conv", x, net.weight(8, 3, 3, 3), strides=[2, 2])
    scale, shift = (net.const(net.rng.uniform(0.5, 1.5, 8)) for _ in range(2))
    x = net.op("BatchNormalization", x, scale, shift, net.const(np.zeros(8)), net.const(np.ones(8)))
    x = net.op("HardSwish", x)
    y = net.op("Conv", x, net.weight(8, 1, 3, 3), group=8, pads=[1, 1, 1, 1])
    y = net.op("Add", y, net.const(net.rng.standard_normal((1, 8, 1, 1))))
    x = net.op("Relu", net.op("Add", x, y))
    t = net.op("ConvTranspose", x, net.weight(8, 5, 2, 2), strides=[2, 2])
    t = net.op("MaxPool", t, kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("Concat", x, net.op("Mul", t, net.const(net.rng.uniform(0.5, 2, (1, 5, 1, 1)))), axis=1)
    x = net.op("Flatten", net.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]))
    x = net.op("Relu", net.op("Gemm", x, net.weight(20, 117), net.const(net.rng.standard_normal(20)), transB=1))
    y = net.op("Softmax", net.op("MatMul", x, net.weight(20, 6)))
    return net.save(path, [y])


@pytest.mark.parametrize("preset", ["fast", "default"])
def test_many_operators(tmp_path: Path, preset: str) -> None:
    path = many_operators(tmp_path / "net.onnx")
    samples = samples_of(path)
    compilation = compile_stages(path, "native", samples, preset=preset)
    export = qdq_model(_source(path), compilation)
    assert all("softmax" in reason for reason in export.kept_float.values())
    assert export.weighted == 5
    for sample in samples:
        values, outputs = traced(compilation, sample)
        found = run(export.model, sample)
        for name, array in outputs.items():
            assert sqnr_db(found[name], array) > 30, name
        differences = step_by_step(export, values, sample)
        assert len(differences) >= 8
        assert all(steps <= 1 and fraction < 0.02 for steps, fraction in differences.values()), differences


def test_the_source_stays_in_another_data_layout(tmp_path: Path) -> None:
    """A network with channels last around its convolutions, and a 1-D one: weights go into the node's own layout."""
    net = OnnxNet(17, seed=2)
    x = net.op("Transpose", net.input("x", 1, 9, 9, 4), perm=[0, 3, 1, 2])
    x = net.op("Transpose", net.op("Relu", net.op("Conv", x, net.weight(6, 4, 3, 3))), perm=[0, 2, 3, 1])
    x = net.op("Reshape", x, net.ints(1, 49, 6))
    x = net.op("Conv", net.op("Transpose", x, perm=[0, 2, 1]), net.weight(5, 6, 3), net.const(np.ones(5)), pads=[1, 1])
    y = net.op("ReduceMean", x, axes=[2], keepdims=0)
    path = net.save(tmp_path / "net.onnx", [y])
    samples = samples_of(path)
    compilation = compile_stages(path, "native", samples)
    export = qdq_model(_source(path), compilation)
    assert export.weighted == 2
    for sample in samples:
        _, outputs = traced(compilation, sample)
        found = run(export.model, sample)
        assert sqnr_db(found[y], outputs[y]) > 30


def test_an_old_operator_set_is_converted(tmp_path: Path) -> None:
    net = OnnxNet(11)
    y = net.op("Relu", net.op("Conv", net.input("x", 1, 3, 8, 8), net.weight(4, 3, 3, 3)))
    y = net.op("Conv", y, net.weight(4, 4, 1, 1))
    path = net.save(tmp_path / "old.onnx", [y])
    export = export_onnx(path, tmp_path / "out.onnx", samples_of(path), preset="fast")
    written = onnx.load(tmp_path / "out.onnx")
    assert {o.domain: o.version for o in written.opset_import}[""] >= 13
    assert export.weighted == 2
    assert written == export.model


def test_float16_is_refused(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((2, 2), np.float16), "w")
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [1, 2]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", info[:1], info[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "half.onnx")
    with pytest.raises(ModelError, match="float16.*float32"):
        export_onnx(tmp_path / "half.onnx", tmp_path / "out.onnx", [])


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        export_onnx("missing.onnx", tmp_path / "nowhere" / "out.onnx", None)
    with pytest.raises(DataError, match="calibration data is needed"):
        export_onnx(MODEL, tmp_path / "out.onnx", None)
    assert not list(tmp_path.iterdir())


@pytest.fixture()
def calibration(tmp_path: Path) -> str:
    np.savez(tmp_path / "cal.npz", image=np.concatenate([s["image"] for s in demo_data()[0][:8]]))
    return str(tmp_path / "cal.npz")


def test_the_command(tmp_path: Path, calibration: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out.onnx")
    words = ["export-onnx", str(MODEL), "--output", output, "--preset", "fast"]
    assert main([*words, "--calibration", calibration, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["weighted"] == 10
    assert document["bytes"] == Path(output).stat().st_size
    assert run(onnx.load(output), demo_data()[1][0])["logits"].shape == (1, 10)
    assert main(words) == 2
    assert "calibration data is needed" in capsys.readouterr().err


def test_explain(calibration: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["explain", str(MODEL), "--preset", "fast", "--calibration", calibration]
    monkeypatch.setattr(qcompiler.pipeline.compile, "compile_stages", None)  # the plan needs no compilation
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "13 of 13 operators in int8" in text
    assert main([*words, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["edges"]["image"]["scale"] == pytest.approx(1 / 255)
    assert document["edges"]["logits"]["kind"] == "float"
    assert len(document["operators"]) == 13 and document["samples"] == 8 and document["refused"] == {}
    assert "sensitivity" not in document
    assert main([*words, "--sensitivity"]) == 0
    assert "\nrelu1 " in capsys.readouterr().out.split("dB gained when it stays float")[1]
    assert main(words[:-2]) == 2
    assert "calibration data is needed" in capsys.readouterr().err
    assert main([*words[:-2], "--sensitivity"]) == 2
    assert "--sensitivity needs --calibration" in capsys.readouterr().err


def test_the_source_is_left_alone(digits: tuple[Compilation, Export]) -> None:
    source = _source(MODEL)
    before = source.SerializeToString(deterministic=True)
    qdq_model(source, digits[0])
    assert source.SerializeToString(deterministic=True) == before
    assert Graph.of(digits[0].integer).bindings


@pytest.mark.parametrize("spelled", [False, True])
def test_equalized_channels_reach_float_operators(tmp_path: Path, spelled: bool) -> None:
    """Normalizations and layers that stay float have constants of their own in the export: the file's belong to channels as they were."""
    net = OnnxNet(13 if spelled else 17, seed=6)
    gamma, spread = np.where(np.arange(16) % 5 == 0, 40.0, 1.0), np.exp2(net.rng.integers(-4, 5, 24)) / 4
    wide, narrow = net.rng.standard_normal((16, 24)) / gamma[:, None] * spread, net.rng.standard_normal((24, 16)) / spread[:, None] / 5
    x = net.input("x", 1, 5, 16)
    norm = net.spelled_norm(x, net.const(gamma)) if spelled else net.op("LayerNormalization", x, net.const(gamma))  # without an offset
    up = net.op("Relu", net.op("Add", net.op("MatMul", norm, net.const(wide)), net.const(np.ones(24))))
    down = net.op("Relu", net.op("Add", net.op("MatMul", up, net.const(narrow)), x))
    y = net.op("MatMul", down, net.weight(16, 4))
    path = net.save(tmp_path / "net.onnx", [y])
    samples = samples_of(path, 8)
    for kept in ([], [up, down]):
        compilation = compile_stages(path, "native", samples, preset="fast", enable=["equalize", "shift"], disable=["streams"], keep_float=kept)
        assert {norm, up} <= set(compilation.quantized.measured.equalized.equalization.channels)
        export = qdq_model(_source(path), compilation)
        assert export.weighted == 3 - len(kept)
        for sample in list(samples)[:3]:
            assert sqnr_db(run(export.model, sample)[y], traced(compilation, sample)[1][y]) > 40


def test_equalized_channels_without_constants_of_their_own_are_refused(tmp_path: Path) -> None:
    net = OnnxNet(17, seed=6)
    gamma = np.where(np.arange(16) % 5 == 0, 40.0, 1.0)
    h = net.op("LayerNormalization", net.input("x", 1, 5, 16), net.const(gamma))
    product = net.op("MatMul", h, net.const(net.rng.standard_normal((16, 8)) / gamma[:, None]))
    h = net.op("Sum", product, net.const(np.ones(8)), name="biased")
    path = net.save(tmp_path / "net.onnx", [net.op("Softmax", h)])
    with pytest.raises(ModelError, match="'biased2' has equalized channels, but the source has Sum.*--disable equalize"):
        export_onnx(path, tmp_path / "out.onnx", samples_of(path), preset="fast", enable=["equalize"])
    assert export_onnx(path, tmp_path / "out.onnx", samples_of(path), preset="fast").kept_float["biased2"].startswith("the source has Sum")
