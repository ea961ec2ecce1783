"""Networks that 8 bits would break: layers that `default` takes in float by itself, and what compilation says where the outputs stay poor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_nets import OnnxNet

import qcompiler
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.passes import sequence
from qcompiler.pipeline import float_layers
from qcompiler.pipeline.compile import compile_stages, quantize
from qcompiler.pipeline.float_layers import ENOUGH
from qcompiler.pipeline.goal import decibel
from qcompiler.pipeline.stages import QuantizedNetwork
from qcompiler.pipeline.survey import Survey
from qcompiler.verification.interpreter import run


def spectral(folder: Path) -> Path:
    """Convolution, square, sum of neighbours, logarithm, convolutions: as a network that computes its own spectrogram."""
    net = OnnxNet(seed=1)
    x = net.input("x", 1, 1, 8, 64)
    wave = net.op("Conv", x, net.weight(16, 1, 1, 9), pads=[0, 4, 0, 4])
    power = net.op("Mul", wave, wave)
    band = net.op("Relu", net.op("Conv", power, net.const(abs(net.rng.standard_normal((16, 16, 1, 1))) / 16)))
    loud = net.op("Log", net.op("Add", band, net.const(1e-3)))
    y = net.op("Conv", net.op("Relu", net.op("Conv", loud, net.weight(16, 16, 3, 3), pads=[1] * 4)), net.weight(4, 16, 3, 3), pads=[1] * 4)
    return net.save(folder / "spectral.onnx", [y])


def wide(folder: Path) -> Path:
    """Every operator on the way is as wide as the network, so no layer is cheap; values span five decades."""
    net = OnnxNet(seed=2)
    x = net.input("x", 1, 1, 8, 64)
    y = net.op("Conv", x, net.const(net.rng.standard_normal((8, 1, 3, 3)) * np.logspace(-3, 2, 8).reshape(-1, 1, 1, 1)), pads=[1] * 4)
    for _ in range(2):
        y = net.op("Mul", net.op("Abs", y), net.const(np.logspace(1, -1, 8).reshape(1, -1, 1, 1)))
        y = net.op("Sqrt", net.op("Add", net.op("Mul", y, y), net.const(1e-6)))
    return net.save(folder / "wide.onnx", [net.op("Log", y)])


def sounds(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Tones whose loudness differs by four decades within a sample."""
    rng = np.random.default_rng(seed)
    envelope = np.logspace(-2, 2, 64)
    return [{"x": (rng.standard_normal((1, 1, 8, 64)) * envelope * rng.uniform(0.5, 2)).astype(np.float32)} for _ in range(count)]


def estimated(network: QuantizedNetwork) -> float:
    return decibel(float(Survey(network, network.integer).noise(network.measured.twin.session(), network.job.samples).max()))


def exact(network: QuantizedNetwork) -> float:
    """dB over all samples, of the integer network by the definition of its arithmetic."""
    module = sequence.run(sequence.FLOAT, network.model.module)
    pairs = [(next(iter(run(network.integer, s).values())), next(iter(run(module, s).values()))) for s in network.job.samples]
    return sqnr_db(*(np.stack(side) for side in zip(*pairs, strict=True)))


@pytest.mark.parametrize("make", [spectral, wide])
def test_an_estimate_is_near_the_integer_network(make: Any, tmp_path: Path) -> None:
    """Its biases, tables and multipliers are not in the estimate; they are small beside noise of this size."""
    network = quantize(make(tmp_path), "native", sounds(6), preset="fast")
    assert abs(estimated(network) - exact(network)) < 3
    assert estimated(network) < ENOUGH


def test_default_rescues_a_spectrogram_and_says_so(tmp_path: Path) -> None:
    path = spectral(tmp_path)
    before = quantize(path, "native", sounds(8), disable=["rescue"])
    after = compile_stages(path, "native", sounds(8))
    network, manifest = after.quantized, after.artifact.manifest
    assert estimated(before) < ENOUGH - 5 and estimated(network) >= ENOUGH and exact(network) > exact(before) + 5
    kept = [f for f in manifest["float_ops"] if "(step rescue)" in f["reason"]]
    assert kept and all("more work" in f["reason"] for f in kept)
    said = manifest["quantization"]["rescue"]
    assert f"{len(kept)} layer" in said and f"-> {decibel(10 ** (-estimated(network) / 10)):.2f} dB, estimated" in said
    assert float(said.split(" for ")[1].split(" %")[0]) <= 20
    assert not [w for w in manifest["warnings"] if "lose much" in w]
    again = compile_stages(path, "native", sounds(8))
    assert again.artifact.library == after.artifact.library, "the same layers every time"


@pytest.mark.parametrize("preset", ["fast", "default", "accurate"])
def test_no_preset_is_silent_about_a_poor_library(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for allowance in ("_ALLOWANCE", "_UTMOST"):
        monkeypatch.setattr(float_layers, allowance, 0.0)  # nothing can be bought
    np.save(tmp_path / "data.npy", np.stack([s["x"] for s in sounds(4)]))
    out = tmp_path / "m.so"
    words = ["compile", str(spectral(tmp_path)), "--calibration", str(tmp_path / "data.npy"), "--output", str(out), "--preset", preset]
    assert main(words) == 0
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "lose much" in x]
    assert line.startswith("warning: the outputs lose much in 8 bits: about ") and "--min-sqnr 20" in line
    assert ("--preset accurate" in line) == (preset != "accurate")
    from qcompiler.runtime.library import read_manifest

    manifest = read_manifest(out)
    (said,) = [w for w in manifest["warnings"] if "lose much" in w]
    worst = said.split("comes from value '")[1].split("'")[0]
    assert worst in {name.split("~")[0] for name in manifest["values"]}, "a value that is stored in 8 bits is named first"


def test_sound_networks_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer is measured, and constants and code are those without the step."""
    few = [s for s, _ in zip(demo_data()[0], range(6), strict=False)]
    without = qcompiler.compile(MODEL, calibration=few, disable=["rescue"])
    monkeypatch.setattr(Survey, "sensitivity", lambda *a, **k: pytest.fail("layers were measured"))
    with_ = qcompiler.compile(MODEL, calibration=few)
    assert with_.manifest["digests"] == without.manifest["digests"] and with_.manifest["warnings"] == []
    assert "rescue" not in with_.manifest["quantization"]


def test_outputs_that_are_always_zero_are_no_loss(tmp_path: Path) -> None:
    net = OnnxNet()
    x = net.input("x", 1, 3, 8, 8)
    y = net.op("Relu", net.op("Conv", x, net.const(np.ones((2, 3, 1, 1))), net.const([-1e3, -1e3])))
    data = [{"x": np.random.default_rng(i).uniform(0, 1, (1, 3, 8, 8)).astype(np.float32)} for i in range(3)]
    assert not [w for w in compile_stages(net.save(tmp_path / "z.onnx", [y]), "native", data).artifact.manifest["warnings"] if "lose much" in w]
