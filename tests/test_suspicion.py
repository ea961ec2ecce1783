"""Warnings about calibration data that can't be typical."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_nets import OnnxNet

import qcompiler
from qcompiler.calibration.suspicion import doubts
from qcompiler.calibration.table import CalibrationTable, Statistics
from qcompiler.cli.demo import MODEL
from qcompiler.cli.main import main


def table(array: np.ndarray) -> CalibrationTable:
    result = CalibrationTable(samples=3, values={"x": Statistics()})
    assert result.values["x"].add(array.astype(np.float32))
    return result


def outputs(change: float) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    steady = rng.standard_normal(50)
    return [{"y": (steady + change * rng.standard_normal(50)).astype(np.float32)} for _ in range(8)]


def test_each_symptom_is_named_and_sound_data_is_not() -> None:
    varied = np.arange(10)
    assert doubts(table(varied), ["x"], outputs(1.0)) == [] == doubts(table(varied), ["x"], outputs(0.01)[:1])
    (constant,) = doubts(table(np.full(10, 0.5)), ["x"], [])
    assert "input 'x' is 0.5 everywhere in all 3 calibration samples" in constant
    (steady,) = doubts(table(varied), ["x"], outputs(0.1))
    assert "output 'y' hardly depends on the calibration sample" in steady and "between 8 of them" in steady
    assert doubts(table(varied), ["x"], [{"y": np.zeros(5, np.float32)}] * 3) == [], "an output that is always zero says nothing"


def test_outputs_that_are_not_finite_are_not_compared() -> None:
    for odd in (np.nan, np.inf):
        assert doubts(table(np.arange(10)), ["x"], [{"y": np.full(5, odd, np.float32)}] * 3) == []


def test_one_sample_says_that_nothing_can_be_judged() -> None:
    one = CalibrationTable(samples=1, values=table(np.arange(10)).values)
    (said,) = doubts(one, ["x"], outputs(1.0)[:1])
    assert said.startswith("1 calibration sample: whether others fit into its ranges can't be judged; give 50 to 500 samples")


def huge(path: Path, factor: float) -> Path:
    """A convolution whose outputs are `factor` times its inputs, or so."""
    net = OnnxNet()
    y = net.op("Mul", net.op("Conv", net.input("x", 1, 4, 8, 8), net.weight(8, 4, 3, 3), pads=[1, 1, 1, 1], kernel_shape=[3, 3]), net.const(factor))
    return net.save(path, [net.op("Relu", y)])


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("preset", ["fast", "default"])
def test_numbers_near_the_end_of_float32_bring_no_warning_of_numpys(tmp_path: Path, preset: str) -> None:
    """Whether the network's outputs are finite or not, in calibration and in comparison; numpy's settings are as before."""
    rng = np.random.default_rng(0)
    data = [{"x": np.float32(3e37) * rng.uniform(-1, 1, (1, 4, 8, 8)).astype(np.float32)} for _ in range(4)]
    before = np.geterr()
    for factor in (1e-3, 10.0):
        model = huge(tmp_path / "huge.onnx", factor)
        report = qcompiler.verify(qcompiler.compile(model, calibration=data, preset=preset), model, data)
        assert len(report.outputs) == 1
    assert np.geterr() == before


def test_an_output_of_nothing_but_nan_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an operator that no statistics are collected of."""
    net = OnnxNet()
    found = net.op("ArgMax", net.op("Conv", net.input("x", 1, 4, 8, 8), net.weight(8, 4, 3, 3), kernel_shape=[3, 3]), axis=1)
    model = net.save(tmp_path / "nan.onnx", [net.op("Sqrt", net.op("Sub", net.op("Cast", found, to=1), net.const(100.0)))])
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((4, 4, 8, 8)).astype(np.float32))
    for preset in ("fast", "default"):
        assert main(["compile", str(model), "--calibration", str(tmp_path / "x.npy"), "--preset", preset, "-o", str(tmp_path / "nan.so")]) == 2
        assert "is nothing but NaN although the inputs are numbers" in capsys.readouterr().err.splitlines()[-1]


def test_fast_compares_outputs_too() -> None:
    noise = [{"image": np.random.default_rng(0).standard_normal((1, 1, 16, 16)).astype(np.float32)}] * 4
    warnings = qcompiler.compile(MODEL, calibration=noise, preset="fast").manifest["warnings"]
    assert any("hardly depends on the calibration sample" in w for w in warnings), warnings


