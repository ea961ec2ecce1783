"""What the benchmark scripts are made of: their inputs, their tables, and a peer on the example network."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tools import require_module

import qcompiler
from qcompiler import schedules
from qcompiler.backend.artifact import RUNTIME
from qcompiler.backend.toolchain import find_compiler
from qcompiler.backend.tuning_log import SHIPPED, read_log
from qcompiler.base.errors import DataError
from qcompiler.base.targets import find_target
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration.data import ImageSamples, load_labels, open_samples
from qcompiler.calibration.preprocess import Preprocess
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.numerics.operators import OPERATORS
from qcompiler.pipeline.library import Compilation
from qcompiler.runtime import peers
from qcompiler.runtime.peers import onnxruntime_call
from qcompiler.runtime.session import Session
from qcompiler.schedules.harness import fetch, run_kernel
from qcompiler.schedules.table import Layout


@pytest.fixture()
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark script by name."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


def test_networks_are_found_made_or_left_out(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    networks = script("networks")
    data, cache = tmp_path / "data", tmp_path / "cache"
    (data / "models").mkdir(parents=True)
    (data / "models" / "mobilenet_v2.onnx").write_text("model")
    found = networks.find("mobilenet_v2", data, cache)
    assert found.model == data / "models" / "mobilenet_v2.onnx"
    assert found.preprocess.is_file()
    (data / "make_resnet50.py").write_text("import sys; open(sys.argv[1], 'w').write('made')")
    monkeypatch.setattr(networks.shutil, "which", lambda name: None)
    assert networks.find("resnet50", data, cache) is None
    assert "resnet50: no " in capsys.readouterr().err
    monkeypatch.setattr(networks.shutil, "which", lambda name: "/usr/bin/npm")
    assert networks.find("resnet50", data, cache).model.read_text() == "made"
    assert [p.name for p in cache.iterdir()] == ["resnet50.onnx"]


def test_accuracy_table(script: Any) -> None:
    result = {
        "network": "n", "method": "default", "target": "t", "images": 400, "float_top1": 0.9, "int8_top1": 0.895, "agreement": 0.98, "sqnr_db": 20.5,
        "bytes": 4_000_000, "compile_seconds": 12.3, "compile_peak_mb": 500.0, "float_ops": 1, "worst_layers": [], "passed": True,
    }  # fmt: skip
    row = script("accuracy").table([result]).splitlines()[-1].split()
    assert row == ["n", "default", "400", "90.00", "%", "89.50", "%", "98.00", "%", "20.50", "4.00", "MB", "12.3", "500", "1"]


@pytest.mark.parametrize("method", ["ORT MinMax", "NNCF"])
def test_rivals_are_measured_on_the_same_images(method: str, script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With NNCF both forms of its bias correction, which must find the biases."""
    for module in ("onnxruntime", "PIL", *(["nncf", "openvino"] if method == "NNCF" else [])):
        require_module(module, peer=module in ("nncf", "openvino"))
    from PIL import Image

    rng, names = np.random.default_rng(0), [f"{i}.png" for i in range(6)]
    for folder in ("calibration", "evaluation"):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / folder / name)
    (tmp_path / "evaluation.tsv").write_text("file\tclass_index\n" + "".join(f"{n}\t{i}\n" for i, n in enumerate(names)))
    (tmp_path / "preprocess.yaml").write_text("resize: 8\ncrop: 8\ncolor: RGB\nscale: 1/255\nlayout: NCHW\n")
    onnx.save(chain(), tmp_path / "chain.onnx")
    network = script("networks").Network("chain", tmp_path / "chain.onnx", tmp_path / "preprocess.yaml", tmp_path)
    accuracy = script("accuracy")
    rows = [accuracy.measure_rival(network, m, None) for m in accuracy.RIVALS if m.startswith(method)]
    assert capsys.readouterr().out == ""
    assert all(row["images"] == 6 and 10 < row["sqnr_db"] < 60 and 0 <= row["agreement"] <= 1 for row in rows), rows
    assert len({row["sqnr_db"] for row in rows}) == len(rows)
    assert len(accuracy.table(rows).splitlines()) == 2 + len(rows)


