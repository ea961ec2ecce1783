"""The example's training code and the network it left: gradients against finite differences, the export against the trained network."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.cli.demo import MODEL, demo_data


@pytest.fixture(scope="module")
def digits(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("train_digits", root / "examples" / "train_digits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_digits"] = module
    spec.loader.exec_module(module)
    return module


def test_gradients_agree_with_finite_differences(digits: Any) -> None:
    """In float64, where central differences are good to six digits; every kind of layer occurs in the network."""
    rng = np.random.default_rng(0)
    network = digits.build(rng, width=2)
    images, labels = rng.standard_normal((3, 16, 16, 1)), np.array([1, 5, 9])
    for layer in network.parts():
        layer.params = {k: p.astype(np.float64) for k, p in layer.params.items()}

    def loss() -> float:
        return float(digits.loss_gradient(network.forward(images, True), labels)[0])

    network.backward(digits.loss_gradient(network.forward(images, True), labels)[1].astype(np.float64))
    checked = set()
    for layer in network.parts():
        for key, value in layer.params.items():
            index = np.unravel_index(rng.integers(value.size), value.shape)
            found, step, kept = layer.grads[key][index], 1e-6, value[index]
            value[index] = kept + step
            above = loss()
            value[index] = kept - step
            below = loss()
            value[index] = kept
            assert found == pytest.approx((above - below) / (2 * step), rel=1e-3, abs=1e-6), (type(layer).__name__, key)
            checked.add(type(layer).__name__)
    assert checked == {"Conv", "BatchNorm", "Head"}


def test_training_lowers_the_loss(digits: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((64, 16, 16, 1)).astype(np.float32)
    labels = (images.mean((1, 2, 3)) > 0).astype(int)
    images += labels[:, None, None, None] * 2
    digits.train(digits.build(rng, width=6), images, labels, epochs=20, batch=16, rng=rng)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0] / 2


def test_export_computes_what_the_network_computes(digits: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    network = digits.build(rng, width=4)
    images = rng.standard_normal((5, 16, 16, 1)).astype(np.float32)
    for layer in network.parts():
        if hasattr(layer, "mean"):
            layer.mean, layer.var = rng.standard_normal(layer.mean.shape).astype(np.float32), rng.random(layer.var.shape, np.float32) + 0.5
    session = onnxruntime.InferenceSession(digits.export(network).SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"image": images.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(got, network.forward(images, False), rtol=1e-4, atol=1e-4)


def test_committed_network_reads_digits_it_was_not_trained_on() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    calibration, evaluation, labels = demo_data()
    session = onnxruntime.InferenceSession(str(MODEL), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": np.concatenate([s["image"] for s in evaluation])})
    assert (logits.argmax(1) == labels).mean() >= 0.97
    assert (len(calibration), len(evaluation)) == (100, 500)
    seen = {s["image"].tobytes() for s in calibration}
    assert not any(s["image"].tobytes() in seen for s in evaluation)


def test_committed_network_has_what_it_is_an_example_of() -> None:
    import onnx

    nodes = onnx.load(str(Path(MODEL))).graph.node
    kinds = [n.op_type for n in nodes]
    assert {"Conv", "BatchNormalization", "Relu", "Clip", "Add", "GlobalAveragePool", "Flatten", "Gemm"} == set(kinds)
    groups = [a.i for n in nodes for a in n.attribute if a.name == "group"]
    assert sum(g > 1 for g in groups) == 1
    assert kinds.count("Add") == 3