def detector(scores_change: float, boxes_change: float = 0.01) -> list[dict[str, np.ndarray]]:
    """Boxes that lie about where their anchors are, and scores, in one tensor."""
    rng = np.random.default_rng(0)
    anchors, likely = rng.uniform(10, 600, (1, 4, 80)), rng.uniform(0.2, 1, (1, 6, 80))
    steps = [(rng.standard_normal((1, 4, 80)), rng.standard_normal((1, 6, 80))) for _ in range(8)]
    return [{"found": np.concatenate([anchors * (1 + boxes_change * a), likely * (1 + scores_change * b)], 1).astype(np.float32)} for a, b in steps]


def test_boxes_near_their_anchors_are_no_symptom() -> None:
    assert doubts(table(np.arange(10)), ["x"], detector(0.8)) == []
    (steady,) = doubts(table(np.arange(10)), ["x"], detector(0.01))
    assert "output 'found' hardly depends" in steady
    apart = [{"boxes": o["found"][:, :4], "scores": o["found"][:, 4:]} for o in detector(0.8)]
    assert doubts(table(np.arange(10)), ["x"], apart) == []


@pytest.mark.parametrize("layout", ["nchw", "dense"])
def test_pixels_for_a_network_that_wants_normalized_inputs(layout: str, tmp_path: Path) -> None:
    net = OnnxNet()
    biases = net.const(net.rng.standard_normal(16) * 0.5)
    if layout == "nchw":
        x = net.input("x", 1, 3, 16, 16)
        y = net.op("Conv", net.op("Relu", net.op("Conv", x, net.weight(16, 3, 3, 3), biases)), net.weight(4, 16, 3, 3))
    else:
        x = net.input("x", 1, 64)
        y = net.op("MatMul", net.op("Relu", net.op("Add", net.op("MatMul", x, net.weight(64, 16, spread=0.125)), biases)), net.weight(16, 4))
    path = net.save(tmp_path / "m.onnx", [y])
    shape = (1, 3, 16, 16) if layout == "nchw" else (1, 64)
    pixels = [np.random.default_rng(i).integers(0, 256, shape).astype(np.float32) for i in range(4)]

    def warned(data: list[np.ndarray]) -> list[str]:
        warnings = qcompiler.compile(path, calibration=[{"x": d} for d in data], preset="fast").manifest["warnings"]
        return [w for w in warnings if "normalized" in w]

    (said,) = warned(pixels)
    assert said.startswith("input 'x' lies in [0, 255], like pixels from 0 to 255, but the biases of the first layer")
    assert warned([(p - 120) / 60 for p in pixels]) == [] == warned([p / 255 for p in pixels])
    assert warned([p - 128 for p in pixels]) == [], "no pixels"


@pytest.mark.parametrize(("spread", "said"), [(0.29, "like pixels from 0 to 1, and the first layer"), (74.0, "it seems to want much larger numbers")])
def test_inputs_that_are_too_small_for_the_network(spread: float, said: str, tmp_path: Path) -> None:
    """A network trained on (pixels from 0 to 1 - 0.5) / 0.29, and one trained on pixels from 0 to 255: its biases are larger than what it makes of them."""
    net = OnnxNet()
    weight = np.random.default_rng(3).standard_normal((16, 3, 3, 3)).astype(np.float32)
    size = np.sqrt(np.square(weight).sum(axis=(1, 2, 3)))
    biases = 3 * size if spread < 1 else 1.5 * spread * size
    x = net.input("x", 1, 3, 16, 16)
    y = net.op("Conv", net.op("Relu", net.op("Conv", x, net.const(weight), net.const(biases))), net.weight(4, 16, 3, 3))
    path = net.save(tmp_path / "m.onnx", [y])
    pixels = [np.random.default_rng(i).random((1, 3, 16, 16)).astype(np.float32) for i in range(4)]

    def warned(data: list[np.ndarray], preset: str) -> list[str]:
        found = qcompiler.calibrate(path, tmp_path / "t.qcal", [{"x": d.astype(np.float32)} for d in data], preset=preset).warnings
        stored = qcompiler.compile(path, calibration=tmp_path / "t.qcal", preset=preset).manifest.get("warnings", []) if preset == "fast" else found
        assert stored == found
        return [w for w in found if "hardly depends on it" in w]

    for preset in ("fast", "default"):
        (warning,) = warned(pixels, preset)
        assert warning.startswith("input 'x' lies in [") and said in warning
    assert warned([(p - 0.5) / 0.29 if spread < 1 else 255 * p for p in pixels], "fast") == []


def test_one_sample_of_zeros_compiles_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "zeros.npy"
    np.save(data, np.zeros((1, 1, 1, 16, 16), np.float32))
    assert main(["compile", str(MODEL), "--calibration", str(data), "--output", str(tmp_path / "m.so")]) == 0
    assert "warning: input 'image' is 0 everywhere in all 1 calibration samples" in capsys.readouterr().err