def test_the_largest_efficientnet_lite_has_the_published_size(script: Any) -> None:
    """13.0 million parameters, and 300 pixels a side become 10."""
    model = onnx.shape_inference.infer_shapes(script("generated").efficientnet_lite())
    assert 12.9e6 < sum(math.prod(i.dims) for i in model.graph.initializer) < 13.1e6
    [last] = [v for v in model.graph.value_info if v.name == next(n.input[0] for n in model.graph.node if n.op_type == "GlobalAveragePool")]
    assert [d.dim_value for d in last.type.tensor_type.shape.dim] == [0, 1280, 10, 10]


def test_light_graphs_get_weights_that_keep_activations_alive(script: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    networks = script("networks")
    network = networks.find("squeezenet", tmp_path, tmp_path / "cache")
    assert network.name in networks.GENERATED and network.preprocess is None
    model = onnx.load(str(network.model))
    assert [o.version for o in model.opset_import] == [17]
    assert "ConstantOfShape" not in {n.op_type for n in model.graph.node}
    assert [i.name for i in model.graph.input] == ["data_0"]
    samples = network.calibration()
    assert len(samples) == networks.RANDOM_IMAGES and samples[0]["data_0"].shape == (1, 3, 224, 224)
    convolutions = [n.output[0] for n in model.graph.node if n.op_type == "Conv"]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in convolutions)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for value in session.run(convolutions, samples[0]):
        assert 0.1 < value.std() < 20
    again = networks.find("squeezenet", tmp_path, tmp_path / "cache")
    assert onnx.load(str(again.model)).SerializeToString() == onnx.load(str(network.model)).SerializeToString()


def test_densenet_has_every_kind_of_weight(script: Any) -> None:
    generated = script("generated")
    light = onnx.load(str(generated.light_path("densenet121")))
    model = generated.with_random_weights(light)
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    first = {n.op_type: n for n in reversed(model.graph.node)}
    variance = weights[first["BatchNormalization"].input[4]]
    assert variance.min() > 0.5
    kernel = weights[first["Conv"].input[1]]
    assert kernel.shape == (64, 3, 7, 7) and abs(kernel.std() / np.sqrt(2 / 147) - 1) < 0.05
    assert len([n for n in model.graph.node if n.op_type == "Conv"]) == 121


def chain() -> onnx.ModelProto:
    """conv -> clip -> depthwise -> residual -> mean -> gemm."""
    rng = np.random.default_rng(0)
    weights = {"w": (16, 3, 3, 3), "b": (16,), "d": (16, 1, 3, 3), "p": (16, 16, 1, 1), "g": (10, 16), "c": (10,)}
    make = onnx.helper.make_node
    nodes = [
        make("Conv", ["x", "w", "b"], ["1"], pads=[1, 1, 1, 1]),
        make("Relu", ["1"], ["2"]),
        make("Conv", ["2", "d"], ["3"], pads=[1, 1, 1, 1], group=16),
        make("Conv", ["3", "p"], ["4"]),
        make("Add", ["4", "2"], ["5"]),
        make("ReduceMean", ["5"], ["6"], axes=[2, 3], keepdims=0),
        make("Gemm", ["6", "g", "c"], ["y"], transB=1),
    ]
    value = onnx.helper.make_tensor_value_info
    tensors = [onnx.numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", [value("x", 1, [1, 3, 8, 8])], [value("y", 1, [1, 10])], tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def test_channels_are_shifted_everywhere_but_at_the_ends(script: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    generated, model = script("generated"), chain()
    shifted = generated.with_shifted_channels(model)
    shapes = {i.name: tuple(i.dims) for i in shifted.graph.initializer}
    assert shapes == {"w": (24, 3, 3, 3), "b": (24,), "d": (24, 1, 3, 3), "p": (24, 24, 1, 1), "g": (10, 24), "c": (10,)}
    session = onnxruntime.InferenceSession(shifted.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones((1, 3, 8, 8), np.float32)})[0].shape == (1, 10)
    model.graph.node[4].op_type = "Concat"
    with pytest.raises(ValueError, match="channels of Concat can't be shifted"):
        generated.with_shifted_channels(model)


