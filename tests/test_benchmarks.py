"""What the benchmark scripts are made of: their inputs, their tables, and a peer on the example network."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.bench import onnxruntime_call
from qcompiler.data import ImageSamples, load_labels, open_samples
from qcompiler.demo import MODEL, demo_data
from qcompiler.errors import DataError
from qcompiler.preprocess import Preprocess
from qcompiler.runtime.session import TensorInfo


@pytest.fixture()
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark script by name."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


def test_networks_are_found_made_or_left_out(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
        "network": "n", "target": "t", "images": 400, "float_top1": 0.9, "int8_top1": 0.895, "agreement": 0.98, "sqnr_db": 20.5,
        "bytes": 4_000_000, "compile_seconds": 12.3, "compile_peak_mb": 500.0, "float_ops": 1, "worst_layers": [], "passed": True,
    }  # fmt: skip
    row = script("accuracy").table([result]).splitlines()[-1].split()
    assert row == ["n", "400", "90.00", "%", "89.50", "%", "98.00", "%", "20.50", "4.00", "MB", "12.3", "500", "1"]


def test_speed_table(script: Any) -> None:
    candidates = {"int8": {"minimum": 1e-3, "median": 2e-3, "rounds": 7, "ratio": 0.25}}
    text = script("speed").table([{"network": "n", "threads": 1, "base": "float", "candidates": candidates}])
    assert text.splitlines()[-1].split() == ["n", "1", "int8", "1.000", "2.000", "0.250", "7"]
    assert "x float" in text


def test_onnxruntime_runs_the_example_in_float_and_quantized_by_itself(script: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    network = script("networks").Network("digits", MODEL, tmp_path, tmp_path)
    calibration, evaluation, labels = demo_data()
    sample = evaluation[0]
    samples = open_samples(calibration[:20], [TensorInfo("image", (1, 1, 16, 16), "float32")])
    expected = onnxruntime_call(str(MODEL), sample, 1)()
    got = onnxruntime_call(str(script("speed").onnxruntime_int8(network, samples, tmp_path)), sample, 1)()
    assert got[0].argmax() == expected[0].argmax() == labels[0]
    assert not np.array_equal(got[0], expected[0])


def test_onnxruntime_errors_are_ours(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "m.onnx").write_text("hello")
    with pytest.raises(DataError, match="--against onnxruntime: it can't load"):
        onnxruntime_call(str(tmp_path / "m.onnx"), {}, 1)


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


def test_preprocess_is_hashable_and_comparable() -> None:
    assert Preprocess(resize=3) == Preprocess(resize=3)
    assert hash(Preprocess(mean=(1.0, 2.0, 3.0)))
