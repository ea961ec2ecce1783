"""Figures that can't be made to look good: values that only mask others, and outputs that hold several quantities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_nets import OnnxNet

import qcompiler
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration.histogram import Histogram
from qcompiler.calibration.observers import sqnr_db as estimated
from qcompiler.numerics.metrics import Accumulator, Parts, masked, sqnr_db
from qcompiler.numerics.spec import QParams
from qcompiler.refine.trial import EXACT, score
from qcompiler.verification.parity import Thresholds, compare, parity_text

RNG = np.random.default_rng(4)


def scores(mask: float) -> np.ndarray:
    """Attention scores of 8 tokens, the last three of them masked as exporters do it."""
    x = RNG.normal(0, 3, (1, 4, 8, 8)).astype(np.float32)
    x[..., 5:] += np.float32(mask)
    return x


@pytest.mark.parametrize("mask", [-1e4, -1e9, -3.4028235e38])
def test_masked_values_do_not_count(mask: float) -> None:
    x = scores(mask)
    found = masked(x)
    assert found is not None and found[..., 5:].all() and not found[..., :5].any()
    flat = np.where(found, x, 0).astype(np.float32)  # nothing of the scores is left
    assert sqnr_db(flat, x) == 0.0
    noisy = x + RNG.normal(0, 0.3, x.shape).astype(np.float32)
    assert sqnr_db(noisy, x) == pytest.approx(sqnr_db(noisy[..., :5], x[..., :5]))


def test_what_is_no_mask_counts() -> None:
    for x in (RNG.normal(0, 400, 5000), np.linspace(-2000, 0, 100), np.full(50, -2000.0), np.append(RNG.normal(0, 1, 50), 5e3), np.zeros((0, 3))):
        assert masked(x.astype(np.float32)) is None
    huge = np.array([1.0, 2.0, 1e37], np.float32)
    assert masked(huge) is not None and masked(huge).tolist() == [False, False, True]  # type: ignore[union-attr]


def test_a_range_that_masks_fill_is_estimated_at_what_it_leaves_of_the_rest() -> None:
    x = scores(-1e4)
    h = Histogram()
    h.add(x, float(x.min()), float(x.max()), float(np.square(x.astype(np.float64)).sum()))
    params = QParams.from_range(float(x.min()), float(x.max()))
    truth = sqnr_db(params.dequantize(params.quantize(x)), x)
    assert truth < 1 and abs(estimated(h, params) - truth) < 1.5
    tight = QParams.from_range(-12.0, 12.0)
    assert estimated(h, tight) > 25, "saturated masks cost nothing"
    plain = Histogram()
    y = x[..., :5].copy()
    plain.add(y, float(y.min()), float(y.max()), float(np.square(y.astype(np.float64)).sum()))
    assert estimated(plain, tight) == pytest.approx(sqnr_db(tight.dequantize(tight.quantize(y)), y), abs=0.3)


def detections(seed: int, last: bool) -> np.ndarray:
    """4 boxes' numbers in pixels, 20 scores from 0 to 1, for 100 anchors: [1, 24, 100] or [1, 100, 24]."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.uniform(10, 600, (1, 4, 100)), rng.uniform(0, 1, (1, 20, 100)) ** 4], 1).astype(np.float32)
    return x.transpose(0, 2, 1).copy() if last else x


@pytest.mark.parametrize("last", [False, True])
def test_quantities_are_told_apart(last: bool) -> None:
    x = detections(0, last)
    parts = Parts.of(x)
    assert parts.axis == (2 if last else 1) and parts.members == (tuple(range(4)), tuple(range(4, 24)))
    assert parts.names() == [f"{span} of axis {parts.axis}" for span in ("0-3", "4-23")]
    sums = parts.sums(np.square(x.astype(np.float64)))
    assert sums.sum() == pytest.approx(float(np.square(x.astype(np.float64)).sum())) and len(sums) == 2


@pytest.mark.parametrize("shape", [(1, 1000), (8,), (1, 64, 14, 14), (1, 3, 2)])
def test_other_outputs_are_one_quantity(shape: tuple[int, ...]) -> None:
    """Logits of any spread, maps, and too few elements to tell."""
    for x in (RNG.standard_normal(shape), np.zeros(shape)):
        assert Parts.of(x).members == ((),)
    assert Parts.of(np.exp(10 * RNG.standard_normal((1, 1000)))).members == ((),)
    channels = RNG.standard_normal((1, 12, 8, 8)) * np.logspace(0, 4, 12).reshape(1, 12, 1, 1)
    assert Parts.of(channels).members == ((),), "a slope, no gap"