def test_shifted_network_is_not_in_the_shipped_log(script: Any, real_data: Path, tmp_path: Path) -> None:
    """What it measures is a compilation for shapes that nobody tuned."""
    network = script("networks").find("mobilenet_v2_shifted", real_data, tmp_path)
    weights = [list(i.dims) for i in onnx.load(str(network.model)).graph.initializer if len(i.dims) == 4]
    assert len(weights) == 52
    shipped = [w["operands"] for r in read_log(SHIPPED) if (w := r.workload)["op"] == "qc.conv2d"]
    tuned = {tuple(shape) for operands in shipped for shape, dtype, *_ in operands if dtype == "int8" and len(shape) == 4}
    assert tuned, "the workloads' form has changed"
    assert not {(o, h, w, i) for o, i, h, w in map(tuple, weights)} & tuned


def speed_result(network: str, threads: int, ours: float) -> dict[str, Any]:
    rows = {"int8": {"minimum": ours, "median": 2e-3, "rounds": 7, "ratio": ours / 2e-3, "of_peak": 0.5}}
    rows["openvino int8"] = {"minimum": 2e-3, "median": 3e-3, "rounds": 7, "ratio": 1.0, "of_peak": 0.25}
    return {"network": network, "target": "t", "threads": threads, "base": "openvino int8", "macs": 10, "peak": 80e9, "candidates": rows}


def test_speed_tables(script: Any) -> None:
    speed = script("speed")
    results = [speed_result("a", 1, 1e-3), speed_result("a", 2, 0.8e-3), speed_result("b", 1, 4e-3)]
    text = speed.table(results).splitlines()
    assert "int8 peak: 80 GMAC/s on 1 thread, 80 GMAC/s on 2 threads" in text[0]
    assert text[2].split() == ["a", "1", "int8", "1.000", "2.000", "0.500", "50", "%", "7"]
    assert text[4].split() == ["a", "2", "int8", "0.800", "2.000", "0.400", "50", "%", "1.25", "7"]
    means = {(m["threads"], m["candidate"]): (m["networks"], round(m["ratio"], 6)) for m in speed.mean_ratios(results)}
    assert means == {(1, "int8"): (2, 1.0), (2, "int8"): (1, 0.4), (1, "openvino int8"): (2, 1.0), (2, "openvino int8"): (1, 1.0)}


def test_layer_table_has_the_greatest_loss_first(script: Any) -> None:
    steps = [
        {"id": "near", "op": "qc.conv2d", "kernel": "k", "seconds": 100e-6, "macs": 7_000_000},
        {"id": "far", "op": "qc.conv2d", "kernel": "k", "seconds": 60e-6, "macs": 1_000_000},
        {"id": "copy", "op": "qc.copy", "kernel": "c", "seconds": 20e-6, "macs": 0},
    ]
    title, text = script("speed").layer_table({"network": "n", "peak": 80e9, "steps": steps}, 2).split("\nvalue")
    text = text.splitlines()
    assert " ".join(title.split()).startswith("n, 1 thread, 0.180 ms, 56 % of peak")
    assert text[1].split() == ["far", "qc.conv2d", "k", "60.0", "33.3", "%", "16.7", "21", "%"]
    assert text[2].split()[0] == "copy" and len(text) == 3


def small_tflite(path: Path, scale: float | None = None) -> Path:
    """A convolution of [1, 8, 8, 4], in float32, or in int8 of one scale."""
    pytest.importorskip("ai_edge_litert")
    tflite_nets = importlib.import_module("tflite_nets")
    parameters, rng = None if scale is None else (scale, 0), np.random.default_rng(0)
    net = tflite_nets.TfliteNet(parameters)
    x = net.input((1, 8, 8, 4), "float32" if scale is None else "int8", parameters)
    weight = rng.standard_normal((8, 3, 3, 4)).astype(np.float32)
    constants = [weight, np.zeros(8, np.float32)] if scale is None else [np.clip(weight * 50, -127, 127).astype(np.int8), np.zeros(8, np.int32)]
    w, b = (net.const(c, q if scale is not None else None) for c, q in zip(constants, ((0.02, 0), (0.02 * (scale or 1), 0)), strict=True))
    return Path(net.save(path, [net.op("CONV_2D", [x, w, b], (1, 8, 8, 8), kind="Conv2DOptions", strideW=1, strideH=1)]))


def test_litert_quantizes_by_its_own_quantizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A float file without a signature; the quantized network computes nearly the same, and nothing is printed. A quantized file is measured as it is."""
    rng = np.random.default_rng(1)
    samples = [{"x": rng.standard_normal((1, 4, 8, 8)).astype(np.float32)} for _ in range(4)]
    quantized = small_tflite(tmp_path / "int8.tflite", 0.05)
    assert list(peers.peer_calls("litert", quantized, samples[0], 1, samples, tmp_path, quantized)) == ["litert int8.tflite"]
    require_module("ai_edge_quantizer", "ai-edge-quantizer", peer=True)
    model = small_tflite(tmp_path / "float.tflite")
    calls = peers.peer_calls("litert", model, samples[0], 1, samples, tmp_path, model)
    assert list(calls) == ["litert float.tflite", "litert int8"] and not any(capsys.readouterr())
    (exact,), (rounded,) = (call() for call in calls.values())  # type: ignore[misc]
    assert exact.dtype == np.float32 and rounded.dtype == np.int8 and not peers.litert_is_float(tmp_path / "litert_int8.tflite")
    assert np.corrcoef(exact.ravel(), rounded.ravel().astype(np.float32))[0, 1] > 0.999
    assert list(peers.peer_calls("litert", model, samples[0], 1, [], tmp_path, model)) == ["litert float.tflite"]


def test_without_its_quantizer_litert_is_refused_in_int8_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = small_tflite(tmp_path / "float.tflite"), {"x": np.zeros((1, 8, 8, 4), np.float32)}
    monkeypatch.setattr(peers, "installed", lambda module: module != "ai_edge_quantizer")
    assert list(peers.peer_calls("litert", model, sample, 1, [], tmp_path, model)) == ["litert float.tflite"]
    with pytest.raises(DataError, match=r"--against litert: ai_edge_quantizer is not installed; pip install 'qcompiler\[peers\]'"):
        peers.peer_calls("litert", model, sample, 1, [sample], tmp_path, model)


def test_litert_input_is_converted_for_the_twin() -> None:
    x = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    detail = {"shape": np.array([1, 2, 2, 3]), "dtype": np.int8, "quantization": (0.5, -3)}
    np.testing.assert_array_equal(peers.litert_input(x, detail, "m")[0, 0], [[-3, 5, 13], [-1, 7, 15]])
    assert peers.litert_input(x, detail | {"dtype": np.float32}, "m").shape == (1, 2, 2, 3)
    with pytest.raises(DataError, match="wants an input"):
        peers.litert_input(x, detail | {"shape": np.array([1, 4, 3])}, "m")


def test_timed_operators_are_what_numerics_computes(script: Any) -> None:
    """Every family of the table has a case, and the cases' operators are valid: kernels equal the oracle on the small ones."""
    kernels, cases = script("kernels"), script("timed_operators")
    target = find_target("native")
    schedules.load(target)
    found = cases.others(target.storage)
    layers = [c for storage in (target.storage, "float32") for c in cases.convolutions("mobilenet_v2", storage)]
    assert sorted({c.op.name for c in [*found, *layers]} | set(cases.UNTIMED)) == sorted(OPERATORS)
    assert not {c.op.name for c in [*found, *layers]} & set(cases.UNTIMED)
    for case in found:
        if case.op.name in ("qc.dense", "qc.matmul", "qc.conv2d_transpose"):
            continue  # seconds in numpy; their kernels have tests of their own
        item = kernels.ready(case, target)
        kernel = item.row.build(item.op, item.row.default(item.op, target), target)
        stored = iter(case.inputs)
        arrays = [next(stored) if isinstance(o, Layout) else o for o in case.op.operands]
        result = fetch(run_kernel(kernel, item.inputs, item.op.output, target), item.op.output)
        np.testing.assert_array_equal(result, OPERATORS[case.op.name](*arrays, **case.op.attrs))