def test_dead_channels_are_no_quantity() -> None:
    """A normalization whose gamma and beta are next to nothing leaves numbers that no integer keeps."""
    hidden = RNG.standard_normal((1, 12, 32)).astype(np.float32)
    hidden[..., 5] *= 1e-7
    assert Parts.of(hidden).members == ((),)


class Runner:
    """A network with one output, which some error is added to."""

    def __init__(self, error: float) -> None:
        self.manifest: dict[str, Any] = {}
        self.inputs, self.outputs = [TensorInfo("x", (1, 24, 100), "float32")], [TensorInfo("found", (1, 24, 100), "float32")]
        self.error = np.random.default_rng(9).normal(0, error, (1, 24, 100)).astype(np.float32)

    def run(self, inputs: Any) -> dict[str, np.ndarray]:
        return {"found": inputs["x"] + self.error}

    trace = run


def test_verify_judges_the_worse_quantity() -> None:
    samples = [{"x": detections(i, False)} for i in range(3)]
    report = compare(Runner(0.3), Runner(0.0), samples, thresholds=Thresholds(min_sqnr=20.0), layer_samples=0)
    (out,) = report.outputs
    boxes, found = out.metrics.parts.values()
    assert out.metrics.sqnr_db > 45 and boxes > 45 and found < 10 and out.metrics.worst_db == found
    assert report.failures == [f"output 'found': SQNR {found:.2f} dB in 4-23 of axis 1 is below 20 dB"]
    assert f"output 'found' holds several quantities: {boxes:.2f} dB in 0-3 of axis 1; {found:.2f} dB in 4-23 of axis 1" in parity_text(report)
    assert compare(Runner(0.003), Runner(0.0), samples, thresholds=Thresholds(min_sqnr=20.0), layer_samples=0).passed


def test_corrections_are_judged_by_both_quantities() -> None:
    wanted = {"found": detections(0, False)}

    class Ended:
        def __init__(self, error: np.ndarray) -> None:
            self.error = error

        def outputs(self) -> dict[str, np.ndarray]:
            return {"found": wanted["found"] + self.error}

    boxes, found = np.zeros((1, 24, 100), np.float32), np.zeros((1, 24, 100), np.float32)
    boxes[:, :4], found[:, 4:] = 1.0, 0.5
    alone: Any = [score([Ended(e)], [wanted])[0] for e in (boxes + found, boxes + 0.1 * found)]
    mean, least = score([Ended(found)], [wanted])
    assert least < 0 and mean == pytest.approx((EXACT + least) / 2), "an exact quantity hides the other one in the mean alone"
    assert alone[1] - alone[0] == pytest.approx(10, abs=0.01), "half of 20 dB: the boxes are as they were"


def test_a_metric_of_equal_tensors_stays_infinite() -> None:
    a = Accumulator()
    a.add(detections(0, True), detections(0, True))
    assert a.metrics().worst_db == math.inf and set(a.metrics().parts.values()) == {math.inf}


@pytest.mark.parametrize("pixels", [1.0, 400.0])
def test_a_concatenation_at_the_end_gives_each_quantity_its_scale(pixels: float, tmp_path: Path) -> None:
    """Two results that are 8 bits each, too large to be carried in float: one tensor of them is split only where their magnitudes differ."""
    net = OnnxNet()
    x = net.input("x", 1, 3, 64, 64)
    boxes, scores = (net.op("Mul", *(net.op("Conv", x, net.weight(c, 3, 1, 1, spread=s)) for s in (0.5, gain))) for c, gain in ((8, pixels), (6, 0.5)))
    joined = net.op("Reshape", net.op("Concat", boxes, scores, axis=1), net.ints(1, 14, 4096))
    path = net.save(tmp_path / "m.onnx", [joined])
    data = [{"x": np.random.default_rng(i).standard_normal((1, 3, 64, 64)).astype(np.float32)} for i in range(3)]
    artifact = qcompiler.compile(path, calibration=data)
    reasons = [f["reason"] for f in artifact.manifest["float_ops"] if f["op"] == "Concat"]
    assert len(reasons) == (pixels > 1) and all("keeps a scale of its own" in r for r in reasons)
    (out,) = qcompiler.verify(artifact.save(tmp_path / "m.so"), path, data).outputs
    assert out.metrics.worst_db > 25