def test_kernel_table_against_the_roofline(script: Any) -> None:
    kernels, cases = script("kernels"), script("timed_operators")
    target = find_target("native")
    schedules.load(target)
    item = kernels.ready(cases.depthwise(target.storage)[9], target)
    measured = {"seconds": 2e-6, "macs": 40_000, "peak": 40e9, "roof": 1.5e-6, "bound": "writing", "params": {"rows": 2}}
    text = kernels.table("title", [(item, measured, 1.25)]).splitlines()
    assert text[2].split()[-9:] == ["2.0", "20.0", "50", "%", "75", "%", "writing", "1.25", "rows=2"]
    assert text[3].split()[-6:] == ["6.0", "20.0", "50", "%", "75", "%"]  # three of them in the network


def test_first_inference_table(script: Any) -> None:
    phases = {"import": [1.0, 2.0], "load + run": [0.5, 0.7]}
    text = script("first_inference").table("n", {"ours": phases, "peer": phases | {"load + run": [1.0, 3.0]}})
    assert text.splitlines()[-1].split() == ["peer", "1000.000", "/", "1500.000", "1000.000", "/", "2000.000", "2.00"]


def test_first_inference_of_the_example(script: Any, tmp_path: Path) -> None:
    calibration, _, _ = demo_data()
    network = script("networks").Network("digits", MODEL, None, None)
    first = script("first_inference")
    library = qcompiler.compile(network.model, calibration=calibration[:8], preset="fast").save(tmp_path / "digits.so")
    np.savez(tmp_path / "inputs.npz", **calibration[0])
    times = first.once(["ours", str(library), str(tmp_path / "inputs.npz"), "1", ""])
    assert set(times) == {"import", "load", "run", "load + run", "whole process"} and all(t > 0 for t in times.values())


def test_compile_time_of_the_example(script: Any, tmp_path: Path) -> None:
    """A process compiles, a second one finds its kernels, and a table has a row for each state that was measured."""
    calibration, _, _ = demo_data()
    compile_time = script("compile_time")

    class Digits(compile_time.networks.Network):  # type: ignore[misc]
        def calibration(self) -> Any:
            return calibration[:4]

    timed = compile_time.Timed(Digits("digits", MODEL, None, None), 4, tmp_path)
    cold = timed.once("compile", "fast", cold=True)
    kept = sorted(p.name for p in (tmp_path / "kernels").iterdir())
    timed.once("calibrate", "fast")
    table = timed.once("table", "fast")
    assert kept and all(v > 0 for v in [*cold.values(), *table.values()]) and sorted(p.name for p in (tmp_path / "kernels").iterdir()) == kept
    rows = compile_time.lines("digits", "fast", {"table": {"wall": 2.0, "cpu": 3.0, "peak": 1.0}, "nncf": {"wall": 4.0, "cpu": 4.0, "peak": 1.0}})
    assert [row.split()[-2:] for row in rows] == [["0.50", "0.75"]]


def test_pool_overhead_is_measured(script: Any, tmp_path: Path) -> None:
    times = script("call_overhead").pool(2, 5, tmp_path)
    assert times["wake"] > 0 and times["launch"] > 0


def test_onnxruntime_runs_the_example_in_float_and_quantized_by_itself(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    calibration, evaluation, labels = demo_data()
    sample = evaluation[0]
    samples = open_samples(calibration[:20], [TensorInfo("image", (1, 1, 16, 16), "float32")])
    expected = onnxruntime_call(str(MODEL), sample, 1)()
    got = onnxruntime_call(str(peers.onnxruntime_int8(MODEL, samples, tmp_path)), sample, 1)()
    assert got[0].argmax() == expected[0].argmax() == labels[0]
    assert not np.array_equal(got[0], expected[0])


def test_onnxruntime_errors_are_ours(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "m.onnx").write_text("hello")
    with pytest.raises(DataError, match="--against onnxruntime: it can't take"):
        peers.peer_calls("onnxruntime", tmp_path / "m.onnx", {}, 1, [], tmp_path)


def test_float_reference_is_as_good_as_published(script: Any, real_data: Path, root: Path) -> None:
    """The preprocessing files fit the networks: a wrong colour order, scale or interpolation would cost several points."""
    onnxruntime = pytest.importorskip("onnxruntime")
    for name, floor in (("mobilenet_v2", 0.75), ("efficientnet_lite0", 0.8)):
        network = script("networks").find(name, real_data, root)
        samples = open_samples(network.images / "evaluation", [TensorInfo("input", (1, 3, 224, 224), "float32")], network.preprocess)
        assert isinstance(samples, ImageSamples)
        chosen = samples.spread(40)
        labels = load_labels(network.images / "evaluation.tsv", chosen)
        session = onnxruntime.InferenceSession(str(network.model), providers=["CPUExecutionProvider"])
        top = np.array([session.run(None, sample)[0].argmax() for sample in chosen])
        assert (top == labels).mean() >= floor, name


def test_the_integer_network_runs_in_litert(script: Any, digits_compilation: Compilation, tmp_path: Path) -> None:
    """The twin that instructions are compared with is the same network: its answers differ by the roundings of its format only."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    evaluation = demo_data()[1]
    session = Session(digits_compilation.artifact.save(tmp_path / "digits.so"))
    ours = np.concatenate([session.run(sample)["logits"] for sample in evaluation[:30]])
    twin = script("tflite_model").tflite_model(digits_compilation.integer, float(np.abs(ours).max()) / 127)
    litert = interpreter.Interpreter(model_content=twin, num_threads=1)
    litert.allocate_tensors()
    (x,), (y,) = litert.get_input_details(), litert.get_output_details()
    theirs = []
    for sample in evaluation[:30]:
        litert.set_tensor(x["index"], np.ascontiguousarray(sample["image"].transpose(0, 2, 3, 1)))
        litert.invoke()
        theirs.append(litert.get_tensor(y["index"]))
    assert sqnr_db(np.concatenate(theirs), ours) > 25


def test_programs_that_count_instructions(tmp_path: Path, root: Path) -> None:
    """They build without a warning, and the one for our libraries runs every step between two markers, here without an emulator to count."""
    sources, native = root / "benchmarks" / "instructions", find_target("native")
    library = qcompiler.compile(MODEL, target=native.name, calibration=demo_data()[0][:4], preset="fast").save(tmp_path / "digits.so")
    for name, options in (("plugin", ["-shared", "-fPIC"]), ("litert", []), ("library", [])):
        command = [find_compiler(native), "-x", "c", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{RUNTIME / 'include'}", *options]
        subprocess.run([*command, str(sources / f"{name}.c"), "-o", str(tmp_path / name), "-ldl"], check=True)
    done = subprocess.run([str(tmp_path / "library"), str(library)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert subprocess.run([str(tmp_path / "library"), str(tmp_path / "plugin")], capture_output=True).returncode == 2


def test_preprocess_is_hashable_and_comparable() -> None:
    assert Preprocess(resize=3) == Preprocess(resize=3)
    assert hash(Preprocess(mean=(1.0, 2.0, 3.0)))


def test_the_inner_loop_of_assembly(script: Any) -> None:
    """Only a block that jumps to its own label is a loop, and the one that multiplies most is the inner one."""
    script("mca")
    x86, arm = script("x86_mca"), script("arm_mca")
    text = """
.LBB0_1:  # outer
\tvpdpbusd\t(%rsi), %zmm1, %zmm2
\tjmp\t.LBB0_2
.LBB0_2:
\t.loc 1 2 3
\t{vex} vpdpbusd\t%ymm1, %ymm2, %ymm3
\tvpmaddubsw\t%zmm1, %zmm2, %zmm3  # comment
\tjne\t.LBB0_2
.LBB0_3:
\tvpdpbusd\t%zmm1, %zmm2, %zmm3
\tjne\t.LBB0_1
\tretq
"""
    loop = script("mca").loops(text, r"j\w+", r"(jmp|ret\w*)\b", "#")
    assert [len(block) for block in loop] == [3] and x86.macs_of(loop[0]) == 32 + 64
    text = ".L1:\n\tsdot v0.4s, v1.16b, v2.4b[0] // comment\n\tbic v0.8h, #1\n\tb.ne .L1\n.L2:\n\tsmmla v0.4s, v1.16b, v2.16b\n\tb .L1\n"
    assert arm.inner_loop(text) == ["sdot v0.4s, v1.16b, v2.4b[0]", "bic v0.8h, #1", "b.ne .L1"] and arm.macs_of(arm.inner_loop(text)) == 16


HELP = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(f"{script} ends with {end.code}")
"""


def test_every_script_explains_itself(root: Path) -> None:
    """All in one process, which imports what they have in common once."""
    scripts = [p for p in sorted((root / "benchmarks").glob("*.py")) if "__main__" in p.read_text()]
    assert len(scripts) >= 8
    environment = os.environ | {"PYTHONPATH": str(root / "benchmarks")}
    done = subprocess.run([sys.executable, "-c", HELP, *scripts], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if " ends with " in line] == [f"{p} ends with 0" for p in scripts]
    assert done.stdout.count("usage: ") >= len(scripts)


def test_zoo(script: Any, tmp_path: Path) -> None:
    """A network goes through a process of its own, and what is refused is said with its reason; inputs are the same every time."""
    import argparse
    import hashlib
    import zipfile

    zoo = script("zoo")
    port = TensorInfo("x", (1, 3, 8, 8), "float32")
    first, again = (next(zoo.samples("image -1 1", [port], 5, 1))["x"] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.float32 and -1 <= first.min() < first.max() <= 1
    assert (next(zoo.samples({"x": "equal 3"}, [port], 0, 1))["x"] == 3).all()
    state = TensorInfo("h", (1, 2), "float32")
    net = argparse.Namespace(inputs=[TensorInfo("f", (1, 2, 5), "int8"), state], state={"h": "next"}, initial={"h": 3})
    fed, _ = zoo.made_for(net, "spectrum 127", 8)
    whole = next(zoo.samples("spectrum 127", [TensorInfo("f", (1, 2 * zoo.FRAMES, 5), "int8")], 0, 1))["f"]
    np.testing.assert_array_equal(np.concatenate([frame["f"] for frame in fed], 1), whole, "frames are one stream")
    kept = zoo.computed(net, lambda frame: {"next": frame["h"] + frame["f"][:, :, 0]}, fed)
    np.testing.assert_array_equal(kept[-1]["next"], 3 + sum(frame["f"][:, :, 0].astype(np.float32) for frame in fed), "states go on")
    assert zoo.steps_apart([{"a": np.int8([[-128, 1]])}], [{"a": np.int8([[127, 1]])}]) == {"a": 255}
    node = onnx.helper.make_node("NonZero", ["x"], ["y"])
    ports = [onnx.helper.make_tensor_value_info(n, t, s) for n, t, s in (("x", 1, [1, 3, 8, 8]), ("y", 7, [4, "n"]))]
    data = onnx.helper.make_model(onnx.helper.make_graph([node], "g", ports[:1], ports[1:])).SerializeToString()
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "some_nets-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("nets/a.onnx", data)
    files = [{"file": f} for f in ("a/x.onnx", "b/x.onnx", "a/y.onnx")]
    assert [key for key, *_ in zoo.listed([{"package": "p==1", "models": files}])] == ["p==1 a/x.onnx", "p==1 b/x.onnx", "p==1 y.onnx"]
    entry = {"file": "nets/a.onnx", "sha256": hashlib.sha256(data).hexdigest(), "kind": "test", "made": "image"}
    options = argparse.Namespace(cache=tmp_path, seconds=120.0, gigabytes=16.0, preset="fast", evaluation=2)
    found = zoo.in_child("some-nets==1.0", entry, options)
    assert found["status"] == "refused" and "NonZero" in found["reason"] and "refused" in zoo.rows({"a": {"kind": "test", **found}})
    zoo.written(tmp_path / "some.json", {"status": "compiled", "sqnr_db": 31.0})
    assert zoo.left(tmp_path / "some.json")["sqnr_db"] == 31.0 and zoo.left(tmp_path / "none.json") == {}, "what an ended process had measured"
    with pytest.raises(SystemExit, match="its SHA-256 is"):
        zoo.fetched("some-nets==1.0", "nets/a.onnx", "0" * 64, tmp_path)
